#include "tensorrt_library.h"

#include <NvInferVersion.h>
#include <dlfcn.h>
#include <link.h>
#include <unwind.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace l4convert {
namespace {

// libnvinfer.so.10, libnvinfer.so.11.1.0, libnvinfer_lean.so.10, ...: whichever comes first and has what is looked for.
constexpr const char kPrefix[] = "libnvinfer";

// Nothing is opened here: the list of objects is locked meanwhile, and another thread's dlopen, which has the other lock,
// may wait for it.
int collect(dl_phdr_info* object, std::size_t, void* data) {
  const char* slash = std::strrchr(object->dlpi_name, '/');
  const char* file = slash == nullptr ? object->dlpi_name : slash + 1;
  if (std::strncmp(file, kPrefix, sizeof(kPrefix) - 1) == 0) {
    static_cast<std::vector<std::string>*>(data)->emplace_back(object->dlpi_name);
  }
  return 0;
}

struct Walk {
  const void* base;
  bool met;
};

_Unwind_Reason_Code visit(_Unwind_Context* frame, void* data) {
  auto& walk = *static_cast<Walk*>(data);
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(_Unwind_GetIP(frame)), &info) != 0 && info.dli_fbase == walk.base) {
    walk.met = true;
    return _URC_END_OF_STACK;
  }
  return _URC_NO_REASON;
}

}  // namespace

void* tensorrt_function(const char* name) {
  // A program may be linked with it statically, and export it.
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  std::vector<std::string> paths;
  dl_iterate_phdr(collect, &paths);
  void* found = nullptr;
  for (std::size_t i = 0; i < paths.size() && found == nullptr; ++i) {
    // Its symbols may be in no global scope: Python and Triton Inference Server load it for themselves.
    void* handle = dlopen(paths[i].c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    found = dlsym(handle, name);
    dlclose(handle);
  }
  return found;
}

bool tensorrt_fits() {
  // major * 10000 + minor * 100 + patch
  auto version = reinterpret_cast<std::int32_t (*)()>(tensorrt_function("getInferLibVersion"));
  return version == nullptr || version() / 10000 == NV_TENSORRT_MAJOR;
}

bool called_from_object_of(const void* address) noexcept {
  Dl_info info{};
  if (dladdr(address, &info) == 0) return false;
  Walk walk{info.dli_fbase, false};
  _Unwind_Backtrace(visit, &walk);
  return walk.met;
}

}  // namespace l4convert
