#include "launch.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "../library/sizes.h"
#include "../moe/launch.h"

namespace l4convert {
namespace {

// Decode is compiled so that a multiprocessor holds two of its blocks (variants.py).
constexpr std::int64_t kDecodeBlocks = 2;
// A long context is cut into parts of about so many keys, however many sequences there are, so that one long sequence
// of a batch does not keep a few multiprocessors busy alone. A part's 2 MB and more of keys and values dwarf its result.
constexpr std::int64_t kPartTokens = 8192;
// Parts that combine merges, one after another, for one row: 10,485,760 tokens in parts of 10,240.
constexpr std::int64_t kMostParts = 1024;
// Fewer keys than this are not worth a part of their own.
constexpr std::int64_t kLeastTokens = 64;
// The same for prefill, whose parts cost more (a part has BM rows).
constexpr std::int64_t kLeastPrefillTokens = 512;
constexpr std::int64_t kMostPrefillRows = 128;  // BM
constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kGridMax = 65535;  // of y and z: CUDA C++ Programming Guide, technical specifications

std::int32_t narrow(std::int64_t value) { return static_cast<std::int32_t>(value); }

std::int64_t group_of(const l4_attention& a) { return a.num_heads / a.kv_num_heads; }
std::size_t element_bytes(const l4_attention& a) { return a.kv_dtype == L4_KV_NONE ? 2 : 1; }

// Keys that a query can see at most.
std::int64_t reach(const l4_attention& a, const l4_attention_shape& s) {
  return a.chunk_size ? std::min<std::int64_t>(a.chunk_size, s.seen_tokens) : s.seen_tokens;
}

// The fewest parts that fill the machine once, or that are short enough.
std::int64_t least_parts(std::int64_t rows, std::int64_t keys, std::int64_t blocks) {
  return std::max<std::int64_t>({1, blocks / rows, ceil_divide(keys, kPartTokens)});
}

// Into how many parts decode cuts its keys, for B * Hk `rows`: of the counts from the fewest to twice as many, that which
// leaves the least of the machine idle in the last round.
std::int64_t decode_parts(const l4_attention& a, const l4_attention_shape& s, int multiprocessors) {
  const std::int64_t rows = s.batch * a.kv_num_heads, blocks = kDecodeBlocks * multiprocessors, keys = reach(a, s);
  const std::int64_t most = std::min(kMostParts, ceil_divide(keys, kLeastTokens));
  const std::int64_t least = std::min(least_parts(rows, keys, blocks), most);
  std::int64_t best = least;
  double best_use = 0;
  for (std::int64_t parts = least; parts <= std::min(2 * least, most); ++parts) {
    const std::int64_t programs = rows * parts;
    const double use = static_cast<double>(programs) / static_cast<double>(ceil_divide(programs, blocks) * blocks);
    if (use > best_use + 0.01) {
      best = parts;
      best_use = use;
    }
  }
  return best;
}

// Prefill cuts the keys only where there are too few tiles of queries to fill the machine.
std::int64_t prefill_parts(const l4_attention& a, const l4_attention_shape& s, int multiprocessors,
                           std::int64_t tile_rows) {
  const std::int64_t tiles = ceil_divide(s.new_tokens * group_of(a), tile_rows) * a.kv_num_heads * s.batch;
  const std::int64_t most = std::min(kMostParts, ceil_divide(reach(a, s), kLeastPrefillTokens));
  return std::clamp<std::int64_t>(multiprocessors / tiles, 1, most);
}

std::size_t part_bytes(const l4_attention& a) { return (static_cast<std::size_t>(a.head_dim) + 2) * sizeof(float); }

// Never less for a larger call: decode_parts is at most twice least_parts, and rows * (blocks / rows) at most blocks.
std::size_t decode_workspace(const l4_attention& a, const l4_attention_shape& s, int multiprocessors) {
  const std::int64_t rows = s.batch * a.kv_num_heads;
  const std::int64_t most = std::min(kMostParts, 2 * ceil_divide(reach(a, s), kPartTokens));
  const std::int64_t parts = std::max(2 * kDecodeBlocks * multiprocessors, rows * std::max<std::int64_t>(2, most));
  return static_cast<std::size_t>(parts * group_of(a)) * part_bytes(a) + 3 * kAlignment;
}

std::size_t prefill_workspace(const l4_attention& a, const l4_attention_shape& s, int multiprocessors) {
  const auto tokens = static_cast<std::size_t>(s.batch * s.new_tokens * a.kv_num_heads * a.head_dim);
  // With one part the results need no space; with more there are at most as many tiles as multiprocessors.
  const auto rows = static_cast<std::size_t>(multiprocessors * kMostPrefillRows);
  return aligned(static_cast<std::size_t>(s.batch) * 4 * sizeof(std::int64_t)) +
         2 * aligned(tokens * element_bytes(a)) + rows * part_bytes(a) + 3 * kAlignment;
}

// Hands out the workspace, piece by piece.
class Pieces {
 public:
  explicit Pieces(void* workspace) : next_(static_cast<char*>(workspace)) {}
  void* take(std::size_t bytes) {
    char* piece = next_;
    next_ += aligned(bytes);
    return piece;
  }

