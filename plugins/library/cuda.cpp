#include "cuda.h"

#include <dlfcn.h>

namespace l4convert::cuda {
namespace {

struct Loaded {
  Api api{};
  Status status;

  Loaded() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      status = "there is no CUDA driver on this machine (libcuda.so.1 cannot be loaded)";
      return;
    }
    find(library, "cuGetErrorName", &api.get_error_name);
    find(library, "cuGetErrorString", &api.get_error_string);
    find(library, "cuCtxGetCurrent", &api.context_get_current);
    find(library, "cuCtxGetDevice", &api.context_get_device);
    find(library, "cuDeviceGetAttribute", &api.device_get_attribute);
    find(library, "cuModuleLoadData", &api.module_load_data);
    find(library, "cuModuleGetFunction", &api.module_get_function);
    find(library, "cuFuncSetAttribute", &api.function_set_attribute);
    find(library, "cuLaunchKernel", &api.launch_kernel);
    find(library, "cuMemcpyDtoDAsync_v2", &api.copy_device);
    find(library, "cuMemsetD8Async", &api.set_bytes);
    api.context_get_id = reinterpret_cast<decltype(api.context_get_id)>(dlsym(library, "cuCtxGetId"));
    api.function_load = reinterpret_cast<decltype(api.function_load)>(dlsym(library, "cuFuncLoad"));
  }

  template <typename Function>
  void find(void* library, const char* name, Function* to) {
    *to = reinterpret_cast<Function>(dlsym(library, name));
    if (*to == nullptr && status.empty()) {
      status = std::string("the CUDA driver is too old: libcuda.so.1 has no ") + name;
    }
  }
};

}  // namespace

const Api* api(Status* why) {
  static const Loaded loaded;
  *why = loaded.status;
  return loaded.status.empty() ? &loaded.api : nullptr;
}

Status explain(const Api& api, const std::string& what, Result result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (api.get_error_name(result, &name) != kSuccess || name == nullptr) {
    return what + ": CUDA error " + std::to_string(result);
  }
  if (api.get_error_string(result, &text) != kSuccess || text == nullptr) return what + ": " + name;
  return what + ": " + name + " (" + text + ")";
}

}  // namespace l4convert::cuda
