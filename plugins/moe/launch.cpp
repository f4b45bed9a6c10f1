// Which kernels one call of l4convert::MoE launches, on what grids, with what workspace. README.md gives the reasons.
#include "launch.h"

#include <algorithm>
#include <string>
#include <vector>

#include "../library/sizes.h"

namespace l4convert {
namespace {

constexpr std::int64_t kGroup = 64;        // K and N are multiples of it (layout.py)
constexpr std::int64_t kMaxExperts = 128;  // EXPERTS of variants.py
constexpr std::int64_t kRoutedAtOnce = 64; // rows that one launch routes, and TOKENS of a routing block
constexpr std::int64_t kSumBlock = 1024;   // BLOCK of moe_sum
constexpr std::int64_t kMaxRows = std::int64_t{1} << 24;
constexpr std::int64_t kLargestTile = 128;

std::string compute_name(const l4_moe& moe) { return moe.compute == L4_FLOAT16 ? "fp16" : "bf16"; }

std::string weights_name(const l4_moe& moe) {
  return moe.weights == L4_WEIGHTS_INT4 ? "int4" : moe.weights == L4_WEIGHTS_FP8 ? "fp8" : "plain";
}

bool is_fp8(const l4_moe& moe) { return moe.weights == L4_WEIGHTS_FP8; }

std::int64_t rows_of(const l4_moe& moe, std::int64_t tokens) { return tokens * moe.top_k; }

// The classes of tiles that a weight type has kernels for, by the number in their names.
std::vector<std::int64_t> classes_of(const l4_moe& moe) {
  return moe.weights == L4_WEIGHTS_INT4 ? std::vector<std::int64_t>{8, 64, 128} : std::vector<std::int64_t>{16, 128};
}

// The most tiles of `tile` rows that experts' rows can need: every full tile, and one that is not full for each expert.
std::int64_t slots_of(const l4_moe& moe, std::int64_t tokens, std::int64_t tile) {
  const std::int64_t rows = rows_of(moe, tokens);
  return rows / tile + std::min<std::int64_t>(moe.num_experts, rows);
}

// Where each piece of the workspace begins. A piece that a call does not need is empty.
struct Workspace {
  std::size_t rows, row_scale, targets, tiles, choices, counts, hidden, hidden_codes, results, bytes;
};

Workspace layout(const l4_moe& moe, std::int64_t tokens) {
  const std::size_t rows = static_cast<std::size_t>(rows_of(moe, tokens));
  const std::size_t hidden_size = static_cast<std::size_t>(moe.hidden_size);
  const std::size_t width = static_cast<std::size_t>(moe.intermediate_size);
  const std::size_t smallest = static_cast<std::size_t>(classes_of(moe).front());
  const std::size_t blocks = static_cast<std::size_t>(ceil_divide(tokens, kRoutedAtOnce));
  const bool at_once = tokens <= kRoutedAtOnce;
  Workspace w{};
  std::size_t end = 0;
  const auto piece = [&end](std::size_t bytes) {
    const std::size_t begin = end;
    end += aligned(bytes);
    return begin;
  };
  w.rows = piece(rows * hidden_size * (is_fp8(moe) ? 1 : 2));
  w.row_scale = piece(is_fp8(moe) ? rows * 4 : 0);
  w.targets = piece(rows * 4);
  w.tiles = piece(static_cast<std::size_t>(slots_of(moe, tokens, static_cast<std::int64_t>(smallest))) * 16);
  w.choices = piece(at_once ? 0 : rows * 4);
  w.counts = piece(at_once ? 0 : blocks * kMaxExperts * 4);
  w.hidden = piece(rows * width * 2);
  w.hidden_codes = piece(is_fp8(moe) ? rows * width : 0);
  w.results = piece(moe.top_k > 1 ? rows * hidden_size * 2 : 0);
  w.bytes = std::max<std::size_t>(end, 256);
  return w;
}

int shift_of(std::int32_t block) {
  int shift = 0;
  while ((std::int32_t{1} << shift) < block) ++shift;
  return shift;
}

// One call: its arguments, and the launches in order.
class Call {
 public:
  Call(Launcher& launcher, const l4_moe& moe, std::int64_t tokens, const l4_moe_buffers& buffers)
      : launcher_(launcher), moe_(moe), tokens_(tokens), rows_(rows_of(moe, tokens)), buffers_(buffers),
        work_(layout(moe, tokens)) {}

