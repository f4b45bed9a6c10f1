// Ops whose launch code is not there yet.
#include "../long_context_attention/launch.h"
#include "../moe/launch.h"

namespace l4convert {
#if !__has_include("../moe/launch.cpp")
Status check(const l4_moe&) { return "not there yet"; }
std::size_t workspace_bytes(const l4_moe&, std::int64_t) { return 0; }
Status enqueue(Launcher&, const l4_moe&, std::int64_t, const l4_moe_buffers&) { return "not there yet"; }
#endif
#if !__has_include("../long_context_attention/launch.cpp")
Status check(const l4_attention&) { return "not there yet"; }
std::size_t workspace_bytes(const l4_attention&, const l4_attention_shape&, int) { return 0; }
Status enqueue(Launcher&, const l4_attention&, const l4_attention_shape&, const l4_attention_buffers&) { return "not there yet"; }
#endif
}
