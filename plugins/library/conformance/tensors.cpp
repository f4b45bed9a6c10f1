#include <algorithm>

#include "checks.h"

namespace l4convert::conformance {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int kTypes = nvinfer1::EnumMax<DataType>(), kFormats = nvinfer1::EnumMax<TensorFormat>();

std::int32_t count(const std::vector<Expected>& tensors) { return static_cast<std::int32_t>(tensors.size()); }

std::string types(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  nvinfer1::IPluginV3OneBuildV2& build = *Faces(*plugin).build;
  if (build.getNbOutputs() != count(given.outputs)) return "has another number of outputs";
  std::vector<DataType> inputs, outputs(given.outputs.size(), DataType::kBOOL);
  for (const Expected& tensor : given.inputs) inputs.push_back(tensor.type);
  if (build.getOutputDataTypes(outputs.data(), count(given.outputs), inputs.data(), count(given.inputs)) != 0) {
    return "fails: " + silence(library);
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i] != given.outputs[i].type) return given.outputs[i].name + " is of another type";
  }
  const std::int32_t code =
      build.getOutputDataTypes(outputs.data(), count(given.outputs), inputs.data(), count(given.inputs) - 1);
  return refusal(library, code != 0, "inputs");
}

std::string shapes(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  nvinfer1::IPluginV3OneBuildV2& build = *Faces(*plugin).build;
  Builder expressions;
  std::vector<DimsExprs> inputs, outputs(given.outputs.size());
  for (const Expected& tensor : given.inputs) {
    DimsExprs dims = {};
    for (const std::string& dim : tensor.dims) dims.d[dims.nbDims++] = expressions.named(dim);
    inputs.push_back(dims);
  }
  auto ask = [&](std::int32_t shape_inputs) {
    return build.getOutputShapes(inputs.data(), count(given.inputs), nullptr, shape_inputs, outputs.data(),
                                 count(given.outputs), expressions);
  };
  if (ask(0) != 0) return "fails: " + silence(library);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const Expected& wanted = given.outputs[i];
    if (outputs[i].nbDims != static_cast<std::int32_t>(wanted.dims.size())) return wanted.name + " has another rank";
    for (std::size_t axis = 0; axis < wanted.dims.size(); ++axis) {
      const auto* found = static_cast<const Expression*>(outputs[i].d[axis]);
      if (found == nullptr || found->text() != wanted.dims[axis]) {
        return wanted.name + ": dimension " + std::to_string(axis) + " is " +
               (found == nullptr ? "none" : found->text()) + " instead of " + wanted.dims[axis];
      }
      const auto alias = given.aliases.find(static_cast<int>(i));
      if (alias != given.aliases.end() && found != inputs[static_cast<std::size_t>(alias->second)].d[axis]) {
        return wanted.name + ": dimension " + std::to_string(axis) + " is not that of the cache it is written into";
      }
    }
  }
  if (std::string wrong = refusal(library, ask(1) != 0, "shape inputs"); !wrong.empty()) return wrong;
  inputs[0].nbDims += 1;
  return refusal(library, ask(0) != 0, given.inputs[0].name);
}

// Every type and format in every place, what comes before it being right: one of them is taken, no other.
std::string formats(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  nvinfer1::IPluginV3OneBuildV2& build = *Faces(*plugin).build;
  const auto right = describe_range(given, given.sizes, given.sizes);
  const std::int32_t in = count(given.inputs), out = count(given.outputs);
  for (std::int32_t at = 0; at < in + out; ++at) {
    auto tensors = right;
    for (auto later = tensors.begin() + at + 1; later != tensors.end(); ++later) later->desc.type = DataType::kBOOL;
    for (int type = 0; type < kTypes; ++type) {
      for (int format = 0; format < kFormats; ++format) {
        PluginTensorDesc& tensor = tensors[static_cast<std::size_t>(at)].desc;
        tensor.type = static_cast<DataType>(type), tensor.format = static_cast<TensorFormat>(format);
        const bool legal = tensor.type == right[static_cast<std::size_t>(at)].desc.type &&
                           tensor.format == TensorFormat::kLINEAR;
        if (build.supportsFormatCombination(at, tensors.data(), in, out) == legal) continue;
        return "tensor " + std::to_string(at) + " of type " + std::to_string(type) + " and format " +
               std::to_string(format) + (legal ? " is refused" : " is taken");
      }
    }
  }
  for (const std::int32_t outside : {-1, in + out}) {
    if (build.supportsFormatCombination(outside, right.data(), in, out)) return "takes a tensor that there is not";
  }
  if (build.supportsFormatCombination(0, right.data(), in - 1, out)) return "takes a tensor less";
  return silence(library);
}

std::int32_t configure(nvinfer1::IPluginV3& plugin, const Case& given,
                       const std::vector<DynamicPluginTensorDesc>& tensors) {
  return Faces(plugin).build->configurePlugin(tensors.data(), count(given.inputs),
                                              tensors.data() + given.inputs.size(), count(given.outputs));
}

Letters ones(const Case& given) {
  Letters least = given.sizes;
  for (auto& [letter, size] : least) size = letter == "M" || letter == "R" ? size : 1;
  return least;
}

