// Calls of the two ops as the project's graphs have them, and what their plugins must answer: written down from the
// ops' definitions (plugins/<op>/definition.py), not from the plugins' code.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace l4convert::conformance {

// One attribute, of the type that ONNX-TensorRT gives it: int32, float32, or characters with a terminator.
struct Attribute {
  enum class Kind { kInteger, kReal, kText } kind;
  std::int32_t integer = 0;
  float real = 0;
  std::string text;

  Attribute(std::int32_t value) : kind(Kind::kInteger), integer(value) {}  // NOLINT: written as plain values in tables
  Attribute(float value) : kind(Kind::kReal), real(value) {}               // NOLINT
  Attribute(const char* value) : kind(Kind::kText), text(value) {}         // NOLINT
  bool operator==(const Attribute& other) const {
    return kind == other.kind && integer == other.integer && real == other.real && text == other.text;
  }
};
using Attributes = std::map<std::string, Attribute>;

// Fields in the form that creators take; owns what they point to.
class Collection {
 public:
  Collection() = default;
  explicit Collection(const Attributes& attributes);
  Collection(const Collection&) = delete;
  Collection& operator=(const Collection&) = delete;

  void add(const std::string& name, const void* data, nvinfer1::PluginFieldType type, std::int32_t length,
           std::size_t bytes);
  const nvinfer1::PluginFieldCollection* get();
  std::vector<nvinfer1::PluginField> fields;

 private:
  std::deque<std::string> kept_;
  nvinfer1::PluginFieldCollection collection_;
};

// A dimension is a number or a letter that stands for one in a whole call.
struct Expected {
  std::string name;
  nvinfer1::DataType type;
  std::vector<std::string> dims;
};

// Attributes that must be refused, and a word of the message.
struct Refused {
  std::string field;
  Attribute value;
  std::string word;
};

struct Case {
  std::string name;
  std::string plugin;
  Attributes attributes;
  std::vector<Expected> inputs, outputs;
  std::map<int, int> aliases;                                   // output -> input
  std::map<std::string, std::int64_t> sizes;                    // of the letters, in a call that is right
  std::vector<std::map<std::string, std::int64_t>> impossible;  // changes to them that must be refused
  std::vector<Refused> refused;
};

// Sizes of one call.
using Letters = std::map<std::string, std::int64_t>;
nvinfer1::Dims dims_of(const Expected& tensor, const Letters& sizes);

std::vector<Case> cases(int head_dim);

}  // namespace l4convert::conformance
