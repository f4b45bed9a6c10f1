#include <cstring>
#include <stdexcept>

#include "checks.h"

namespace l4convert::conformance {
namespace {

using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

constexpr const char kVersionField[] = "serialization";

std::string was_refused(const Library& library, const Case& given, Collection& fields, const std::string& word,
                        TensorRTPhase phase = TensorRTPhase::kBUILD) {
  return refusal(library, create(library, given, fields, phase) == nullptr, word);
}

// A field by its name, to be changed.
nvinfer1::PluginField& field_of(Collection& fields, const std::string& name) {
  for (nvinfer1::PluginField& field : fields.fields) {
    if (name == field.name) return field;
  }
  throw std::out_of_range(name);
}

std::string faces(const Library& library, const Case& given) {
  const PluginPointer plugin = create(library, given, given.attributes);
  if (plugin == nullptr) return "is refused: " + silence(library);
  const Faces found(*plugin);
  if (found.core == nullptr || found.build == nullptr || found.runtime == nullptr) return "has not all three faces";
  if (plugin->getCapabilityInterface(static_cast<nvinfer1::PluginCapabilityType>(9)) != nullptr) {
    return "has a face that there is not";
  }
  const nvinfer1::InterfaceInfo build = found.build->getInterfaceInfo();
  if (std::strcmp(build.kind, "PLUGIN_V3ONE_BUILD") != 0 || build.major != 2) return "cannot alias its caches";
  if (std::strcmp(found.core->getInterfaceInfo().kind, "PLUGIN_V3ONE_CORE") != 0 ||
      std::strcmp(found.runtime->getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME") != 0) {
    return "its faces are of other kinds";
  }
  if (given.plugin != found.core->getPluginName() || std::string("1") != found.core->getPluginVersion() ||
      std::string() != found.core->getPluginNamespace()) {
    return "calls itself otherwise than its creator";
  }
  return silence(library);
}

// The parser of ONNX models hands over the attributes that are listed, and no others.
std::string names_are_listed(const Library& library, const Case& given) {
  const nvinfer1::PluginFieldCollection* names = library.creator(given.plugin)->getFieldNames();
  for (const auto& [name, value] : given.attributes) {
    bool found = false;
    for (std::int32_t i = 0; i < names->nbFields; ++i) found = found || name == names->fields[i].name;
    if (!found) return "does not list " + name;
  }
  return {};
}

std::string missing_fields(const Library& library, const Case& given) {
  for (const auto& [name, value] : given.attributes) {
    if (value.kind == Attribute::Kind::kText && value.text.empty()) continue;  // the same as not being there
    // What tells packed weights from plain ones: without it the blocks say something is wrong.
    if (name == "weights" || name == "gate_up_block" || name == "down_block" || name == "activations") continue;
    Attributes fewer = given.attributes;
    fewer.erase(name);
    Collection fields(fewer);
    if (std::string wrong = was_refused(library, given, fields, name); !wrong.empty()) return name + ": " + wrong;
  }
  return {};
}

std::string mistyped_fields(const Library& library, const Case& given) {
  const std::int64_t wide = std::int64_t{1} << 40;
  for (const auto& [name, value] : given.attributes) {
    for (int type = 0; type < 14; ++type) {
      Collection fields(given.attributes);
      nvinfer1::PluginField& field = field_of(fields, name);
      const auto wrong_type = static_cast<PluginFieldType>(type);
      const bool wide_integer = value.kind == Attribute::Kind::kInteger && wrong_type == PluginFieldType::kINT64;
      if (wrong_type == field.type || wide_integer) continue;
      field.type = wrong_type;
      if (std::string wrong = was_refused(library, given, fields, name); !wrong.empty()) {
        return name + " of type " + std::to_string(type) + ": " + wrong;
      }
    }
    if (value.kind != Attribute::Kind::kInteger) continue;
    Collection fields(given.attributes);
    field_of(fields, name).type = PluginFieldType::kINT64;
    field_of(fields, name).data = &wide;
    if (std::string wrong = was_refused(library, given, fields, name); !wrong.empty()) return name + ": " + wrong;
  }
  return {};
}

std::string malformed_fields(const Library& library, const Case& given) {
  struct Change {
    const char* word;
    void (*make)(Collection&);
  };
  static const std::int32_t number = 3;
  const Change changes[] = {
      {"unheard_of", [](Collection& c) { c.add("unheard_of", &number, PluginFieldType::kINT32, 1, 4); }},
      {"un?heard", [](Collection& c) { c.add("un\nheard", &number, PluginFieldType::kINT32, 1, 4); }},
      {"twice", [](Collection& c) { c.fields.push_back(field_of(c, "compute")); }},
      {"no name", [](Collection& c) { field_of(c, "compute").name = nullptr; }},
      {"compute", [](Collection& c) { field_of(c, "compute").data = nullptr; }},
      {"compute", [](Collection& c) { field_of(c, "compute").length = -1; }},
      {"ASCII", [](Collection& c) { field_of(c, "compute").data = "bfl\nat16"; }},
  };
  for (const Change& change : changes) {
    Collection fields(given.attributes);
    change.make(fields);
    if (std::string wrong = was_refused(library, given, fields, change.word); !wrong.empty()) {
      return std::string(change.word) + ": " + wrong;
    }
  }
  for (const auto& [name, value] : given.attributes) {
    if (value.kind == Attribute::Kind::kText) continue;
    Collection fields(given.attributes);
    field_of(fields, name).length = 2;
    if (std::string wrong = was_refused(library, given, fields, name); !wrong.empty()) return name + ": " + wrong;
  }
  nvinfer1::IPluginV3* made = library.creator(given.plugin)->createPlugin("x", nullptr, TensorRTPhase::kBUILD);
  return refusal(library, made == nullptr, "fields");
}

std::string impossible_values(const Library& library, const Case& given) {
  for (const Refused& change : given.refused) {
    Attributes attributes = given.attributes;
    attributes.erase(change.field);
    attributes.insert({change.field, change.value});
    Collection fields(attributes);
    if (std::string wrong = was_refused(library, given, fields, change.word); !wrong.empty()) {
      return change.field + ": " + wrong;
    }
  }
  return {};
}

// TensorRT's own parser ends strings with a zero; Python's bindings hand over what they are given.
std::string other_forms(const Library& library, const Case& given) {
  Collection fields;
  for (const auto& [name, value] : given.attributes) {
    const std::int64_t wide = value.integer;
    if (value.kind == Attribute::Kind::kInteger) {
      fields.add(name, &wide, PluginFieldType::kINT64, 1, sizeof wide);
    } else if (value.kind == Attribute::Kind::kReal) {
      fields.add(name, &value.real, PluginFieldType::kFLOAT32, 1, sizeof value.real);
    } else {
      const auto length = static_cast<std::int32_t>(value.text.size());
      fields.add(name, value.text.data(), PluginFieldType::kCHAR, length, value.text.size());
    }
  }
  const PluginPointer other = create(library, given, fields), usual = create(library, given, given.attributes);
  if (other == nullptr || usual == nullptr) return "is refused: " + silence(library);
  return serialized(*other) == serialized(*usual) ? silence(library) : "gives another plugin";
}

std::string round_trip(const Library& library, const Case& given) {
  PluginPointer built = create(library, given, given.attributes);
  const Attributes kept = serialized(*built);
  for (const auto& [name, value] : given.attributes) {
    if (kept.count(name) == 0 || !(kept.at(name) == value)) return "does not keep " + name;
  }
  if (kept.count(kVersionField) == 0) return "keeps no version";
  Collection fields(kept);
  const PluginPointer loaded = create(library, given, fields, TensorRTPhase::kRUNTIME);
  if (loaded == nullptr) return "cannot be made again: " + silence(library);
  if (!(serialized(*loaded) == kept)) return "differs when it was made again";
  built.reset();
  return shape_change(*loaded, given, describe(given, given.sizes)) == 0 ? silence(library) : "does not run again";
}

std::string other_versions(const Library& library, const Case& given) {
  const Attributes kept = serialized(*create(library, given, given.attributes));
  Collection unchanged(kept);
  if (std::string wrong = was_refused(library, given, unchanged, kVersionField); !wrong.empty()) {
    return "in a graph: " + wrong;
  }
  Attributes newer = kept, without = kept;
  newer.at(kVersionField).integer += 1;
  without.erase(kVersionField);
  Collection newer_fields(newer), no_version(without);
  std::string wrong = was_refused(library, given, newer_fields, "version", TensorRTPhase::kRUNTIME);
  if (wrong.empty()) wrong = was_refused(library, given, no_version, kVersionField, TensorRTPhase::kRUNTIME);
  return wrong;
}

std::string clones(const Library& library, const Case& given) {
  PluginPointer original = create(library, given, given.attributes);
  const Attributes kept = serialized(*original);
  PluginPointer copy(original->clone());
  ResourceContext context;
  PluginPointer attached(Faces(*copy).runtime->attachToContext(&context));
  if (attached == nullptr) return "is not attached: " + silence(library);
  if (copy == original || attached == copy) return "is not a new object";
  original.reset();
  if (!(serialized(*copy) == kept)) return "changes when its original is gone";
  copy.reset();
  if (!(serialized(*attached) == kept)) return "changes when its original is gone, attached";
  return shape_change(*attached, given, describe(given, given.sizes)) == 0 ? silence(library) : "does not run";
}

std::string identities(const Library& library, const Case& given) {
  const PluginPointer one = create(library, given, given.attributes), two = create(library, given, given.attributes);
  Attributes changed = given.attributes;
  if (given.plugin == "MoE") changed.at("top_k").integer += 1;
  if (given.plugin != "MoE") changed.at("floor_scale").real *= 2;
  const PluginPointer other = create(library, given, changed);
  if (other == nullptr) return "another one is refused: " + silence(library);
  const char* id = Faces(*one).build->getTimingCacheID();
  if (id == nullptr || std::strcmp(id, Faces(*two).build->getTimingCacheID()) != 0) return "equal ones are not equal";
  if (std::strcmp(id, Faces(*other).build->getTimingCacheID()) == 0) return "others are taken for equal";
  const std::string text = Faces(*one).build->getMetadataString();
  for (const auto& [name, value] : given.attributes) {
    if (text.find(name + "=") == std::string::npos) return "the metadata has no " + name;
  }
  return {};
}

}  // namespace

bool check_creation(const Library& library, const Case& given, Report& report) {
  struct Entry {
    const char* name;
    std::string (*run)(const Library&, const Case&);
  };
  const Entry entries[] = {{"is created, with three faces", faces},
                           {"field names are listed", names_are_listed},
                           {"missing fields refused", missing_fields},
                           {"fields of wrong types refused", mistyped_fields},
                           {"malformed fields refused", malformed_fields},
                           {"impossible values refused", impossible_values},
                           {"int64 and unterminated strings", other_forms},
                           {"serialize, create again, equal", round_trip},
                           {"other serializations refused", other_versions},
                           {"clone, attach, outlive", clones},
                           {"timing cache id, metadata", identities}};
  for (const Entry& entry : entries) {
    library.logger().take();
    const std::string wrong = entry.run(library, given);
    report.add(given.name, entry.name, wrong);
    if (&entry == entries && !wrong.empty()) return false;  // the others need a plugin
  }
  return true;
}

}  // namespace l4convert::conformance