 private:
  char* next_;
};

struct Partials {
  Partials(Pieces& pieces, const l4_attention& a, std::int64_t rows_and_parts)
      : sums(pieces.take(static_cast<std::size_t>(rows_and_parts * a.head_dim) * sizeof(float))),
        highest(pieces.take(static_cast<std::size_t>(rows_and_parts) * sizeof(float))),
        totals(pieces.take(static_cast<std::size_t>(rows_and_parts) * sizeof(float))) {}
  void *sums, *highest, *totals;
};

// One call on its way: the names of its kernels and its arguments.
class Call {
 public:
  Call(Launcher& launcher, const l4_attention& a, const l4_attention_shape& s, const l4_attention_buffers& b)
      : launcher_(launcher), a_(a), s_(s), b_(b) {}

  Status run() {
    Status status = present(b_.present_key, b_.past_key);
    if (status.empty()) status = present(b_.present_value, b_.past_value);
    if (!status.empty() || s_.new_tokens == 0) return status;
    return s_.new_tokens == 1 ? decode() : prefill();
  }

 private:
  Status decode() {
    const std::string kernel = name("decode", kv());
    if (!launcher_.has(kernel)) return missing(kernel);
    if (launcher_.constant(kernel, "R") < group_of(a_)) {
      return "LongContextAttention: " + std::to_string(group_of(a_)) + " query heads to a key/value head are too many";
    }
    const std::int64_t parts = decode_parts(a_, s_, launcher_.multiprocessors());
    Pieces pieces(b_.workspace);
    const Partials partials(pieces, a_, s_.batch * a_.num_heads * parts);
    std::vector<Argument> arguments = pointers({b_.query, b_.key, b_.value, b_.present_key, b_.present_value,
                                                b_.positions, b_.cos, b_.sin, b_.key_scale, b_.value_scale,
                                                partials.sums, partials.highest, partials.totals});
    append(arguments, {i64(s_.seen_tokens), i64(s_.capacity), i64(chunk()), i32(s_.table_rows), i32(group_of(a_)),
                       i32(a_.rope), f32(a_.qk_norm_eps), f32(a_.floor_scale), f32(a_.attn_scale)});
    const Status status = launcher_.launch(kernel, grid(parts), arguments);
    return status.empty() ? combine(partials, parts) : status;
  }

  Status prefill() {
    const std::string kernel = name("prefill", kv());
    if (!launcher_.has(kernel)) return missing(kernel);
    const std::int64_t tile_rows = launcher_.constant(kernel, "BM");
    const std::int64_t tiles = ceil_divide(s_.new_tokens * group_of(a_), tile_rows);
    const std::int64_t parts = prefill_parts(a_, s_, launcher_.multiprocessors(), tile_rows);
    Pieces pieces(b_.workspace);
    void* sequences = pieces.take(static_cast<std::size_t>(s_.batch) * 4 * sizeof(std::int64_t));
    const auto tokens = static_cast<std::size_t>(s_.batch * s_.new_tokens * a_.kv_num_heads * a_.head_dim);
    void* new_key = pieces.take(tokens * element_bytes(a_));
    void* new_value = pieces.take(tokens * element_bytes(a_));
    const Partials partials(pieces, a_, parts > 1 ? s_.batch * s_.new_tokens * a_.num_heads * parts : 0);

    Status status = prepare(new_key, new_value, sequences);
    if (!status.empty()) return status;
    std::vector<Argument> arguments =
        pointers({b_.attention, b_.present_key, b_.present_value, new_key, new_value, sequences, b_.value_scale,
                  b_.attention, partials.sums, partials.highest, partials.totals});
    append(arguments, {i32(s_.new_tokens), i64(s_.capacity), i64(chunk()), i32(group_of(a_)), i32(parts)});
    status = launcher_.launch(kernel, grid(tiles * parts), arguments);
    if (status.empty() && parts > 1) status = combine(partials, parts);
    return status.empty() ? commit(new_key, new_value, sequences) : status;
  }

