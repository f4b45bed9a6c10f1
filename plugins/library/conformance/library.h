// The plugin library as TensorRT opens it: nothing is linked, two functions are looked up.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "mocks.h"

namespace l4convert::conformance {

// Stays open until the process ends, as TensorRT's does: plugins outlive what made them.
class Library {
 public:
  // Throws std::runtime_error with one line where the library cannot be used.
  explicit Library(const std::string& path);

  nvinfer1::IPluginCreatorV3One* creator(const std::string& plugin) const;
  const std::vector<nvinfer1::IPluginCreatorV3One*>& creators() const { return creators_; }
  Logger& logger() const { return logger_; }
  // Any other function it exports; null where it has none of that name.
  void* function(const char* name) const;

 private:
  void* handle_;
  Logger& logger_;
  std::vector<nvinfer1::IPluginCreatorV3One*> creators_;
};

}  // namespace l4convert::conformance
