#include "call.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "checks.h"

namespace conformance = l4convert::conformance;

using conformance::Faces;
using conformance::Library;
using conformance::PluginPointer;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

struct l4_call {
  explicit l4_call(const char* path) : library(path) {}

  Library library;
  PluginPointer plugin;  // attached
  std::vector<PluginTensorDesc> inputs, outputs;
};

namespace {

// Throws what the plugin said, or `otherwise`.
[[noreturn]] void fail(const Library& library, const std::string& otherwise) {
  const auto lines = library.logger().take();
  throw std::runtime_error(lines.empty() ? otherwise : lines.front().second);
}

void require(const Library& library, bool done, const char* what) {
  if (!done) fail(library, std::string(what) + " fails, and the plugin gives no reason");
}

template <typename Result, typename Work>
Result guarded(char* why, Result failed, Work work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    std::snprintf(why, L4_WHY_BYTES, "%s", error.what());
    return failed;
  }
}

conformance::Attributes attributes_of(const l4_field* fields, std::int32_t count) {
  conformance::Attributes attributes;
  for (std::int32_t i = 0; i < count; ++i) {
    const l4_field& field = fields[i];
    if (field.kind == 'i') attributes.insert({field.name, field.integer});
    if (field.kind == 'f') attributes.insert({field.name, field.real});
    if (field.kind == 's') attributes.insert({field.name, field.text});
  }
  return attributes;
}

PluginTensorDesc describe(const Dims& dims, nvinfer1::DataType type) {
  return {dims, type, TensorFormat::kLINEAR, -1.0F};
}

Dims dims_of(const l4_tensor& tensor) {
  Dims dims = {};
  dims.nbDims = tensor.rank;
  std::copy_n(tensor.dims, L4_MOST_DIMS, dims.d);
  return dims;
}

// The type that the plugin takes at a place, found as TensorRT finds it: by asking.
void find_type(nvinfer1::IPluginV3OneBuildV2& build, std::vector<DynamicPluginTensorDesc>& tensors, std::size_t at,
               std::size_t inputs) {
  const auto outputs = static_cast<std::int32_t>(tensors.size() - inputs);
  for (int type = 0; type < nvinfer1::EnumMax<nvinfer1::DataType>(); ++type) {
    tensors[at].desc.type = static_cast<nvinfer1::DataType>(type);
    if (build.supportsFormatCombination(static_cast<std::int32_t>(at), tensors.data(),
                                        static_cast<std::int32_t>(inputs), outputs)) {
      return;
    }
  }
  throw std::runtime_error("the plugin takes no type for tensor " + std::to_string(at));
}

// Shapes of outputs, with numbers in place of expressions.
std::vector<Dims> output_shapes(const Library& library, nvinfer1::IPluginV3OneBuildV2& build,
                                const std::vector<Dims>& inputs) {
  conformance::Builder builder;
  std::vector<nvinfer1::DimsExprs> given, made(static_cast<std::size_t>(build.getNbOutputs()));
  for (const Dims& dims : inputs) {
    nvinfer1::DimsExprs expressions = {};
    for (std::int32_t i = 0; i < dims.nbDims; ++i) expressions.d[expressions.nbDims++] = builder.constant(dims.d[i]);
    given.push_back(expressions);
  }
  const std::int32_t code =
      build.getOutputShapes(given.data(), static_cast<std::int32_t>(given.size()), nullptr, 0, made.data(),
                            static_cast<std::int32_t>(made.size()), builder);
  require(library, code == 0, "getOutputShapes");
  std::vector<Dims> shapes;
  for (const nvinfer1::DimsExprs& each : made) {
    Dims dims = {};
    for (std::int32_t i = 0; i < each.nbDims; ++i) dims.d[dims.nbDims++] = each.d[i]->getConstantValue();
    shapes.push_back(dims);
  }
  return shapes;
}

// As the builder does: shapes, types, configuration, workspace; leaves the tensors' descriptions in the call.
std::size_t build_phase(l4_call& call, nvinfer1::IPluginV3& plugin, const std::vector<Dims>& shapes) {
  nvinfer1::IPluginV3OneBuildV2& build = *Faces(plugin).build;
  std::vector<DynamicPluginTensorDesc> tensors;
  auto add = [&](const std::vector<Dims>& all) {
    for (const Dims& dims : all) tensors.push_back({describe(dims, nvinfer1::DataType::kBOOL), dims, dims, dims});
  };
  add(shapes);
  add(output_shapes(call.library, build, shapes));
  for (std::size_t i = 0; i < tensors.size(); ++i) find_type(build, tensors, i, shapes.size());
  const auto in = static_cast<std::int32_t>(shapes.size());
  const auto out = static_cast<std::int32_t>(tensors.size() - shapes.size());
  require(call.library, build.configurePlugin(tensors.data(), in, tensors.data() + in, out) == 0, "configurePlugin");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    (i < shapes.size() ? call.inputs : call.outputs).push_back(tensors[i].desc);
  }
  return build.getWorkspaceSize(tensors.data(), in, tensors.data() + in, out);
}

