#include "plugin.h"

namespace l4convert {
namespace {

using nvinfer1::DataType;

// 4-bit codes in an int32 word, and bytes in an int64 one.
constexpr std::int64_t kCodesPerWord = 8;

class MoE final : public Op {
 public:
  explicit MoE(const l4_moe& moe) : moe_(moe) {
    const DataType compute = moe.compute == L4_BFLOAT16 ? DataType::kBF16 : DataType::kHALF;
    const std::int64_t experts = moe.num_experts, hidden = moe.hidden_size, wide = moe.intermediate_size;
    inputs_ = {{"x", compute, {free('T'), fixed(hidden)}},
               {"router_logits", DataType::kFLOAT, {free('T'), fixed(experts)}}};
    add_weights("gate_up", "gate_up_scale", hidden, 2 * wide, moe.gate_up_block, compute);
    add_weights("down", "down_scale", wide, hidden, moe.down_block, compute);
    outputs_ = {{"y", compute, {free('T'), fixed(hidden)}}};
  }

  Status check(const Sizes& sizes) const override { return l4convert::check(moe_, sizes['T']); }

  std::size_t workspace(const Sizes& most, int) const override { return workspace_bytes(moe_, most['T']); }

  Status enqueue(Launcher& launcher, const Sizes& sizes, const void* const* inputs, void* const* outputs,
                 void* workspace) const override {
    const bool packed = moe_.weights != L4_WEIGHTS_PLAIN;
    const l4_moe_buffers buffers = {inputs[0], inputs[1], inputs[2],  packed ? inputs[3] : nullptr,
                                    inputs[packed ? 4 : 3], packed ? inputs[5] : nullptr, outputs[0], workspace};
    return l4convert::enqueue(launcher, moe_, sizes['T'], buffers);
  }

  // Kernels for few and for many tokens are different ones; where the border lies is launch.cpp's to know.
  std::vector<Sizes> probes() const override {
    std::vector<Sizes> probes;
    for (std::int64_t tokens = 1; tokens <= 16384; tokens *= 2) {
      Sizes sizes;
      sizes['T'] = tokens;
      probes.push_back(sizes);
    }
    return probes;
  }

 private:
  // One stack of weights [E, k, n] as a call has it: of the compute type, or packed with its scales.
  void add_weights(const char* name, const char* scale, std::int64_t k, std::int64_t n, std::int64_t block,
                   DataType compute) {
    const Extent experts = fixed(moe_.num_experts);
    if (moe_.weights == L4_WEIGHTS_PLAIN) {
      inputs_.push_back({name, compute, {experts, fixed(k), fixed(n)}});
      return;
    }
    const bool int4 = moe_.weights == L4_WEIGHTS_INT4;
    inputs_.push_back({name, int4 ? DataType::kINT32 : DataType::kINT64, {experts, fixed(n), fixed(k / kCodesPerWord)}});
    inputs_.push_back({scale, compute, {experts, fixed(int4 ? k / block : 1), fixed(n)}});
  }

  l4_moe moe_;
};

// LAYOUT of packed.py: how codes lie in words.
constexpr std::int32_t kLayout = 1;

Status make(const Fields& fields, std::shared_ptr<const Op>& op) {
  const std::string &compute = fields.text("compute"), &weights = fields.text("weights");
  const std::string& activations = fields.text("activations");
  if (compute != "bfloat16" && compute != "float16") return refused("compute", compute, "bfloat16, float16");
  if (weights != "" && weights != "int4" && weights != "fp8") return refused("weights", weights, "int4, fp8, or none");
  if (activations != "" && activations != "fp8") return refused("activations", activations, "fp8, or none");
  if ((weights == "fp8") != (activations == "fp8")) {
    return "FP8 weights and FP8 activations are computed together only: fields \"weights\" and \"activations\" differ";
  }
  if (weights != "" && fields.integer("layout") != kLayout) {
    return "field \"layout\" is " + std::to_string(fields.integer("layout")) + ", the kernels read words of layout " +
           std::to_string(kLayout) + ": convert again, or take the library of the release that converted";
  }
  l4_moe moe = {};
  moe.num_experts = fields.integer("num_experts");
  moe.hidden_size = fields.integer("hidden_size");
  moe.intermediate_size = fields.integer("intermediate_size");
  moe.top_k = fields.integer("top_k");
  moe.compute = compute == "bfloat16" ? L4_BFLOAT16 : L4_FLOAT16;
  moe.weights = weights == "" ? L4_WEIGHTS_PLAIN : weights == "int4" ? L4_WEIGHTS_INT4 : L4_WEIGHTS_FP8;
  moe.gate_up_block = fields.integer("gate_up_block");
  moe.down_block = fields.integer("down_block");
  const Status status = check(moe);
  if (status.empty()) op = std::make_shared<MoE>(moe);
  return status;
}

}  // namespace

const OpKind& moe_kind() {
  // As PackedMoESpec (packed.py) and MoESpec (definition.py) have them.
  static const OpKind kind = {"MoE",
                              "moe",
                              {{"num_experts", FieldKind::kInteger, true},
                               {"hidden_size", FieldKind::kInteger, true},
                               {"intermediate_size", FieldKind::kInteger, true},
                               {"top_k", FieldKind::kInteger, true},
                               {"activations", FieldKind::kText, false},
                               {"compute", FieldKind::kText, true},
                               {"weights", FieldKind::kText, false},
                               {"layout", FieldKind::kInteger, false},
                               {"gate_up_block", FieldKind::kInteger, false},
                               {"down_block", FieldKind::kInteger, false}},
                              make};
  return kind;
}

}  // namespace l4convert