  Status run() {
    Status status = choose_tiles();
    if (status.empty()) status = tokens_ <= kRoutedAtOnce ? route_at_once() : route_in_steps();
    if (status.empty()) {
      status = products("gate_up", moe_.hidden_size, moe_.intermediate_size, moe_.gate_up_block, piece(work_.rows),
                        buffers_.gate_up, buffers_.gate_up_scale, piece(work_.hidden));
    }
    if (status.empty() && is_fp8(moe_)) status = quantize();
    const void* hidden = piece(is_fp8(moe_) ? work_.hidden_codes : work_.hidden);
    void* results = moe_.top_k > 1 ? piece(work_.results) : buffers_.y;
    if (status.empty()) {
      status = products("down", moe_.intermediate_size, moe_.hidden_size, moe_.down_block, hidden, buffers_.down,
                        buffers_.down_scale, results);
    }
    if (status.empty() && moe_.top_k > 1) status = sum(results);
    return status;
  }

 private:
  // Tiles of one kernel serve slots with more than `above` and at most `rows` rows.
  struct TileClass {
    std::int64_t name, above, rows;
  };

  void* piece(std::size_t offset) const { return static_cast<char*>(buffers_.workspace) + offset; }
  static Argument i32(std::int64_t value) { return Argument::i32(static_cast<std::int32_t>(value)); }
  static Grid grid(std::int64_t x, std::int64_t y = 1) {
    return {static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(y), 1};
  }

  std::string kernel_name(const std::string& product, std::int64_t name) const {
    return "moe_" + product + "_" + weights_name(moe_) + "_" + compute_name(moe_) + "_m" + std::to_string(name);
  }

  // No expert gets more rows than there are tokens, so up to 64 tokens the largest tile that is used takes all rows of
  // an expert, and its weights are read once. With more tokens the largest tiles pay when experts fill them.
  Status choose_tiles() {
    const std::vector<std::int64_t> names = classes_of(moe_);
    std::int64_t above = 0;
    for (const std::int64_t name : names) {
      const std::int64_t rows = launcher_.constant(kernel_name("gate_up", name), "TILE");
      if (rows == 0 || launcher_.constant(kernel_name("down", name), "TILE") != rows) {
        return "no kernel " + kernel_name("gate_up", name) + " for SM " + std::to_string(launcher_.sm()) +
               ": l4convert plugins build --sm " + std::to_string(launcher_.sm()) + " --compute " + compute_name(moe_);
      }
      if (rows <= above) continue;  // on this GPU two classes are one
      classes_.push_back({name, above, rows});
      above = rows;
      const bool filled = rows_ >= moe_.num_experts * (kLargestTile / 4);
      if (tokens_ <= rows || (name != names.front() && !filled)) break;
    }
    tile_ = classes_.back().rows;
    // What full tiles leave of an expert's rows fits the class below; a third launch would cost more than it saves.
    if (classes_.size() > 2) {
      classes_.erase(classes_.begin());
      classes_.front().above = 0;
    }
    slots_ = slots_of(moe_, tokens_, tile_);
    return {};
  }

  Status route_at_once() {
    const std::string name = "moe_route_" + compute_name(moe_) + (is_fp8(moe_) ? "_fp8" : "") +
                             (tokens_ <= 8 ? "_t8" : "_t64");
    return launcher_.launch(
        name, grid(tokens_),
        {Argument::pointer(buffers_.x), Argument::pointer(buffers_.router_logits), Argument::pointer(piece(work_.rows)),
         Argument::pointer(piece(work_.row_scale)), Argument::pointer(piece(work_.targets)),
         Argument::pointer(piece(work_.tiles)), i32(tokens_), i32(moe_.num_experts), i32(moe_.hidden_size),
         i32(moe_.top_k), i32(slots_), i32(tile_)});
  }

