#include "subject.h"

#include <cstring>

namespace l4convert::conformance {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;

Faces::Faces(IPluginV3& plugin)
    : core(static_cast<nvinfer1::IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE))),
      build(static_cast<nvinfer1::IPluginV3OneBuildV2*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD))),
      runtime(
          static_cast<nvinfer1::IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME))) {}

PluginPointer create(const Library& library, const Case& given, Collection& fields, nvinfer1::TensorRTPhase phase) {
  return PluginPointer(library.creator(given.plugin)->createPlugin("layer.7", fields.get(), phase));
}

PluginPointer create(const Library& library, const Case& given, const Attributes& attributes) {
  Collection fields(attributes);
  return create(library, given, fields);
}

std::vector<PluginTensorDesc> describe(const Case& given, const Letters& sizes) {
  std::vector<PluginTensorDesc> tensors;
  for (const auto* side : {&given.inputs, &given.outputs}) {
    for (const Expected& tensor : *side) {
      tensors.push_back({dims_of(tensor, sizes), tensor.type, nvinfer1::TensorFormat::kLINEAR, -1.0F});
    }
  }
  return tensors;
}

std::vector<DynamicPluginTensorDesc> describe_range(const Case& given, const Letters& least, const Letters& most) {
  Letters open;
  for (const auto& [letter, size] : most) open[letter] = least.at(letter) == size ? size : -1;
  const auto network = describe(given, open), low = describe(given, least), high = describe(given, most);
  std::vector<DynamicPluginTensorDesc> tensors;
  for (std::size_t i = 0; i < network.size(); ++i) {
    tensors.push_back({network[i], low[i].dims, high[i].dims, high[i].dims});
  }
  return tensors;
}

std::int32_t shape_change(IPluginV3& plugin, const Case& given, const std::vector<PluginTensorDesc>& tensors) {
  const auto inputs = static_cast<std::int32_t>(given.inputs.size());
  return Faces(plugin).runtime->onShapeChange(tensors.data(), inputs, tensors.data() + inputs,
                                              static_cast<std::int32_t>(given.outputs.size()));
}

Attributes serialized(IPluginV3& plugin) {
  Attributes attributes;
  const nvinfer1::PluginFieldCollection* fields = Faces(plugin).runtime->getFieldsToSerialize();
  for (std::int32_t i = 0; i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    std::int32_t integer = 0;
    float real = 0;
    switch (field.type) {
      case nvinfer1::PluginFieldType::kINT32:
        std::memcpy(&integer, field.data, sizeof integer);
        attributes.insert({field.name, integer});
        break;
      case nvinfer1::PluginFieldType::kFLOAT32:
        std::memcpy(&real, field.data, sizeof real);
        attributes.insert({field.name, real});
        break;
      default:  // what is of another type shows as a difference
        attributes.insert({field.name, static_cast<const char*>(field.data)});
    }
  }
  return attributes;
}

std::string refusal(const Library& library, bool refused, const std::string& word) {
  const auto lines = library.logger().take();
  if (!refused) return "was taken, and should be refused";
  if (lines.size() != 1) return "logs " + std::to_string(lines.size()) + " lines instead of one";
  const auto& [severity, line] = lines.front();
  if (severity != nvinfer1::ILogger::Severity::kERROR) return "is not logged as an error: " + line;
  if (line.find('\n') != std::string::npos) return "logs more than one line: " + line;
  return line.find(word) == std::string::npos ? "the message does not say " + word + ": " + line : "";
}

std::string silence(const Library& library) {
  const auto lines = library.logger().take();
  return lines.empty() ? "" : "logs: " + lines.front().second;
}

}  // namespace l4convert::conformance
