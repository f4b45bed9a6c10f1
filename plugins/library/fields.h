// The attributes of an op as TensorRT hands them over: read with every mistake named, and given back to be serialized.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "launcher.h"

namespace l4convert {

enum class FieldKind { kInteger, kReal, kText };

// An optional field that is not there is 0 or "".
struct FieldRule {
  const char* name;
  FieldKind kind;
  bool required;
};

// Values by name. Integers have 32 bits, as ONNX-TensorRT hands them over; text is ASCII without its terminator.
class Fields {
 public:
  // Reads a collection by its rules: `result` is changed only where all is well.
  static Status read(const nvinfer1::PluginFieldCollection* given, const std::vector<FieldRule>& rules,
                     Fields& result);

  std::int32_t integer(const std::string& name) const { return values_.at(name).integer; }
  float real(const std::string& name) const { return values_.at(name).real; }
  const std::string& text(const std::string& name) const { return values_.at(name).text; }
  void set(const std::string& name, std::int32_t value) { values_[name] = {FieldKind::kInteger, value, 0.0F, ""}; }

  // For TensorRT to write down. The pointers are into this object.
  std::vector<nvinfer1::PluginField> serialized() const;
  // "name=value" of all of them in the order of their names, separated by commas.
  std::string summary() const;

 private:
  struct Value {
    FieldKind kind;
    std::int32_t integer;
    float real;
    std::string text;
  };
  static Status read_value(const nvinfer1::PluginField& field, FieldKind kind, Value& value);

  std::map<std::string, Value> values_;
};

// Names of fields for getFieldNames(): the parser of ONNX models hands over these attributes and no others.
std::vector<nvinfer1::PluginField> field_names(const std::vector<FieldRule>& rules);

// What is said of a text that a field cannot have; `known`: what it can.
Status refused(const char* field, const std::string& value, const char* known);

}  // namespace l4convert