  // The queries wait where their results will be: a tile of them is read by those alone who write these results.
  Status prepare(void* new_key, void* new_value, void* sequences) {
    const std::string kernel = name("prepare", kv());
    if (!launcher_.has(kernel)) return missing(kernel);
    std::vector<Argument> arguments =
        pointers({b_.query, b_.key, b_.value, b_.positions, b_.cos, b_.sin, b_.key_scale, b_.value_scale, b_.attention,
                  new_key, new_value, sequences});
    append(arguments, {i32(s_.new_tokens), i64(s_.seen_tokens), i64(chunk()), i32(s_.table_rows), i32(a_.kv_num_heads),
                       i32(group_of(a_)), i32(a_.rope), f32(a_.qk_norm_eps), f32(a_.floor_scale), f32(a_.attn_scale)});
    Grid programs = grid(ceil_divide(s_.new_tokens, launcher_.constant(kernel, "BT")));
    programs.y += static_cast<std::uint32_t>(a_.num_heads);
    return launcher_.launch(kernel, programs, arguments);
  }

  Status commit(void* new_key, void* new_value, void* sequences) {
    const std::string kernel = "attention_commit_" + std::to_string(8 * element_bytes(a_)) + width();
    if (!launcher_.has(kernel)) return missing(kernel);
    std::vector<Argument> arguments = pointers({new_key, new_value, sequences, b_.present_key, b_.present_value});
    append(arguments, {i32(s_.new_tokens), i64(s_.capacity), i64(chunk())});
    return launcher_.launch(kernel, grid(ceil_divide(s_.new_tokens, launcher_.constant(kernel, "BT"))), arguments);
  }

  Status combine(const Partials& partials, std::int64_t parts) {
    const std::string kernel = name("combine", "");
    if (!launcher_.has(kernel)) return missing(kernel);
    std::vector<Argument> arguments =
        pointers({partials.sums, partials.highest, partials.totals, b_.value_scale, b_.attention});
    append(arguments, {i32(parts), i32(a_.num_heads), i32(group_of(a_)), i32(a_.kv_dtype != L4_KV_NONE)});
    const std::int64_t rows = s_.batch * s_.new_tokens * a_.num_heads;
    return launcher_.launch(kernel, Grid{static_cast<std::uint32_t>(rows), 1, 1}, arguments);
  }

  Status present(void* to, const void* from) {
    if (to == from) return {};
    const auto elements = static_cast<std::size_t>(s_.batch * a_.kv_num_heads * a_.head_dim) *
                          static_cast<std::size_t>(s_.capacity);
    return launcher_.copy(to, from, elements * element_bytes(a_));
  }

  // A global layer is one chunk: whatever is divided by its size becomes 0, and positions stay what they are.
  std::int64_t chunk() const { return a_.chunk_size ? a_.chunk_size : kInt32Max; }
  std::string width() const { return "_d" + std::to_string(a_.head_dim); }
  std::string kv() const { return a_.kv_dtype == L4_KV_NONE ? "_none" : a_.kv_dtype == L4_KV_FP8 ? "_fp8" : "_int8"; }
  std::string name(const std::string& kernel, const std::string& cache) const {
    return "attention_" + kernel + (a_.compute == L4_BFLOAT16 ? "_bf16" : "_fp16") + cache + width();
  }
  Status missing(const std::string& kernel) const {
    return "the library has no kernel " + kernel + " for SM " + std::to_string(launcher_.sm()) +
           "; build one that has: l4convert plugins build --head-dim " + std::to_string(a_.head_dim) + " --sm " +
           std::to_string(launcher_.sm()) + " --compute " + (a_.compute == L4_BFLOAT16 ? "bf16" : "fp16");
  }
  Grid grid(std::int64_t x) const {
    return Grid{static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(a_.kv_num_heads),
                static_cast<std::uint32_t>(s_.batch)};
  }

  static Argument i32(std::int64_t value) { return Argument::i32(narrow(value)); }
  static Argument i64(std::int64_t value) { return Argument::i64(value); }
  static Argument f32(float value) { return Argument::f32(value); }
  static std::vector<Argument> pointers(std::initializer_list<const void*> values) {
    std::vector<Argument> arguments;
    for (const void* value : values) arguments.push_back(Argument::pointer(value));
    return arguments;
  }
  static void append(std::vector<Argument>& arguments, std::initializer_list<Argument> more) {
    arguments.insert(arguments.end(), more);
  }

