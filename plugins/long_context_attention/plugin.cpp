#include "plugin.h"

#include "../moe/launch.h"

namespace l4convert {
namespace {

using nvinfer1::DataType;

DataType cache_type(const l4_attention& attention, DataType compute) {
  return attention.kv_dtype == L4_KV_FP8    ? DataType::kFP8
         : attention.kv_dtype == L4_KV_INT8 ? DataType::kINT8
                                            : compute;
}

class LongContextAttention final : public Op {
 public:
  explicit LongContextAttention(const l4_attention& attention) : attention_(attention) {
    const DataType compute = attention.compute == L4_BFLOAT16 ? DataType::kBF16 : DataType::kHALF;
    const DataType stored = cache_type(attention, compute);
    const std::int64_t dim = attention.head_dim, heads = attention.num_heads, kv_heads = attention.kv_num_heads;
    const std::vector<Extent> queries = {free('B'), free('S'), fixed(heads * dim)};
    const std::vector<Extent> keys = {free('B'), free('S'), fixed(kv_heads * dim)};
    const std::vector<Extent> cache = {free('B'), fixed(kv_heads), free('M'), fixed(dim)};
    inputs_ = {{"query", compute, queries},      {"key", compute, keys},
               {"value", compute, keys},         {"past_key", stored, cache},
               {"past_value", stored, cache},    {"positions", DataType::kINT64, {free('B'), free('T')}}};
    if (attention.rope) {
      for (const char* name : {"cos", "sin"}) {
        inputs_.push_back({name, DataType::kFLOAT, {free('R'), fixed(dim / 2)}});
      }
    }
    if (attention.kv_dtype != L4_KV_NONE) {
      for (const char* name : {"key_scale", "value_scale"}) {
        inputs_.push_back({name, DataType::kFLOAT, {fixed(1), fixed(kv_heads), fixed(1), fixed(dim)}});
      }
    }
    outputs_ = {{"attention", compute, queries}, {"present_key", stored, cache}, {"present_value", stored, cache}};
  }

  int aliased_input(int output) const override { return output == 1 ? 3 : output == 2 ? 4 : -1; }

  Status check(const Sizes& sizes) const override { return l4convert::check(attention_, shape_of(sizes)); }

  std::size_t workspace(const Sizes& most, int multiprocessors) const override {
    return workspace_bytes(attention_, shape_of(most), multiprocessors);
  }

  Status enqueue(Launcher& launcher, const Sizes& sizes, const void* const* inputs, void* const* outputs,
                 void* workspace) const override {
    const void* const* next = inputs + 6;
    auto take = [&](bool given) { return given ? *next++ : nullptr; };
    l4_attention_buffers buffers = {};
    buffers.query = inputs[0], buffers.key = inputs[1], buffers.value = inputs[2];
    buffers.past_key = inputs[3], buffers.past_value = inputs[4], buffers.positions = inputs[5];
    buffers.cos = take(attention_.rope != 0), buffers.sin = take(attention_.rope != 0);
    buffers.key_scale = take(attention_.kv_dtype != L4_KV_NONE);
    buffers.value_scale = take(attention_.kv_dtype != L4_KV_NONE);
    buffers.attention = outputs[0], buffers.present_key = outputs[1], buffers.present_value = outputs[2];
    buffers.workspace = workspace;
    return l4convert::enqueue(launcher, attention_, shape_of(sizes), buffers);
  }

  std::vector<Sizes> probes() const override {
    std::vector<Sizes> probes;
    for (std::int64_t new_tokens : {1, 2, 16, 128, 4096}) {
      for (std::int64_t seen : {4096, 1 << 20}) {  // short texts need no second pass over parts of them
        Sizes sizes;
        sizes['B'] = 1, sizes['S'] = new_tokens, sizes['T'] = seen, sizes['M'] = seen, sizes['R'] = seen;
        probes.push_back(sizes);
      }
    }
    return probes;
  }

 private:
  l4_attention_shape shape_of(const Sizes& sizes) const {
    return {sizes['B'], sizes['S'], sizes['T'], sizes['M'], attention_.rope ? sizes['R'] : 0};
  }

  l4_attention attention_;
};

Status make(const Fields& fields, std::shared_ptr<const Op>& op) {
  const std::string &compute = fields.text("compute"), &kv_dtype = fields.text("kv_dtype");
  if (compute != "bfloat16" && compute != "float16") return refused("compute", compute, "bfloat16, float16");
  if (fields.text("kv_cache") != "static") return refused("kv_cache", fields.text("kv_cache"), "static");
  if (kv_dtype != "none" && kv_dtype != "fp8" && kv_dtype != "int8") {
    return refused("kv_dtype", kv_dtype, "none, fp8, int8");
  }
  if (fields.integer("rope") != 0 && fields.integer("rope") != 1) return "field \"rope\" is neither 0 nor 1";
  l4_attention attention = {};
  attention.num_heads = fields.integer("num_heads");
  attention.kv_num_heads = fields.integer("kv_num_heads");
  attention.head_dim = fields.integer("head_dim");
  attention.chunk_size = fields.integer("chunk_size");
  attention.rope = fields.integer("rope");
  attention.qk_norm_eps = fields.real("qk_norm_eps");
  attention.floor_scale = fields.real("floor_scale");
  attention.attn_scale = fields.real("attn_scale");
  attention.compute = compute == "bfloat16" ? L4_BFLOAT16 : L4_FLOAT16;
  attention.kv_dtype = kv_dtype == "none" ? L4_KV_NONE : kv_dtype == "fp8" ? L4_KV_FP8 : L4_KV_INT8;
  const Status status = check(attention);
  if (status.empty()) op = std::make_shared<LongContextAttention>(attention);
  return status;
}

}  // namespace

const OpKind& attention_kind() {
  // As AttentionSpec (definition.py) has them.
  static const OpKind kind = {"LongContextAttention",
                              "long_context_attention",
                              {{"num_heads", FieldKind::kInteger, true},
                               {"kv_num_heads", FieldKind::kInteger, true},
                               {"head_dim", FieldKind::kInteger, true},
                               {"chunk_size", FieldKind::kInteger, true},
                               {"rope", FieldKind::kInteger, true},
                               {"qk_norm_eps", FieldKind::kReal, true},
                               {"floor_scale", FieldKind::kReal, true},
                               {"attn_scale", FieldKind::kReal, true},
                               {"kv_cache", FieldKind::kText, true},
                               {"compute", FieldKind::kText, true},
                               {"kv_dtype", FieldKind::kText, true}},
                              make};
  return kind;
}

}  // namespace l4convert
