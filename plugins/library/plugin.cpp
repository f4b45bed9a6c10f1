#include "plugin.h"

#include <algorithm>
#include <utility>

#include "driver.h"
#include "logging.h"
#include "support.h"

namespace l4convert {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginTensorDesc;
using Severity = nvinfer1::ILogger::Severity;

constexpr std::int32_t kFailed = 1;
// Multiprocessors that workspace is made for: an engine may be built where there is no GPU, or another one of its kind.
// No GPU has more (RTX PRO 6000 Blackwell: 188).
constexpr int kMostMultiprocessors = 192;

// A message that begins with the plugin's name, as those of the launch code may do by themselves.
std::string named(const char* plugin, const Status& status) {
  const std::string prefix = std::string(plugin) + ": ";
  return status.compare(0, prefix.size(), prefix) == 0 ? status : prefix + status;
}

// The symbol's numbers in shapes, the largest of each where tensors disagree: what TensorRT knows of the largest sizes
// of tensors between layers are bounds.
Sizes largest(const std::vector<Tensor>& tensors, const DynamicPluginTensorDesc* given) {
  Sizes sizes;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    for (std::size_t axis = 0; axis < tensors[i].dims.size(); ++axis) {
      char symbol = tensors[i].dims[axis].symbol;
      if (symbol != '\0') sizes[symbol] = std::max(sizes[symbol], given[i].max.d[axis]);
    }
  }
  return sizes;
}

template <typename Description, typename Get>
std::vector<Dims> shapes_of(const Description* descriptions, std::size_t count, Get get) {
  std::vector<Dims> shapes;
  for (std::size_t i = 0; i < count; ++i) shapes.push_back(get(descriptions[i]));
  return shapes;
}

// Where an output's extent of this symbol is found among the inputs.
const nvinfer1::IDimensionExpr* find_extent(const std::vector<Tensor>& inputs, const DimsExprs* given, char symbol) {
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    for (std::size_t axis = 0; axis < inputs[i].dims.size(); ++axis) {
      if (inputs[i].dims[axis].symbol == symbol) return given[i].d[axis];
    }
  }
  return nullptr;
}

}  // namespace

Plugin::Plugin(const OpKind& kind, Fields fields, std::shared_ptr<const Op> op)
    : kind_(kind),
      fields_(std::move(fields)),
      op_(std::move(op)),
      summary_(fields_.summary()),
      serialized_(fields_.serialized()),
      collection_{static_cast<std::int32_t>(serialized_.size()), serialized_.data()} {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* Plugin::clone() noexcept {
  return guarded(kind_.name, static_cast<Plugin*>(nullptr), [&] { return new Plugin(kind_, fields_, op_); });
}

std::int32_t Plugin::getOutputDataTypes(DataType* outputs, std::int32_t output_count, const DataType*,
                                        std::int32_t input_count) const noexcept {
  return guarded(kind_.name, kFailed, [&] {
    Status status = check_counts(input_count, output_count);
    if (!status.empty()) return done(status);
    for (std::size_t i = 0; i < op_->outputs().size(); ++i) outputs[i] = op_->outputs()[i].type;
    return 0;
  });
}

std::int32_t Plugin::getOutputShapes(const DimsExprs* inputs, std::int32_t input_count, const DimsExprs*,
                                     std::int32_t shape_input_count, DimsExprs* outputs, std::int32_t output_count,
                                     nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(kind_.name, kFailed, [&] {
    Status status = check_counts(input_count, output_count);
    if (status.empty() && shape_input_count != 0) status = "takes no shape inputs";
    for (std::size_t i = 0; status.empty() && i < op_->inputs().size(); ++i) {
      std::size_t rank = op_->inputs()[i].dims.size();
      if (inputs[i].nbDims != static_cast<std::int32_t>(rank)) {
        status = std::string(op_->inputs()[i].name) + " has " + std::to_string(inputs[i].nbDims) +
                 " dimensions instead of " + std::to_string(rank);
      }
    }
    if (!status.empty()) return done(status);
    for (std::size_t i = 0; i < op_->outputs().size(); ++i) {
      if (const int input = op_->aliased_input(static_cast<int>(i)); input >= 0) {
        outputs[i] = inputs[input];  // the very expressions: equal ones of other tensors may not be known to be equal
        continue;
      }
      const std::vector<Extent>& dims = op_->outputs()[i].dims;
      outputs[i].nbDims = static_cast<std::int32_t>(dims.size());
      for (std::size_t axis = 0; axis < dims.size(); ++axis) {
        outputs[i].d[axis] = dims[axis].symbol == '\0' ? builder.constant(dims[axis].fixed)
                                                       : find_extent(op_->inputs(), inputs, dims[axis].symbol);
      }
    }
    return 0;
  });
}

bool Plugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors,
                                       std::int32_t input_count, std::int32_t output_count) noexcept {
  return guarded(kind_.name, false, [&] {
    if (!check_counts(input_count, output_count).empty()) return false;
    if (position < 0 || position >= input_count + output_count) return false;
    auto index = static_cast<std::size_t>(position);
    std::size_t count = op_->inputs().size();
    const Tensor& tensor = index < count ? op_->inputs()[index] : op_->outputs()[index - count];
    const PluginTensorDesc& given = tensors[index].desc;
    return given.type == tensor.type && given.format == nvinfer1::TensorFormat::kLINEAR;
  });
}

