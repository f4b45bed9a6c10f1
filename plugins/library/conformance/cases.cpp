#include "cases.h"

#include <cstdlib>

namespace l4convert::conformance {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

std::string number(std::int64_t value) { return std::to_string(value); }

struct Experts {
  const char* name;
  const char* compute;
  const char* weights;
  int gate_up_block, down_block;
};

Case experts_case(const Experts& given) {
  constexpr int kExperts = 4, kHidden = 128, kWide = 256;
  const std::string weights = given.weights;
  const bool packed = !weights.empty(), int4 = weights == "int4";
  const DataType compute = std::string(given.compute) == "bfloat16" ? DataType::kBF16 : DataType::kHALF;
  Case made;
  made.name = given.name, made.plugin = "MoE";
  made.attributes = {{"num_experts", kExperts},       {"hidden_size", kHidden},
                     {"intermediate_size", kWide},    {"top_k", 1},
                     {"compute", given.compute},      {"activations", weights == "fp8" ? "fp8" : ""}};
  if (packed) {
    made.attributes.insert({"weights", given.weights});
    made.attributes.insert({"layout", 1});
    made.attributes.insert({"gate_up_block", given.gate_up_block});
    made.attributes.insert({"down_block", given.down_block});
  }
  made.inputs = {{"x", compute, {"T", number(kHidden)}}, {"router_logits", DataType::kFLOAT, {"T", number(kExperts)}}};
  auto add = [&](const char* name, int k, int n, int block) {
    const std::string e = number(kExperts);
    if (!packed) {
      made.inputs.push_back({name, compute, {e, number(k), number(n)}});
      return;
    }
    made.inputs.push_back({name, int4 ? DataType::kINT32 : DataType::kINT64, {e, number(n), number(k / 8)}});
    made.inputs.push_back({std::string(name) + "_scale", compute, {e, number(int4 ? k / block : 1), number(n)}});
  };
  add("gate_up", kHidden, 2 * kWide, given.gate_up_block);
  add("down", kWide, kHidden, given.down_block);
  made.outputs = {{"y", compute, {"T", number(kHidden)}}};
  made.sizes = {{"T", 5}};
  made.refused = {{"compute", "float32", "float32"}, {"compute", "", "compute"},
                  {"weights", "int3", "int3"},       {"activations", "int8", "int8"},
                  {"top_k", 0, "top_k"},             {"top_k", kExperts + 1, "top_k"},
                  {"num_experts", 0, "expert"},      {"hidden_size", -64, "hidden"},
                  {"activations", weights == "fp8" ? "" : "fp8", "FP8"}};
  if (packed) made.refused.push_back({"gate_up_block", 48, "block"});
  if (packed) made.refused.push_back({"layout", 2, "layout"});
  return made;
}

struct Attention {
  const char* name;
  const char* compute;
  const char* kv_dtype;
  bool chunked;
};

Case attention_case(const Attention& given, int head_dim) {
  constexpr int kHeads = 10, kKvHeads = 2, kChunk = 64;
  const std::string kv_dtype = given.kv_dtype;
  const DataType compute = std::string(given.compute) == "bfloat16" ? DataType::kBF16 : DataType::kHALF;
  const DataType stored = kv_dtype == "fp8" ? DataType::kFP8 : kv_dtype == "int8" ? DataType::kINT8 : compute;
  const std::string queries = number(kHeads * head_dim), keys = number(kKvHeads * head_dim);
  Case made;
  made.name = given.name, made.plugin = "LongContextAttention";
  made.attributes = {{"num_heads", kHeads},
                     {"kv_num_heads", kKvHeads},
                     {"head_dim", head_dim},
                     {"chunk_size", given.chunked ? kChunk : 0},
                     {"rope", given.chunked ? 1 : 0},
                     {"qk_norm_eps", given.chunked ? 1e-5F : 0.0F},
                     {"floor_scale", 8192.0F},
                     {"attn_scale", given.chunked ? 0.0F : 0.1F},
                     {"kv_cache", "static"},
                     {"compute", given.compute},
                     {"kv_dtype", given.kv_dtype}};
  const std::vector<std::string> cache = {"B", number(kKvHeads), "M", number(head_dim)};
  made.inputs = {{"query", compute, {"B", "S", queries}}, {"key", compute, {"B", "S", keys}},
                 {"value", compute, {"B", "S", keys}},    {"past_key", stored, cache},
                 {"past_value", stored, cache},           {"positions", DataType::kINT64, {"B", "T"}}};
  const std::int64_t slots = given.chunked ? kChunk : 200;
  made.sizes = {{"B", 2}, {"S", 3}, {"T", 200}, {"M", slots}};
  made.impossible = {{{"S", 201}}, {{"M", slots - 1}}};
  if (given.chunked) {
    for (const char* name : {"cos", "sin"}) {
      made.inputs.push_back({name, DataType::kFLOAT, {"R", number(head_dim / 2)}});
    }
    made.sizes["R"] = kChunk;
    made.impossible.push_back({{"R", kChunk - 1}});
  }
  if (kv_dtype != "none") {
    for (const char* name : {"key_scale", "value_scale"}) {
      made.inputs.push_back({name, DataType::kFLOAT, {"1", number(kKvHeads), "1", number(head_dim)}});
    }
  }
  made.outputs = {{"attention", compute, {"B", "S", queries}},
                  {"present_key", stored, cache},
                  {"present_value", stored, cache}};
  made.aliases = {{1, 3}, {2, 4}};
  made.refused = {{"compute", "float32", "float32"}, {"kv_cache", "growing", "growing"},
                  {"kv_dtype", "int4", "int4"},      {"rope", 2, "rope"},
                  {"num_heads", kHeads + 1, "heads"}, {"kv_num_heads", 0, "heads"},
                  {"head_dim", 8 * 4096 + 8, "head"}, {"chunk_size", -1, "chunk"}};
  return made;
}

}  // namespace