  Status route_in_steps() {
    const std::int64_t blocks = ceil_divide(tokens_, kRoutedAtOnce);
    const Argument logits = Argument::pointer(buffers_.router_logits);
    const Argument choices = Argument::pointer(piece(work_.choices));
    const Argument counts = Argument::pointer(piece(work_.counts));
    Status status = launcher_.launch("moe_choose", grid(blocks),
                                     {logits, choices, counts, i32(tokens_), i32(moe_.num_experts), i32(moe_.top_k)});
    if (!status.empty()) return status;
    status = launcher_.launch("moe_scan", grid(1),
                              {counts, Argument::pointer(piece(work_.tiles)), i32(blocks), i32(slots_), i32(tile_)});
    if (!status.empty()) return status;
    return launcher_.launch(
        "moe_place_" + compute_name(moe_) + (is_fp8(moe_) ? "_fp8" : ""), grid(tokens_),
        {Argument::pointer(buffers_.x), logits, choices, counts, Argument::pointer(piece(work_.rows)),
         Argument::pointer(piece(work_.row_scale)), Argument::pointer(piece(work_.targets)), i32(tokens_),
         i32(moe_.num_experts), i32(moe_.hidden_size), i32(moe_.top_k)});
  }

  Status products(const std::string& product, std::int64_t depth, std::int64_t columns, std::int32_t block,
                  const void* inputs, const void* weight, const void* weight_scale, void* output) {
    for (const TileClass& tile : classes_) {
      const std::string name = kernel_name(product, tile.name);
      const std::int64_t per_slot = ceil_divide(columns, launcher_.constant(name, "COLUMNS", columns));
      const Status status = launcher_.launch(
          name, grid(slots_ * per_slot),
          {Argument::pointer(piece(work_.tiles)), Argument::pointer(inputs), Argument::pointer(piece(work_.row_scale)),
           Argument::pointer(weight), Argument::pointer(weight_scale), Argument::pointer(output),
           Argument::pointer(piece(work_.targets)), i32(slots_), i32(depth), i32(columns), i32(shift_of(block)),
           i32(tile.above), i32(tile.rows)});
      if (!status.empty()) return status;
    }
    return {};
  }

  Status quantize() {
    return launcher_.launch("moe_quantize_" + compute_name(moe_), grid(rows_),
                            {Argument::pointer(piece(work_.hidden)), Argument::pointer(piece(work_.hidden_codes)),
                             Argument::pointer(piece(work_.row_scale)), i32(moe_.intermediate_size)});
  }

  Status sum(const void* results) {
    return launcher_.launch("moe_sum_" + compute_name(moe_), grid(tokens_, ceil_divide(moe_.hidden_size, kSumBlock)),
                            {Argument::pointer(results), Argument::pointer(buffers_.y), i32(moe_.hidden_size),
                             i32(moe_.top_k)});
  }