  Launcher& launcher_;
  const l4_attention& a_;
  const l4_attention_shape& s_;
  const l4_attention_buffers& b_;
};

Status refuse(const std::string& why) { return "LongContextAttention: " + why; }

// `some`: whether there are new tokens; without them only the caches are looked at.
Status check_buffers(const l4_attention& a, bool some, const l4_attention_buffers& b) {
  const bool quantized = some && a.kv_dtype != L4_KV_NONE, rope = some && a.rope != 0;
  const struct {
    const char* name;
    const void* address;
    bool needed;
  } all[] = {
      {"query", b.query, some},
      {"key", b.key, some},
      {"value", b.value, some},
      {"past_key", b.past_key, true},
      {"past_value", b.past_value, true},
      {"positions", b.positions, some},
      {"cos", b.cos, rope},
      {"sin", b.sin, rope},
      {"key_scale", b.key_scale, quantized},
      {"value_scale", b.value_scale, quantized},
      {"attention", b.attention, some},
      {"present_key", b.present_key, true},
      {"present_value", b.present_value, true},
      {"workspace", b.workspace, some},
  };
  for (const auto& buffer : all) {
    if (buffer.needed && !buffer.address) return refuse(std::string(buffer.name) + " is null");
    if (reinterpret_cast<std::uintptr_t>(buffer.address) % 16) {
      return refuse(std::string(buffer.name) + " is not aligned to 16 bytes");
    }
  }
  return {};
}

}  // namespace

Status check(const l4_attention& a) {
  if (a.num_heads < 1 || a.kv_num_heads < 1 || a.num_heads % a.kv_num_heads) {
    return refuse("num_heads must be a multiple of kv_num_heads");
  }
  if (a.num_heads > kGridMax / 2) return refuse("more than 32767 heads");
  if (a.head_dim < 16 || (a.head_dim & (a.head_dim - 1))) return refuse("head_dim must be a power of two from 16 on");
  if (a.chunk_size < 0) return refuse("chunk_size is negative");
  if (!(a.qk_norm_eps >= 0)) return refuse("qk_norm_eps is negative");
  if (!(a.attn_scale >= 0)) return refuse("attn_scale is negative");
  if (a.attn_scale > 0 && !(a.floor_scale > 0)) return refuse("floor_scale must be above 0");
  if (a.compute != L4_BFLOAT16 && a.compute != L4_FLOAT16) return refuse("it computes in bfloat16 or float16 only");
  if (a.kv_dtype < L4_KV_NONE || a.kv_dtype > L4_KV_INT8) return refuse("kv_dtype must be none, fp8 or int8");
  return {};
}

Status check(const l4_attention& a, const l4_attention_shape& s) {
  const Status status = check(a);
  if (!status.empty()) return status;
  if (s.batch < 0 || s.new_tokens < 0) return refuse("a negative size");
  if (s.seen_tokens < s.new_tokens) return refuse("positions have fewer columns than there are new tokens");
  if (s.batch > kGridMax) return refuse("more than 65535 sequences");
  const std::int64_t largest = std::max({s.seen_tokens, s.capacity, s.table_rows});
  if (largest >= kInt32Max || s.batch * a.num_heads * a.head_dim > kInt32Max ||
      s.batch * a.num_heads > kInt32Max / std::max<std::int64_t>(1, s.new_tokens)) {
    return refuse("more than 2147483646 tokens, slots or rows");
  }
  if (s.capacity < reach(a, s)) {
    return refuse("the cache has " + std::to_string(s.capacity) + " slots, fewer than the " +
                  std::to_string(reach(a, s)) + " that " + std::to_string(s.seen_tokens) + " tokens may need");
  }
  if (a.rope && s.table_rows < reach(a, s)) {
    return refuse("the rotary tables have " + std::to_string(s.table_rows) + " rows, fewer than the " +
                  std::to_string(reach(a, s)) + " positions");
  }
  return {};
}

std::size_t workspace_bytes(const l4_attention& a, const l4_attention_shape& s, int multiprocessors) {
  const std::size_t decode = decode_workspace(a, s, multiprocessors);
  return s.new_tokens > 1 ? std::max(decode, prefill_workspace(a, s, multiprocessors)) : decode;
}

Status enqueue(Launcher& launcher, const l4_attention& a, const l4_attention_shape& s, const l4_attention_buffers& b) {
  Status status = check(a, s);
  if (!status.empty()) return status;
  if (s.batch == 0) return {};
  status = check_buffers(a, s.new_tokens > 0, b);
  return status.empty() ? Call(launcher, a, s, b).run() : status;
}

}  // namespace l4convert
