// What an op must say of itself so that plugin.cpp can make a TensorRT plugin of it: its tensors, and its launch.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fields.h"
#include "launcher.h"

namespace l4convert {

// The extent of a dimension: a number, or a symbol that stands for one number in a whole call.
struct Extent {
  std::int64_t fixed;
  char symbol;
};
inline Extent fixed(std::int64_t value) { return {value, '\0'}; }
inline Extent free(char symbol) { return {-1, symbol}; }

struct Tensor {
  const char* name;
  nvinfer1::DataType type;
  std::vector<Extent> dims;
};

// What the symbols stand for in one call; -1 where a symbol has no number.
class Sizes {
 public:
  Sizes() { values_.fill(-1); }
  std::int64_t operator[](char symbol) const { return values_[static_cast<unsigned char>(symbol) % kSymbols]; }
  std::int64_t& operator[](char symbol) { return values_[static_cast<unsigned char>(symbol) % kSymbols]; }

 private:
  static constexpr std::size_t kSymbols = 128;
  std::array<std::int64_t, kSymbols> values_;
};

// One call's op with its attributes; does not change, so that all clones of a plugin share it.
class Op {
 public:
  virtual ~Op() = default;

  const std::vector<Tensor>& inputs() const { return inputs_; }
  const std::vector<Tensor>& outputs() const { return outputs_; }
  // The input that an output is written into, in place; -1 for none.
  virtual int aliased_input(int output) const { return (void)output, -1; }
  // What else must hold of the sizes of a call, after every tensor was found to have the right shape.
  virtual Status check(const Sizes& sizes) const { return (void)sizes, Status(); }
  // Scratch memory for calls of up to these sizes.
  virtual std::size_t workspace(const Sizes& most, int multiprocessors) const = 0;
  virtual Status enqueue(Launcher& launcher, const Sizes& sizes, const void* const* inputs, void* const* outputs,
                         void* workspace) const = 0;
  // Sizes of small calls that between them launch every kernel that any call may launch.
  virtual std::vector<Sizes> probes() const = 0;

 protected:
  std::vector<Tensor> inputs_, outputs_;
};

// A row of the library's table of ops.
struct OpKind {
  const char* name;    // of the plugin
  const char* folder;  // under plugins/: what its kernels are listed under
  std::vector<FieldRule> fields;
  Status (*make)(const Fields& fields, std::shared_ptr<const Op>& op);
};

// Every extent of shapes against what the op has. `sizes` gets the symbols' numbers. Dimensions of -1 are not looked at
// where `partial`.
Status match_shapes(const std::vector<Tensor>& tensors, const std::vector<nvinfer1::Dims>& shapes, bool partial,
                    Sizes& sizes);

// "x [4, 64]": for messages.
std::string shape_text(const char* name, const nvinfer1::Dims& dims);

}  // namespace l4convert
