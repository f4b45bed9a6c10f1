// One call of l4convert::MoE: what is wanted, what it needs, and the launches that do it.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum l4_float { L4_BFLOAT16 = 0, L4_FLOAT16 = 1 };

// PLAIN: 16 bits, of the compute type, in ONNX order [E, K, N]. INT4 and FP8: packed as layout.py says.
enum l4_weights { L4_WEIGHTS_PLAIN = 0, L4_WEIGHTS_INT4 = 1, L4_WEIGHTS_FP8 = 2 };

struct l4_moe {
  int32_t num_experts, hidden_size, intermediate_size, top_k;
  int32_t compute, weights;  // l4_float, l4_weights
  int32_t gate_up_block, down_block;
};

struct l4_moe_buffers {
  const void *x, *router_logits, *gate_up, *gate_up_scale, *down, *down_scale;
  void *y, *workspace;
};

#ifdef __cplusplus
#include "../library/launcher.h"

namespace l4convert {

// Whether the kernels can do such a call at all, on any device; and one of so many tokens.
Status check(const l4_moe& moe);
Status check(const l4_moe& moe, std::int64_t tokens);
// Of one call of that many tokens or fewer; of the largest call that there can be, where that is less.
std::size_t workspace_bytes(const l4_moe& moe, std::int64_t tokens);
Status enqueue(Launcher& launcher, const l4_moe& moe, std::int64_t tokens, const l4_moe_buffers& buffers);

}  // namespace l4convert
#endif