std::int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                     const DynamicPluginTensorDesc* outputs, std::int32_t output_count) noexcept {
  return guarded(kind_.name, kFailed, [&] {
    auto network = [](const DynamicPluginTensorDesc& given) { return given.desc.dims; };
    auto most = [](const DynamicPluginTensorDesc& given) { return given.max; };
    Status status = check_counts(input_count, output_count);
    Sizes ignored;
    std::size_t in = op_->inputs().size(), out = op_->outputs().size();
    if (status.empty()) status = match_shapes(op_->inputs(), shapes_of(inputs, in, network), true, ignored);
    if (status.empty()) status = match_shapes(op_->outputs(), shapes_of(outputs, out, network), true, ignored);
    if (status.empty()) status = match_shapes(op_->inputs(), shapes_of(inputs, in, most), true, ignored);
    return done(status);
  });
}

std::size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                     const DynamicPluginTensorDesc*, std::int32_t output_count) const noexcept {
  return guarded(kind_.name, std::size_t{0}, [&]() -> std::size_t {
    Status status = check_counts(input_count, output_count);
    if (!status.empty()) return done(status), 0;
    return op_->workspace(largest(op_->inputs(), inputs), kMostMultiprocessors);
  });
}

std::int32_t Plugin::getAliasedInput(std::int32_t output) noexcept { return op_->aliased_input(output); }

std::int32_t Plugin::onShapeChange(const PluginTensorDesc* inputs, std::int32_t input_count,
                                   const PluginTensorDesc* outputs, std::int32_t output_count) noexcept {
  return guarded(kind_.name, kFailed, [&] {
    Sizes sizes;
    Status status = check_counts(input_count, output_count);
    return done(status.empty() ? sizes_of(inputs, outputs, sizes) : status);
  });
}

std::int32_t Plugin::enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc* output_descriptions,
                             const void* const* inputs, void* const* outputs, void* workspace,
                             cudaStream_t stream) noexcept {
  return guarded(kind_.name, kFailed, [&] {
    Sizes sizes;
    Status status = sizes_of(input_descriptions, output_descriptions, sizes);
    if (!status.empty()) return done(status);
    DriverLauncher launcher(stream);
    return done(launcher.ready().empty() ? op_->enqueue(launcher, sizes, inputs, outputs, workspace)
                                         : launcher.ready());
  });
}

IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return guarded(kind_.name, static_cast<IPluginV3*>(nullptr), [&]() -> IPluginV3* {
    // Kernels are loaded now: while a stream is captured as a CUDA graph nothing can be.
    DriverLauncher launcher(nullptr);
    Status status = launcher.ready().empty() ? launcher.preload(kind_.folder) : Status();
    return status.empty() ? clone() : (done(status), nullptr);
  });
}

Status Plugin::check_counts(std::int32_t inputs, std::int32_t outputs) const {
  auto wanted = [](const std::vector<Tensor>& tensors) { return static_cast<std::int32_t>(tensors.size()); };
  if (inputs == wanted(op_->inputs()) && outputs == wanted(op_->outputs())) return {};
  return "has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs; with these fields " +
         std::to_string(wanted(op_->inputs())) + " and " + std::to_string(wanted(op_->outputs())) + " are needed";
}

Status Plugin::sizes_of(const PluginTensorDesc* inputs, const PluginTensorDesc* outputs, Sizes& sizes) const {
  auto dims = [](const PluginTensorDesc& given) { return given.dims; };
  Status status = match_shapes(op_->inputs(), shapes_of(inputs, op_->inputs().size(), dims), false, sizes);
  if (!status.empty()) return status;
  status = match_shapes(op_->outputs(), shapes_of(outputs, op_->outputs().size(), dims), false, sizes);
  return status.empty() ? op_->check(sizes) : status;
}

std::int32_t Plugin::done(const Status& status) const noexcept {
  if (status.empty()) return 0;
  report(Severity::kERROR, named(kind_.name, status));
  return kFailed;
}

Creator::Creator(const OpKind& kind)
    : kind_(kind),
      names_(field_names(kind.fields)),
      collection_{static_cast<std::int32_t>(names_.size()), names_.data()} {}

IPluginV3* Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                 nvinfer1::TensorRTPhase phase) noexcept {
  return guarded(kind_.name, static_cast<IPluginV3*>(nullptr), [&]() -> IPluginV3* {
    std::unique_ptr<Plugin> plugin;
    Status status = create(fields, phase, plugin);
    if (status.empty()) return plugin.release();
    const bool unnamed = name == nullptr || *name == '\0';
    report(Severity::kERROR, (unnamed ? "" : std::string(name) + ": ") + named(kind_.name, status));
    return nullptr;
  });
}

Status Creator::create(const nvinfer1::PluginFieldCollection* given, nvinfer1::TensorRTPhase phase,
                       std::unique_ptr<Plugin>& plugin) const {
  bool runtime = phase == nvinfer1::TensorRTPhase::kRUNTIME;
  std::vector<FieldRule> rules = kind_.fields;
  if (runtime) rules.push_back({kSerializationField, FieldKind::kInteger, true});
  Fields fields;
  std::shared_ptr<const Op> op;
  Status status = make_op(kind_, given, rules, device_sm(), fields, op);
  if (status.empty() && runtime && fields.integer(kSerializationField) != kSerialization) {
    status = "the engine's fields are of version " + std::to_string(fields.integer(kSerializationField)) +
             ", this library reads version " + std::to_string(kSerialization) + ": build the engine again";
  }
  if (!status.empty()) return status;
  fields.set(kSerializationField, kSerialization);
  plugin = std::make_unique<Plugin>(kind_, std::move(fields), std::move(op));
  return status;
}

}  // namespace l4convert