// As a loaded engine does: made of what was serialized, attached to a context, told the shapes.
void load_phase(l4_call& call, nvinfer1::IPluginV3& built, nvinfer1::IPluginCreatorV3One& creator) {
  const nvinfer1::PluginFieldCollection* kept = Faces(built).runtime->getFieldsToSerialize();
  const PluginPointer loaded(creator.createPlugin("call", kept, nvinfer1::TensorRTPhase::kRUNTIME));
  require(call.library, loaded != nullptr, "createPlugin");
  conformance::ResourceContext context;
  call.plugin.reset(Faces(*loaded).runtime->attachToContext(&context));
  require(call.library, call.plugin != nullptr, "attachToContext");
  const std::int32_t code = Faces(*call.plugin)
                                .runtime->onShapeChange(call.inputs.data(), static_cast<std::int32_t>(call.inputs.size()),
                                                        call.outputs.data(),
                                                        static_cast<std::int32_t>(call.outputs.size()));
  require(call.library, code == 0, "onShapeChange");
}

void fill(l4_tensor& tensor, const PluginTensorDesc& description) {
  tensor.type = static_cast<std::int32_t>(description.type);
  tensor.rank = description.dims.nbDims;
  std::copy_n(description.dims.d, L4_MOST_DIMS, tensor.dims);
}

}  // namespace

#define L4_EXPORT extern "C" __attribute__((visibility("default")))

L4_EXPORT char* l4_conformance_run(const char* library) {
  return strdup(conformance::check_library(library).json(library).c_str());
}

L4_EXPORT void l4_conformance_free(char* text) { std::free(text); }

L4_EXPORT l4_call* l4_conformance_open(const char* library, const char* plugin, const l4_field* fields,
                                       std::int32_t field_count, l4_tensor* inputs, std::int32_t input_count,
                                       l4_tensor* outputs, std::int32_t output_room, std::int32_t* output_count,
                                       std::size_t* workspace, char* why) {
  return guarded(why, static_cast<l4_call*>(nullptr), [&] {
    auto call = std::make_unique<l4_call>(library);
    nvinfer1::IPluginCreatorV3One* creator = call->library.creator(plugin);
    if (creator == nullptr) throw std::runtime_error(std::string("the library has no plugin ") + plugin);
    conformance::Collection collection(attributes_of(fields, field_count));
    const PluginPointer built(creator->createPlugin("call", collection.get(), nvinfer1::TensorRTPhase::kBUILD));
    require(call->library, built != nullptr, "createPlugin");
    std::vector<Dims> shapes;
    for (std::int32_t i = 0; i < input_count; ++i) shapes.push_back(dims_of(inputs[i]));
    *workspace = build_phase(*call, *built, shapes);
    load_phase(*call, *built, *creator);
    *output_count = static_cast<std::int32_t>(call->outputs.size());
    if (*output_count > output_room) throw std::runtime_error("there are more outputs than room");
    for (std::int32_t i = 0; i < input_count; ++i) fill(inputs[i], call->inputs[static_cast<std::size_t>(i)]);
    for (std::int32_t i = 0; i < *output_count; ++i) fill(outputs[i], call->outputs[static_cast<std::size_t>(i)]);
    return call.release();
  });
}

L4_EXPORT std::int32_t l4_conformance_alias(l4_call* call, std::int32_t output) {
  return Faces(*call->plugin).build->getAliasedInput(output);
}

L4_EXPORT int l4_conformance_enqueue(l4_call* call, const void* const* inputs, void* const* outputs, void* workspace,
                                     void* stream, char* why) {
  return guarded(why, 1, [&] {
    const std::int32_t code =
        Faces(*call->plugin)
            .runtime->enqueue(call->inputs.data(), call->outputs.data(), inputs, outputs, workspace,
                              static_cast<cudaStream_t>(stream));
    require(call->library, code == 0, "enqueue");
    return 0;
  });
}

L4_EXPORT void l4_conformance_close(l4_call* call) { delete call; }
