#include "library.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

namespace l4convert::conformance {
namespace {

// Given to every library that is opened, which may keep it for as long as the process runs.
Logger& the_logger() {
  static auto* const logger = new Logger;
  return *logger;
}

}  // namespace

Library::Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)), logger_(the_logger()) {
  if (handle_ == nullptr) throw std::runtime_error(dlerror());
  auto set = reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(function("setLoggerFinder"));
  using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(std::int32_t&);
  auto get = reinterpret_cast<GetCreators>(function("getCreators"));
  if (set == nullptr || get == nullptr) throw std::runtime_error(path + " exports no setLoggerFinder or getCreators");
  set(&logger_);
  std::int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* found = get(count);
  for (std::int32_t i = 0; i < count; ++i) {
    if (std::strcmp(found[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) {
      throw std::runtime_error(path + " has a creator of another kind than IPluginCreatorV3One");
    }
    creators_.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(found[i]));
  }
}

nvinfer1::IPluginCreatorV3One* Library::creator(const std::string& plugin) const {
  for (nvinfer1::IPluginCreatorV3One* each : creators_) {
    if (plugin == each->getPluginName()) return each;
  }
  return nullptr;
}

void* Library::function(const char* name) const { return dlsym(handle_, name); }

}  // namespace l4convert::conformance
