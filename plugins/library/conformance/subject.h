// One plugin under test, and the small things that all checks of it need.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "library.h"

namespace l4convert::conformance {

using PluginPointer = std::unique_ptr<nvinfer1::IPluginV3>;

// A plugin's three faces.
struct Faces {
  explicit Faces(nvinfer1::IPluginV3& plugin);
  nvinfer1::IPluginV3OneCore* core;
  nvinfer1::IPluginV3OneBuildV2* build;
  nvinfer1::IPluginV3OneRuntime* runtime;
};

PluginPointer create(const Library& library, const Case& given, Collection& fields,
                     nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD);
PluginPointer create(const Library& library, const Case& given, const Attributes& attributes);

// Tensors of a call in the two forms that TensorRT describes them in; inputs, then outputs.
std::vector<nvinfer1::PluginTensorDesc> describe(const Case& given, const Letters& sizes);
std::vector<nvinfer1::DynamicPluginTensorDesc> describe_range(const Case& given, const Letters& least,
                                                              const Letters& most);
// Calls a method that takes inputs and outputs apart.
std::int32_t shape_change(nvinfer1::IPluginV3& plugin, const Case& given,
                          const std::vector<nvinfer1::PluginTensorDesc>& tensors);

// Attributes of a plugin, read back from what it serializes.
Attributes serialized(nvinfer1::IPluginV3& plugin);

// Empty where `plugin` is null and the log has one line, an error, that has `word` in it; otherwise what is wrong.
std::string refusal(const Library& library, bool refused, const std::string& word);
// Empty where nothing was logged since the last look.
std::string silence(const Library& library);

}  // namespace l4convert::conformance
