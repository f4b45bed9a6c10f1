#include "driver.h"

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>

#include "cuda.h"
#include "lookup.h"

namespace l4convert {
namespace {

// A block may have this much dynamic shared memory without being asked.
constexpr int kSharedWithoutAsking = 48 * 1024;
// Triton ends every parameter list with two pointers to scratch memory; compile.py refuses kernels that use them.
constexpr int kHiddenPointers = 2;

std::string sms_of_library() {
  std::set<int> found;
  for (int i = 0; i < kKernelCount; ++i) found.insert(kKernels[i].sm);
  std::string text;
  for (int sm : found) text += (text.empty() ? "" : ", ") + std::to_string(sm);
  return text.empty() ? "none" : text;
}

Status missing_sm(int sm) {
  return "the plugin library has no kernels for SM " + std::to_string(sm) + " (it has: " + sms_of_library() +
         "): l4convert plugins build --sm " + std::to_string(sm);
}

Status bad_argument(const l4_kernel_info& kernel, std::size_t index, const char* what) {
  return std::string(kernel.name) + ": argument " + std::to_string(index) + " of (" + kernel.parameters + ") " + what;
}

// Whether the arguments are what the kernel was compiled for: a wrong one would be read as garbage on the GPU.
Status check_arguments(const l4_kernel_info& kernel, const std::vector<Argument>& arguments) {
  const std::size_t count = std::strlen(kernel.types);
  if (arguments.size() != count) {
    return std::string(kernel.name) + ": " + std::to_string(arguments.size()) + " arguments for " +
           std::to_string(count) + " parameters (" + kernel.parameters + ")";
  }
  for (std::size_t i = 0; i < count; ++i) {
    const Argument& argument = arguments[i];
    const char type = kernel.types[i];
    switch (argument.type()) {
      case Argument::Type::kPointer:
        if (type != 'p') return bad_argument(kernel, i, "must not be a pointer");
        if (reinterpret_cast<std::uintptr_t>(argument.address()) % 16 != 0) {
          return bad_argument(kernel, i, "is a pointer that is not aligned to 16 bytes");
        }
        break;
      case Argument::Type::kInt32:
        if (type != 'i' && type != 'I') return bad_argument(kernel, i, "must not be an int32");
        break;
      case Argument::Type::kInt64:
        if (type != 'l' && type != 'L') return bad_argument(kernel, i, "must not be an int64");
        break;
      case Argument::Type::kFloat32:
        if (type != 'f') return bad_argument(kernel, i, "must not be a float32");
        break;
    }
    if ((type == 'I' || type == 'L') && argument.integer() % 16 != 0) {
      return bad_argument(kernel, i, "must be a multiple of 16");
    }
  }
  return {};
}

}  // namespace

struct DriverLauncher::Context {
  struct Chosen {
    const l4_kernel_info* kernel = nullptr;
    cuda::Function function = nullptr;  // null until it is first launched
  };

  Context(const cuda::Api& driver, int sm, int multiprocessors, int shared_limit)
      : driver(driver), sm(sm), multiprocessors(multiprocessors) {
    for (int i = 0; i < kKernelCount; ++i) {
      const l4_kernel_info& kernel = kKernels[i];
      if (!runs_on(kernel, sm)) continue;
      any = true;
      // A cubin for 8.0 may ask for more shared memory than 8.6 has.
      if (kernel.shared > shared_limit) continue;
      Chosen& chosen = kernels[kernel.name];
      if (chosen.kernel == nullptr || chosen.kernel->sm < kernel.sm) chosen.kernel = &kernel;
    }
  }

  const l4_kernel_info* find(const std::string& name) const {
    const auto found = kernels.find(name);
    return found == kernels.end() ? nullptr : found->second.kernel;
  }

  // The kernel, loaded into this context (which is current).
  Status load(const std::string& name, Chosen* loaded) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = kernels.find(name);
    if (found == kernels.end()) {
      if (!any) return missing_sm(sm);
      return "the plugin library has no kernel " + name + " for SM " + std::to_string(sm) +
             ": l4convert plugins build makes it with the --sm, --compute and --head-dim that it needs";
    }
    Chosen& chosen = found->second;
    if (chosen.function == nullptr) {
      Status status = load_image(*chosen.kernel, &chosen.function);
      if (!status.empty()) return status;
    }
    *loaded = chosen;
    return {};
  }

  Status load_image(const l4_kernel_info& kernel, cuda::Function* function) {
    const std::string what = std::string(" of ") + kernel.name + " for SM " + std::to_string(kernel.sm);
    cuda::Module module = nullptr;
    cuda::Function found = nullptr;
    if (cuda::Result result = driver.module_load_data(&module, kernel.image)) {
      return cuda::explain(driver, "cuModuleLoadData" + what, result);
    }
    if (cuda::Result result = driver.module_get_function(&found, module, kernel.symbol)) {
      return cuda::explain(driver, "cuModuleGetFunction" + what, result);
    }
    if (kernel.shared > kSharedWithoutAsking) {
      if (cuda::Result result = driver.function_set_attribute(found, cuda::kMaxDynamicSharedSize, kernel.shared)) {
        return cuda::explain(driver, "cuFuncSetAttribute" + what, result);
      }
    }
    if (driver.function_load != nullptr) {
      if (cuda::Result result = driver.function_load(found)) return cuda::explain(driver, "cuFuncLoad" + what, result);
    }
    *function = found;
    return {};
  }

  const cuda::Api& driver;
  const int sm;
  const int multiprocessors;
  bool any = false;
  std::mutex mutex;
  std::unordered_map<std::string, Chosen> kernels;
};

