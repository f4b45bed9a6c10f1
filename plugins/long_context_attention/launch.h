// One call of l4convert::LongContextAttention: what is wanted, what it needs, and the launches that do it.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum l4_kv { L4_KV_NONE = 0, L4_KV_FP8 = 1, L4_KV_INT8 = 2 };

struct l4_attention {
  int32_t num_heads, kv_num_heads, head_dim, chunk_size /* 0: global */, rope;
  float qk_norm_eps, floor_scale, attn_scale;
  int32_t compute, kv_dtype;  // l4_float (plugins/moe/launch.h), l4_kv
};

struct l4_attention_shape {
  int64_t batch, new_tokens /* S */, seen_tokens /* T */, capacity /* M slots */, table_rows;
};

struct l4_attention_buffers {
  const void *query, *key, *value, *past_key, *past_value, *positions, *cos, *sin, *key_scale, *value_scale;
  void *attention, *present_key, *present_value, *workspace;
};

#ifdef __cplusplus
#include "../library/launcher.h"

namespace l4convert {

Status check(const l4_attention& attention);
std::size_t workspace_bytes(const l4_attention& attention, const l4_attention_shape& shape, int multiprocessors);
Status enqueue(Launcher& launcher, const l4_attention& attention, const l4_attention_shape& shape,
               const l4_attention_buffers& buffers);

}  // namespace l4convert
#endif
