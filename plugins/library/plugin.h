// TensorRT's IPluginV3 for any op of the library, and the creators that TensorRT finds them by.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "op.h"

namespace l4convert {

// Of the plugins, as ONNX nodes may ask for with plugin_version; their namespace is "".
constexpr const char kPluginVersion[] = "1";
// Of the fields that an engine keeps. A library reads engines of its own number only.
constexpr std::int32_t kSerialization = 1;
// Name of the field that holds it.
constexpr const char kSerializationField[] = "serialization";

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const OpKind& kind, Fields fields, std::shared_ptr<const Op> op);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return ""; }

  std::int32_t getNbOutputs() const noexcept override { return static_cast<std::int32_t>(op_->outputs().size()); }
  std::int32_t getOutputDataTypes(nvinfer1::DataType* outputs, std::int32_t output_count,
                                  const nvinfer1::DataType* inputs, std::int32_t input_count) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                               const nvinfer1::DimsExprs* shape_inputs, std::int32_t shape_input_count,
                               nvinfer1::DimsExprs* outputs, std::int32_t output_count,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 std::int32_t input_count, std::int32_t output_count) noexcept override;
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs,
                               std::int32_t output_count) noexcept override;
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs,
                               std::int32_t output_count) const noexcept override;
  std::int32_t getAliasedInput(std::int32_t output) noexcept override;
  const char* getTimingCacheID() noexcept override { return summary_.c_str(); }
  const char* getMetadataString() noexcept override { return summary_.c_str(); }

  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count,
                             const nvinfer1::PluginTensorDesc* outputs, std::int32_t output_count) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                       const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                       void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  Status check_counts(std::int32_t inputs, std::int32_t outputs) const;
  Status sizes_of(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                  Sizes& sizes) const;
  // What a method returns: a status that is not empty goes to the log.
  std::int32_t done(const Status& status) const noexcept;

  const OpKind& kind_;
  Fields fields_;
  std::shared_ptr<const Op> op_;
  std::string summary_;
  std::vector<nvinfer1::PluginField> serialized_;
  nvinfer1::PluginFieldCollection collection_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const OpKind& kind);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return ""; }

 private:
  Status create(const nvinfer1::PluginFieldCollection* given, nvinfer1::TensorRTPhase phase,
                std::unique_ptr<Plugin>& plugin) const;

  const OpKind& kind_;
  std::vector<nvinfer1::PluginField> names_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace l4convert