// What is loaded in the current context, found or made. Contexts are never freed: their modules go with the CUDA
// context, and what is left of one is small.
Status DriverLauncher::current(Context** context) {
  static std::mutex mutex;
  static auto* contexts = new std::map<unsigned long long, std::unique_ptr<Context>>;  // never destroyed: see above
  Status status;
  const cuda::Api* driver = cuda::api(&status);
  if (driver == nullptr) return status;
  cuda::Context handle = nullptr;
  if (cuda::Result result = driver->context_get_current(&handle)) {
    return cuda::explain(*driver, "cuCtxGetCurrent", result);
  }
  if (handle == nullptr) return "no CUDA context is current in this thread";
  unsigned long long id = 0;
  if (driver->context_get_id == nullptr || driver->context_get_id(handle, &id) != cuda::kSuccess) {
    id = reinterpret_cast<std::uintptr_t>(handle);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Context>& found = (*contexts)[id];
  if (found == nullptr) {
    cuda::Device device = 0;
    if (cuda::Result result = driver->context_get_device(&device)) {
      return cuda::explain(*driver, "cuCtxGetDevice", result);
    }
    int values[4] = {};
    constexpr int kAttributes[4] = {cuda::kComputeCapabilityMajor, cuda::kComputeCapabilityMinor,
                                    cuda::kMultiprocessorCount, cuda::kMaxSharedMemoryOptin};
    for (int i = 0; i < 4; ++i) {
      if (cuda::Result result = driver->device_get_attribute(&values[i], kAttributes[i], device)) {
        return cuda::explain(*driver, "cuDeviceGetAttribute", result);
      }
    }
    found = std::make_unique<Context>(*driver, 10 * values[0] + values[1], values[2], values[3]);
  }
  *context = found.get();
  return {};
}

DriverLauncher::DriverLauncher(void* stream) : stream_(stream) { status_ = current(&context_); }

Status DriverLauncher::launch(const std::string& kernel, Grid grid, const std::vector<Argument>& arguments) {
  if (!status_.empty()) return status_;
  Context::Chosen chosen;
  Status status = context_->load(kernel, &chosen);
  if (status.empty()) status = check_arguments(*chosen.kernel, arguments);
  if (!status.empty()) return status;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};

  void* hidden = nullptr;
  std::vector<void*> parameters;
  parameters.reserve(arguments.size() + kHiddenPointers);
  for (const Argument& argument : arguments) parameters.push_back(const_cast<void*>(argument.data()));
  for (int i = 0; i < kHiddenPointers; ++i) parameters.push_back(&hidden);
  const unsigned threads = 32u * static_cast<unsigned>(chosen.kernel->warps);
  const cuda::Result result = context_->driver.launch_kernel(
      chosen.function, grid.x, grid.y, grid.z, threads, 1, 1, static_cast<unsigned>(chosen.kernel->shared),
      static_cast<cuda::Stream>(stream_), parameters.data(), nullptr);
  if (result != cuda::kSuccess) {
    return cuda::explain(context_->driver,
                         "cuLaunchKernel of " + kernel + " on a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " x " + std::to_string(grid.z),
                         result);
  }
  return {};
}

Status DriverLauncher::zero(void* to, std::size_t bytes) {
  if (!status_.empty()) return status_;
  if (bytes == 0) return {};
  const cuda::Result result = context_->driver.set_bytes(reinterpret_cast<cuda::Pointer>(to), 0, bytes,
                                                         static_cast<cuda::Stream>(stream_));
  return result == cuda::kSuccess ? Status() : cuda::explain(context_->driver, "cuMemsetD8Async", result);
}

Status DriverLauncher::copy(void* to, const void* from, std::size_t bytes) {
  if (!status_.empty()) return status_;
  if (bytes == 0) return {};
  const cuda::Result result =
      context_->driver.copy_device(reinterpret_cast<cuda::Pointer>(to), reinterpret_cast<cuda::Pointer>(from), bytes,
                                   static_cast<cuda::Stream>(stream_));
  return result == cuda::kSuccess ? Status() : cuda::explain(context_->driver, "cuMemcpyDtoDAsync", result);
}

int DriverLauncher::multiprocessors() const { return context_ == nullptr ? 0 : context_->multiprocessors; }

int DriverLauncher::sm() const { return context_ == nullptr ? 0 : context_->sm; }

bool DriverLauncher::has(const std::string& kernel) const {
  return context_ != nullptr && context_->find(kernel) != nullptr;
}

std::int64_t DriverLauncher::constant(const std::string& kernel, const std::string& name, std::int64_t missing) const {
  const l4_kernel_info* found = context_ == nullptr ? nullptr : context_->find(kernel);
  return found == nullptr ? missing : constant_of(*found, name, missing);
}

Status DriverLauncher::preload(const std::string& op) {
  if (!status_.empty()) return status_;
  if (!context_->any) return missing_sm(context_->sm);
  bool known = false;
  for (int i = 0; i < kKernelCount; ++i) {
    if (op != kKernels[i].op) continue;
    known = true;
    if (context_->find(kKernels[i].name) != &kKernels[i]) continue;
    Context::Chosen chosen;
    Status status = context_->load(kKernels[i].name, &chosen);
    if (!status.empty()) return status;
  }
  return known ? Status() : "the plugin library has no op " + op;
}

bool library_has(const std::string& kernel) {
  for (int i = 0; i < kKernelCount; ++i) {
    if (kernel == kKernels[i].name) return true;
  }
  return false;
}

}  // namespace l4convert
