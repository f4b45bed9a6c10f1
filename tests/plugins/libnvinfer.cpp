// A stand-in for TensorRT's library: a plugin registry that opens libraries in the two ways that TensorRT's programs do.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

using nvinfer1::IPluginCreatorInterface;

class Registry final : public nvinfer1::IPluginRegistry {
 public:
  bool registerCreator(IPluginCreatorInterface& creator, const char* const space) noexcept override {
    auto& given = static_cast<nvinfer1::IPluginCreatorV3One&>(creator);
    if (getCreator(given.getPluginName(), given.getPluginVersion(), space) != nullptr) return false;
    creators_.push_back(&creator);
    return true;
  }
  IPluginCreatorInterface* getCreator(const char* const name, const char* const version,
                                      const char* const) noexcept override {
    for (IPluginCreatorInterface* each : creators_) {
      auto& found = static_cast<nvinfer1::IPluginCreatorV3One&>(*each);
      if (std::strcmp(found.getPluginName(), name) == 0 && std::strcmp(found.getPluginVersion(), version) == 0) {
        return each;
      }
    }
    return nullptr;
  }
  // Fails where any plugin of the library is registered already (NvInferRuntimeCommon.h).
  PluginLibraryHandle loadLibrary(const char* path) noexcept override {
    void* handle = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
    auto get = handle == nullptr ? nullptr : reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    if (get == nullptr) return nullptr;
    std::int32_t count = 0;
    IPluginCreatorInterface* const* found = get(count);
    for (std::int32_t i = 0; i < count; ++i) {
      if (!registerCreator(*found[i], "")) return nullptr;
    }
    return handle;
  }
  IPluginCreatorInterface* const* getAllCreators(std::int32_t* const count) const noexcept override {
    *count = static_cast<std::int32_t>(creators_.size());
    return creators_.data();
  }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(std::int32_t* const count) noexcept override {
    return getAllCreators(count);
  }

  bool registerCreator(nvinfer1::IPluginCreator&, const char* const) noexcept override { return false; }
  nvinfer1::IPluginCreator* const* getPluginCreatorList(std::int32_t* const) const noexcept override { return nullptr; }
  nvinfer1::IPluginCreator* getPluginCreator(const char* const, const char* const, const char* const) noexcept override {
    return nullptr;
  }
  void setErrorRecorder(nvinfer1::IErrorRecorder* const) noexcept override {}
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool deregisterCreator(const nvinfer1::IPluginCreator&) noexcept override { return false; }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return false; }
  bool isParentSearchEnabled() const override { return true; }
  void setParentSearchEnabled(bool const) override {}
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  nvinfer1::IPluginResource* acquirePluginResource(const char*, nvinfer1::IPluginResource*) noexcept override {
    return nullptr;
  }
  std::int32_t releasePluginResource(const char*) noexcept override { return 0; }

 private:
  std::vector<IPluginCreatorInterface*> creators_;
};

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity, const char* text) noexcept override { last = text; }
  std::string last;
};

Registry registry;
Logger logger;

}  // namespace

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
extern "C" std::int32_t getInferLibVersion() noexcept {
  const char* asked = std::getenv("STAND_IN_VERSION");
  return asked == nullptr ? NV_TENSORRT_VERSION : std::atoi(asked);
}
extern "C" nvinfer1::ILogger* getLogger() noexcept { return &logger; }

// For the tests.
extern "C" int stand_in_load(const char* path) { return registry.loadLibrary(path) != nullptr ? 1 : 0; }
extern "C" int stand_in_registered() {
  std::int32_t count = 0;
  registry.getAllCreators(&count);
  return count;
}
// What the process's logger was told when a plugin was made of nothing.
extern "C" const char* stand_in_create(const char* name) {
  auto* found = static_cast<nvinfer1::IPluginCreatorV3One*>(registry.getCreator(name, "1", ""));
  nvinfer1::PluginFieldCollection nothing{};
  return found->createPlugin("empty", &nothing, nvinfer1::TensorRTPhase::kBUILD) == nullptr ? logger.last.c_str() : "";
}
// The same so often, while another thread opens and closes `other` as often.
extern "C" void stand_in_race(const char* other, int times) {
  std::thread opener([&] {
    for (int i = 0; i < times; ++i) {
      if (void* handle = dlopen(other, RTLD_NOW | RTLD_LOCAL)) dlclose(handle);
    }
  });
  for (int i = 0; i < times; ++i) stand_in_create("MoE");
  opener.join();
}
