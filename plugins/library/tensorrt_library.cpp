#include "tensorrt_library.h"

#include <NvInferVersion.h>
#include <dlfcn.h>
#include <link.h>
#include <unwind.h>

#include <cstdint>
#include <cstring>

namespace l4convert {
namespace {

// libnvinfer.so.10, libnvinfer.so.11.1.0, libnvinfer_lean.so.10, ...: whichever comes first and has what is looked for.
constexpr const char kPrefix[] = "libnvinfer";

struct Search {
  const char* name;
  void* found;
};

int look_into(dl_phdr_info* object, std::size_t, void* data) {
  auto& search = *static_cast<Search*>(data);
  const char* slash = std::strrchr(object->dlpi_name, '/');
  const char* file = slash == nullptr ? object->dlpi_name : slash + 1;
  if (std::strncmp(file, kPrefix, sizeof(kPrefix) - 1) != 0) return 0;
  // Its symbols may be in no global scope: Python and Triton Inference Server load it for themselves.
  void* handle = dlopen(object->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return 0;
  search.found = dlsym(handle, search.name);
  dlclose(handle);
  return search.found != nullptr ? 1 : 0;
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

void* tensorrt_function(const char* name) noexcept {
  // A program may be linked with it statically, and export it.
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  Search search{name, nullptr};
  dl_iterate_phdr(look_into, &search);
  return search.found;
}

bool tensorrt_fits() noexcept {
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
