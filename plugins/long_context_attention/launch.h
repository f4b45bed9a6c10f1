// One call of l4convert::LongContextAttention with static caches: what is wanted, what it needs, the launches that do it.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum l4_kv { L4_KV_NONE = 0, L4_KV_FP8 = 1, L4_KV_INT8 = 2 };

// The attributes of the op (definition.py, AttentionSpec). Zero means none: chunk_size (a global layer), qk_norm_eps,
// attn_scale; floor_scale matters only beside an attn_scale.
struct l4_attention {
  int32_t num_heads, kv_num_heads, head_dim, chunk_size, rope;
  float qk_norm_eps, floor_scale, attn_scale;
  int32_t compute, kv_dtype;  // l4_float (plugins/moe/launch.h), l4_kv
};

// B, S, T, M, and the rows of the rotary tables (0 without). New real tokens of a sequence are consecutive columns with
// consecutive positions; padding (-1) stands before or after them, and its rows of the result are zeros.
struct l4_attention_shape {
  int64_t batch, new_tokens /* S */, seen_tokens /* T */, capacity /* M slots */, table_rows;
};

// Device memory, aligned to 16 bytes (the workspace to 256). Tables are null without rope, scales without a quantized
// cache. Caches are written in place: where present differs from past, enqueue copies the whole past there first. No other
// two buffers may overlap; attention holds the prepared queries until the results are written.
struct l4_attention_buffers {
  const void *query, *key, *value, *past_key, *past_value, *positions, *cos, *sin, *key_scale, *value_scale;
  void *attention, *present_key, *present_value, *workspace;
};

#ifdef __cplusplus
#include "../library/launcher.h"

namespace l4convert {

// Whether the kernels can do such a call at all, on any device; and one of this shape.
Status check(const l4_attention& attention);
Status check(const l4_attention& attention, const l4_attention_shape& shape);
// Of one call. A call that is smaller in any respect, on a device with fewer multiprocessors, never needs more.
std::size_t workspace_bytes(const l4_attention& attention, const l4_attention_shape& shape, int multiprocessors);
Status enqueue(Launcher& launcher, const l4_attention& attention, const l4_attention_shape& shape,
               const l4_attention_buffers& buffers);

}  // namespace l4convert
#endif