  Launcher& launcher_;
  const l4_moe& moe_;
  const std::int64_t tokens_, rows_;
  const l4_moe_buffers& buffers_;
  const Workspace work_;
  std::vector<TileClass> classes_;
  std::int64_t tile_ = 0, slots_ = 0;
};

Status check_size(const char* name, std::int32_t size) {
  if (size >= kGroup && size % kGroup == 0) return {};
  return std::string(name) + " is " + std::to_string(size) + "; the kernels take multiples of 64";
}

// The weights along K, which has `size`, that share a scale. Other weights than INT4 have none (0) or all of K.
Status check_block(const char* name, std::int32_t block, const char* size_name, std::int32_t size, bool int4) {
  const std::string number = std::to_string(block);
  if (!int4 && (block == 0 || block == size)) return {};
  if (!int4) return std::string(name) + " is " + number + ", but only INT4 weights have scales for blocks";
  if (block != 32 && block != 64 && block != 128) {
    return std::string(name) + " is " + number + "; the kernels take 32, 64 and 128";
  }
  if (size % block == 0) return {};
  return std::string(size_name) + " is " + std::to_string(size) + ", which blocks of " + number + " do not divide";
}

Status check_buffers(const l4_moe& moe, const l4_moe_buffers& buffers) {
  const bool scaled = moe.weights != L4_WEIGHTS_PLAIN;
  const struct {
    const char* name;
    const void* address;
    bool needed;
  } given[] = {{"x", buffers.x, true},
               {"router_logits", buffers.router_logits, true},
               {"gate_up", buffers.gate_up, true},
               {"gate_up_scale", buffers.gate_up_scale, scaled},
               {"down", buffers.down, true},
               {"down_scale", buffers.down_scale, scaled},
               {"y", buffers.y, true},
               {"workspace", buffers.workspace, true}};
  for (const auto& buffer : given) {
    if (buffer.needed && buffer.address == nullptr) return std::string(buffer.name) + " is missing";
    if (reinterpret_cast<std::uintptr_t>(buffer.address) % 16 != 0) {
      return std::string(buffer.name) + " is not aligned to 16 bytes";
    }
  }
  return {};
}

}  // namespace

Status check(const l4_moe& moe) {
  if (moe.compute != L4_BFLOAT16 && moe.compute != L4_FLOAT16) return "the kernels compute in bfloat16 or float16";
  if (moe.weights < L4_WEIGHTS_PLAIN || moe.weights > L4_WEIGHTS_FP8) return "weights are 16 bits, INT4 or FP8";
  if (moe.num_experts < 1 || moe.num_experts > kMaxExperts) {
    return "num_experts is " + std::to_string(moe.num_experts) + "; the kernels take 1 to 128";
  }
  if (moe.top_k < 1 || moe.top_k > moe.num_experts) {
    return "top_k is " + std::to_string(moe.top_k) + " of " + std::to_string(moe.num_experts) + " experts";
  }
  const bool int4 = moe.weights == L4_WEIGHTS_INT4;
  Status status = check_size("hidden_size", moe.hidden_size);
  if (status.empty()) status = check_size("intermediate_size", moe.intermediate_size);
  if (status.empty()) status = check_block("gate_up_block", moe.gate_up_block, "hidden_size", moe.hidden_size, int4);
  if (status.empty()) {
    status = check_block("down_block", moe.down_block, "intermediate_size", moe.intermediate_size, int4);
  }
  const std::int64_t weights_of_an_expert = 2 * std::int64_t{moe.hidden_size} * moe.intermediate_size;
  if (status.empty() && weights_of_an_expert > INT32_MAX) return "an expert's gate_up has more than 2^31 weights";
  return status;
}

Status check(const l4_moe& moe, std::int64_t tokens) {
  const Status status = check(moe);
  if (!status.empty() || (tokens >= 0 && tokens <= kMaxRows / moe.top_k)) return status;
  return "cannot take " + std::to_string(tokens) + " tokens at once";
}

std::size_t workspace_bytes(const l4_moe& moe, std::int64_t tokens) {
  return layout(moe, std::clamp<std::int64_t>(tokens, 0, kMaxRows / moe.top_k)).bytes;
}

Status enqueue(Launcher& launcher, const l4_moe& moe, std::int64_t tokens, const l4_moe_buffers& buffers) {
  Status status = check(moe, tokens);
  if (!status.empty() || tokens == 0) return status;
  if (is_fp8(moe) && launcher.sm() < 89) return "FP8 needs a GPU of SM 8.9 or later";
  status = check_buffers(moe, buffers);
  return status.empty() ? Call(launcher, moe, tokens, buffers).run() : status;
}

}  // namespace l4convert