Collection::Collection(const Attributes& attributes) {
  for (const auto& [name, value] : attributes) {
    switch (value.kind) {
      case Attribute::Kind::kInteger:
        add(name, &value.integer, PluginFieldType::kINT32, 1, sizeof value.integer);
        break;
      case Attribute::Kind::kReal:
        add(name, &value.real, PluginFieldType::kFLOAT32, 1, sizeof value.real);
        break;
      case Attribute::Kind::kText:
        add(name, value.text.c_str(), PluginFieldType::kCHAR, static_cast<std::int32_t>(value.text.size() + 1),
            value.text.size() + 1);
        break;
    }
  }
}

void Collection::add(const std::string& name, const void* data, PluginFieldType type, std::int32_t length,
                     std::size_t bytes) {
  const char* kept_name = kept_.emplace_back(name).c_str();
  const char* kept_data = kept_.emplace_back(static_cast<const char*>(data), bytes).data();
  fields.emplace_back(kept_name, kept_data, type, length);
}

const nvinfer1::PluginFieldCollection* Collection::get() {
  collection_ = {static_cast<std::int32_t>(fields.size()), fields.data()};
  return &collection_;
}

nvinfer1::Dims dims_of(const Expected& tensor, const Letters& sizes) {
  nvinfer1::Dims dims = {};
  dims.nbDims = static_cast<std::int32_t>(tensor.dims.size());
  for (std::size_t i = 0; i < tensor.dims.size(); ++i) {
    const auto letter = sizes.find(tensor.dims[i]);
    dims.d[i] = letter == sizes.end() ? std::atoll(tensor.dims[i].c_str()) : letter->second;
  }
  return dims;
}

std::vector<Case> cases(int head_dim) {
  const Experts experts[] = {{"experts of 16 bits", "bfloat16", "", 0, 0},
                             {"experts of 16 bits, float16", "float16", "", 0, 0},
                             {"INT4 experts, blocks of 32", "float16", "int4", 32, 32},
                             {"INT4 experts, blocks of 128", "bfloat16", "int4", 128, 128},
                             {"INT4 experts, blocks of 64 and 32", "bfloat16", "int4", 64, 32},
                             {"FP8 experts", "bfloat16", "fp8", 128, 256}};
  const Attention attention[] = {{"chunked layer", "bfloat16", "none", true},
                                 {"chunked layer, float16", "float16", "none", true},
                                 {"chunked layer, FP8 caches", "bfloat16", "fp8", true},
                                 {"global layer", "bfloat16", "none", false},
                                 {"global layer, INT8 caches", "float16", "int8", false}};
  std::vector<Case> all;
  for (const Experts& each : experts) all.push_back(experts_case(each));
  for (const Attention& each : attention) all.push_back(attention_case(each, head_dim));
  return all;
}

}  // namespace l4convert::conformance
