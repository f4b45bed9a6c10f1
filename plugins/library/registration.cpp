// How TensorRT finds the plugins. There are two ways, and a library that takes both must not register twice:
//
// * IPluginRegistry::loadLibrary (trtexec --dynamicPlugins, `l4convert build`, engines that carry their plugins) opens
//   the library, looks up setLoggerFinder and getCreators, and registers what it gets. It fails where a plugin of that
//   name is registered already.
// * Triton Inference Server (--backend-config=tensorrt,plugins=...), trtexec --staticPlugins and LD_PRELOAD only open
//   the library, and expect it to register itself.
//
// So the library registers itself when it is opened, unless it is TensorRT that opens it, or TensorRT is not there.
#include <cstdlib>
#include <cstring>

#include "logging.h"
#include "plugin.h"
#include "support.h"
#include "tensorrt_library.h"

namespace l4convert {
namespace {

// "0": never register by itself.
constexpr const char kVariable[] = "L4CONVERT_PLUGINS_REGISTER";

const std::vector<nvinfer1::IPluginCreatorInterface*>& creators() {
  // Never destroyed: TensorRT may ask for them after this library's other objects are gone.
  static const auto* const all = [] {
    auto* made = new std::vector<nvinfer1::IPluginCreatorInterface*>;
    for (const OpKind* kind : op_kinds()) made->push_back(new Creator(*kind));
    return made;
  }();
  return *all;
}

int register_all(nvinfer1::IPluginRegistry& registry) {
  int registered = 0;
  for (nvinfer1::IPluginCreatorInterface* each : creators()) {
    auto& creator = static_cast<nvinfer1::IPluginCreatorV3One&>(*each);
    // Another copy of this library may have been first.
    if (registry.getCreator(creator.getPluginName(), creator.getPluginVersion(), "") != nullptr) continue;
    registered += registry.registerCreator(creator, "") ? 1 : 0;
  }
  return registered;
}

__attribute__((constructor)) void register_when_opened() {
  guarded("registration", 0, [] {
    const char* asked = std::getenv(kVariable);
    if (asked != nullptr && std::strcmp(asked, "0") == 0) return 0;
    void* get = tensorrt_function("getPluginRegistry");
    if (get == nullptr || called_from_object_of(get)) return 0;
    if (!tensorrt_fits()) {
      report(nvinfer1::ILogger::Severity::kWARNING,
             "plugins are not registered: this library was built for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                 ", and another major number of it is here; set TENSORRT_ROOT and build it again");
      return 0;
    }
    nvinfer1::IPluginRegistry* registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(get)();
    return registry == nullptr ? 0 : register_all(*registry);
  });
}

}  // namespace
}  // namespace l4convert

#define L4_EXPORT extern "C" __attribute__((visibility("default")))

// Both as TensorRT declares them ("Plugin Shared Libraries" in its developer guide).
L4_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  count = static_cast<std::int32_t>(l4convert::creators().size());
  return l4convert::creators().data();
}

L4_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { l4convert::use_logger_finder(finder); }

// For programs that keep a registry of their own: how many plugins it got, of 2; those that it had are left.
L4_EXPORT std::int32_t l4_register(nvinfer1::IPluginRegistry* registry) {
  return registry == nullptr ? 0 : l4convert::guarded("registration", 0, [&] { return l4convert::register_all(*registry); });
}
