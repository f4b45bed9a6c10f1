// What TensorRT hands to a plugin, played without TensorRT.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace l4convert::conformance {

// A dimension known by its text: "7", or the name of an input's dimension, or an operation on others.
class Expression final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Expression(std::string text, bool constant = false, std::int64_t value = 0)
      : text_(std::move(text)), constant_(constant), value_(value) {
    nvinfer1::IDimensionExpr::mImpl = this;
  }
  const std::string& text() const { return text_; }
  bool isConstant() const override { return constant_; }
  std::int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  std::string text_;
  bool constant_;
  std::int64_t value_;
};

// Makes expressions, and owns them.
class Builder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  Builder() { nvinfer1::IExprBuilder::mImpl = this; }
  const nvinfer1::IDimensionExpr* named(const std::string& text) { return keep(text); }

  const nvinfer1::IDimensionExpr* constant(std::int64_t value) override {
    return keep(std::to_string(value), true, value);
  }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation,
                                            const nvinfer1::IDimensionExpr& first,
                                            const nvinfer1::IDimensionExpr& second) override {
    auto text = [](const nvinfer1::IDimensionExpr& e) { return static_cast<const Expression&>(e).text(); };
    return keep("(" + text(first) + " op" + std::to_string(static_cast<int>(operation)) + " " + text(second) + ")");
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(std::int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }

 private:
  const nvinfer1::IDimensionExpr* keep(const std::string& text, bool constant = false, std::int64_t value = 0) {
    kept_.push_back(std::make_unique<Expression>(text, constant, value));
    return kept_.back().get();
  }
  std::vector<std::unique_ptr<Expression>> kept_;
};

// Keeps what a plugin says; may be used by several threads at once, as TensorRT's is.
class Logger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  void log(Severity severity, const nvinfer1::AsciiChar* text) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    lines_.emplace_back(severity, text);
  }
  nvinfer1::ILogger* findLogger() override { return this; }
  // Everything since the last call.
  std::vector<std::pair<Severity, std::string>> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(lines_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<Severity, std::string>> lines_;
};

class ResourceContext final : public nvinfer1::IPluginResourceContext {
 public:
  nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

}  // namespace l4convert::conformance
