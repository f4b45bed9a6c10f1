#include "fields.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace l4convert {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const char* kind_name(FieldKind kind) {
  return kind == FieldKind::kInteger ? "an integer" : kind == FieldKind::kReal ? "a 32-bit float" : "a string";
}

PluginFieldType field_type(FieldKind kind) {
  return kind == FieldKind::kInteger  ? PluginFieldType::kINT32
         : kind == FieldKind::kReal ? PluginFieldType::kFLOAT32
                                    : PluginFieldType::kCHAR;
}

bool has_kind(PluginFieldType type, FieldKind kind) {
  return type == field_type(kind) || (kind == FieldKind::kInteger && type == PluginFieldType::kINT64);
}

bool printable(char c) { return c >= ' ' && c <= '~'; }

template <typename T>
T load(const void* from) {  // what a field points to need not be aligned
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// Text of others as a message can have it: one short line.
std::string quoted(const std::string& text) {
  std::string shown = text.substr(0, 64);
  for (char& c : shown) {
    if (!printable(c)) c = '?';
  }
  return '"' + shown + '"';
}

std::string named(const std::string& name) { return "field " + quoted(name); }

const FieldRule* rule_of(const std::vector<FieldRule>& rules, const std::string& name) {
  for (const FieldRule& rule : rules) {
    if (name == rule.name) return &rule;
  }
  return nullptr;
}

}  // namespace

Status Fields::read(const nvinfer1::PluginFieldCollection* given, const std::vector<FieldRule>& rules,
                    Fields& result) {
  if (given == nullptr || given->nbFields < 0 || (given->nbFields > 0 && given->fields == nullptr)) {
    return "no collection of fields was given";
  }
  Fields fields;
  for (std::int32_t i = 0; i < given->nbFields; ++i) {
    const PluginField& field = given->fields[i];
    if (field.name == nullptr) return "field " + std::to_string(i) + " has no name";
    const FieldRule* rule = rule_of(rules, field.name);
    if (rule == nullptr) return named(field.name) + " is not known";
    if (fields.values_.count(rule->name) != 0) return named(rule->name) + " is given twice";
    Value value{rule->kind, 0, 0.0F, ""};
    Status status = read_value(field, rule->kind, value);
    if (!status.empty()) return named(rule->name) + " " + status;
    fields.values_.emplace(rule->name, std::move(value));
  }
  for (const FieldRule& rule : rules) {
    if (fields.values_.count(rule.name) != 0) continue;
    if (rule.required) return named(rule.name) + " is missing";
    fields.values_.emplace(rule.name, Value{rule.kind, 0, 0.0F, ""});
  }
  result = std::move(fields);
  return {};
}

Status Fields::read_value(const PluginField& field, FieldKind kind, Value& value) {
  if (!has_kind(field.type, kind)) return std::string("is not ") + kind_name(kind);
  if (field.length < 0 || (field.data == nullptr && field.length > 0)) return "has no data";
  if (kind == FieldKind::kText) {
    if (field.length > 0) value.text.assign(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
    while (!value.text.empty() && value.text.back() == '\0') value.text.pop_back();
    for (char c : value.text) {
      if (!printable(c)) return "is not printable ASCII";
    }
    return {};
  }
  if (field.length != 1) return "has " + std::to_string(field.length) + " values instead of one";
  if (kind == FieldKind::kReal) {
    value.real = load<float>(field.data);
    return std::isfinite(value.real) ? "" : "is not finite";
  }
  bool wide = field.type == PluginFieldType::kINT64;
  std::int64_t number = wide ? load<std::int64_t>(field.data) : load<std::int32_t>(field.data);
  using Limits = std::numeric_limits<std::int32_t>;
  if (number < Limits::min() || number > Limits::max()) return "is beyond 32 bits: " + std::to_string(number);
  value.integer = static_cast<std::int32_t>(number);
  return {};
}

std::vector<PluginField> Fields::serialized() const {
  std::vector<PluginField> fields;
  for (const auto& [name, value] : values_) {
    bool text = value.kind == FieldKind::kText;
    const void* data = text                                ? static_cast<const void*>(value.text.c_str())
                       : value.kind == FieldKind::kInteger ? static_cast<const void*>(&value.integer)
                                                           : static_cast<const void*>(&value.real);
    // With its terminator, as ONNX-TensorRT hands strings over: so it is never empty.
    std::int32_t length = text ? static_cast<std::int32_t>(value.text.size()) + 1 : 1;
    fields.emplace_back(name.c_str(), data, field_type(value.kind), length);
  }
  return fields;
}

std::string Fields::summary() const {
  std::string joined;
  for (const auto& [name, value] : values_) {
    char number[32];
    std::snprintf(number, sizeof number, "%.9g", static_cast<double>(value.real));
    joined += joined.empty() ? "" : ",";
    joined += name + "=";
    joined += value.kind == FieldKind::kText      ? value.text
              : value.kind == FieldKind::kInteger ? std::to_string(value.integer)
                                                  : std::string(number);
  }
  return joined;
}

std::vector<PluginField> field_names(const std::vector<FieldRule>& rules) {
  std::vector<PluginField> names;
  for (const FieldRule& rule : rules) names.emplace_back(rule.name, nullptr, field_type(rule.kind), 1);
  return names;
}

Status refused(const char* field, const std::string& value, const char* known) {
  return named(field) + " is " + quoted(value) + ", which the plugin does not know (" + known + ")";
}

}  // namespace l4convert