std::string configuration(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  const auto right = describe_range(given, ones(given), given.sizes);
  if (configure(*plugin, given, right) != 0) return "is refused: " + silence(library);
  for (std::size_t i = 0; i < right.size(); ++i) {
    const Expected& tensor = i < given.inputs.size() ? given.inputs[i] : given.outputs[i - given.inputs.size()];
    auto wrong = right;
    wrong[i].desc.dims.nbDims -= 1;
    wrong[i].max.nbDims -= 1;
    if (std::string text = refusal(library, configure(*plugin, given, wrong) != 0, tensor.name); !text.empty()) {
      return "rank of " + text;
    }
    for (std::size_t axis = 0; axis < tensor.dims.size(); ++axis) {
      if (given.sizes.count(tensor.dims[axis]) != 0) continue;  // any number will do
      wrong = right;
      wrong[i].desc.dims.d[axis] += 8;
      if (std::string text = refusal(library, configure(*plugin, given, wrong) != 0, tensor.name); !text.empty()) {
        return tensor.name + ": " + text;
      }
    }
  }
  return silence(library);
}

std::size_t workspace(nvinfer1::IPluginV3& plugin, const Case& given, const Letters& most) {
  const auto tensors = describe_range(given, given.sizes, most);
  return Faces(plugin).build->getWorkspaceSize(tensors.data(), count(given.inputs),
                                               tensors.data() + given.inputs.size(), count(given.outputs));
}

// What was reserved for the largest call must do for every smaller one, and no size may overflow 32 bits.
std::string workspaces(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  for (const auto& [letter, size] : given.sizes) {
    if (letter == "R") continue;
    Letters sizes = given.sizes;
    if (letter == "S") sizes["T"] = 1 << 20, sizes["M"] = std::max(sizes["M"], std::int64_t{1 << 20});
    std::size_t before = 0, first = 0;
    for (std::int64_t each = 1; each <= 4096; each += 1 + each / 3) {
      sizes[letter] = each;
      const std::size_t bytes = workspace(*plugin, given, sizes);
      if (bytes < before) return "shrinks when " + letter + " grows to " + std::to_string(each);
      before = bytes;
      if (each == 1) first = bytes;
    }
    if (letter == (given.plugin == "MoE" ? "T" : "S") && before == first) return "is the same for any " + letter;
  }
  Letters large = given.sizes;
  for (auto& [letter, size] : large) size = letter == "B" ? 64 : 1 << 20;
  const std::size_t bytes = workspace(*plugin, given, large);
  if (bytes < workspace(*plugin, given, given.sizes)) return "overflows: " + std::to_string(bytes) + " bytes";
  return silence(library);
}

std::string aliases(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  for (int output = 0; output < count(given.outputs); ++output) {
    const auto found = given.aliases.find(output);
    const int wanted = found == given.aliases.end() ? -1 : found->second;
    const int input = Faces(*plugin).build->getAliasedInput(output);
    if (input != wanted) return "output " + std::to_string(output) + " is input " + std::to_string(input);
  }
  return silence(library);
}

bool stands_once(const Case& given, const std::string& letter) {
  int found = 0;
  for (const auto* side : {&given.inputs, &given.outputs}) {
    for (const Expected& tensor : *side) {
      for (const std::string& dim : tensor.dims) found += given.sizes.count(letter) != 0 && dim == letter ? 1 : 0;
    }
  }
  return found == 1;
}

std::string shape_changes(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  const auto right = describe(given, given.sizes);
  if (shape_change(*plugin, given, right) != 0) return "is refused: " + silence(library);
  for (std::size_t i = 0; i < right.size(); ++i) {
    const Expected& tensor = i < given.inputs.size() ? given.inputs[i] : given.outputs[i - given.inputs.size()];
    for (std::int32_t axis = 0; axis < right[i].dims.nbDims; ++axis) {
      const std::string& dim = tensor.dims[static_cast<std::size_t>(axis)];
      if (stands_once(given, dim)) continue;  // and may be any number
      auto wrong = right;
      wrong[i].dims.d[axis] += 1;
      if (shape_change(*plugin, given, wrong) == 0) return tensor.name + ": another " + dim + " is taken";
      library.logger().take();
    }
  }
  for (const Letters& change : given.impossible) {
    Letters sizes = given.sizes;
    for (const auto& [letter, size] : change) sizes[letter] = size;
    const bool refused = shape_change(*plugin, given, describe(given, sizes)) != 0;
    if (std::string wrong = refusal(library, refused, ""); !wrong.empty()) return change.begin()->first + ": " + wrong;
  }
  return shape_change(*plugin, given, right) == 0 ? silence(library) : "is refused later";
}

// Without a device a call fails, and says so; with one, enqueue.cpp runs it on real buffers.
std::string no_device(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  auto tensors = describe(given, given.sizes);
  const std::vector<void*> addresses(tensors.size(), nullptr);
  tensors[0].dims.d[0] += 1;  // found before anything is launched, so that this holds where there is a device, too
  const std::int32_t code =
      Faces(*plugin).runtime->enqueue(tensors.data(), tensors.data() + given.inputs.size(), addresses.data(),
                                      addresses.data() + given.inputs.size(), nullptr, nullptr);
  return refusal(library, code != 0, given.plugin);
}

}  // namespace

void check_tensors(const Library& library, const Case& given, Report& report) {
  struct Entry {
    const char* name;
    std::string (*run)(const Library&, const Case&);
  };
  const Entry entries[] = {{"types of outputs", types},
                           {"shapes of outputs, as expressions", shapes},
                           {"formats: every type and layout", formats},
                           {"configuration", configuration},
                           {"workspace grows with sizes", workspaces},
                           {"aliased caches", aliases},
                           {"shape changes", shape_changes},
                           {"enqueue fails in one line", no_device}};
  for (const Entry& entry : entries) {
    library.logger().take();
    report.add(given.name, entry.name, entry.run(library, given));
  }
}

}  // namespace l4convert::conformance
