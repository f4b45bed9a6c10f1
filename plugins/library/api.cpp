#include "api.h"

#include <exception>

#include "driver.h"
#include "kernels.h"

namespace {

using l4convert::Argument;
using l4convert::DriverLauncher;
using l4convert::Status;

thread_local std::string last_error;

int failed(const Status& status) {
  if (status.empty()) return 0;
  last_error = status;
  return 1;
}

// Runs `call`, which returns a Status, and turns whatever comes of it into a return code.
template <typename Call>
int guarded(Call call) noexcept {
  try {
    return failed(call());
  } catch (const std::exception& error) {
    return failed(std::string("out of host memory, or a defect: ") + error.what());
  } catch (...) {
    return failed("a defect: an exception of an unknown kind");
  }
}

Status convert(const l4_argument& argument, std::vector<Argument>* to) {
  switch (argument.type) {
    case 'p':
      to->push_back(Argument::pointer(argument.value.pointer));
      return {};
    case 'i':
      to->push_back(Argument::i32(argument.value.int32));
      return {};
    case 'l':
      to->push_back(Argument::i64(argument.value.int64));
      return {};
    case 'f':
      to->push_back(Argument::f32(argument.value.float32));
      return {};
    default:
      return "argument " + std::to_string(to->size()) + " is of no type that is p, i, l or f";
  }
}

}  // namespace

extern "C" {

const char* l4_version(void) { return l4convert::kVersion; }

const char* l4_last_error(void) { return last_error.c_str(); }

int32_t l4_kernel_count(void) { return l4convert::kKernelCount; }

const l4_kernel_info* l4_kernel(int32_t index) {
  return index < 0 || index >= l4convert::kKernelCount ? nullptr : &l4convert::kKernels[index];
}

int l4_moe_check(const l4_moe* moe) {
  return guarded([&] { return l4convert::check(*moe); });
}

int l4_moe_workspace(const l4_moe* moe, int64_t tokens, size_t* bytes) {
  return guarded([&] {
    Status status = l4convert::check(*moe, tokens);
    if (status.empty()) *bytes = l4convert::workspace_bytes(*moe, tokens);
    return status;
  });
}

int l4_moe_enqueue(const l4_moe* moe, int64_t tokens, const l4_moe_buffers* buffers, void* stream) {
  return guarded([&] {
    Status status = l4convert::check(*moe);
    if (!status.empty()) return status;
    DriverLauncher launcher(stream);
    return launcher.ready().empty() ? l4convert::enqueue(launcher, *moe, tokens, *buffers) : launcher.ready();
  });
}

int l4_attention_check(const l4_attention* attention) {
  return guarded([&] { return l4convert::check(*attention); });
}

int l4_attention_workspace(const l4_attention* attention, const l4_attention_shape* shape, int32_t multiprocessors,
                           size_t* bytes) {
  return guarded([&] {
    Status status = l4convert::check(*attention, *shape);
    if (status.empty()) *bytes = l4convert::workspace_bytes(*attention, *shape, multiprocessors);
    return status;
  });
}

int l4_attention_enqueue(const l4_attention* attention, const l4_attention_shape* shape,
                         const l4_attention_buffers* buffers, void* stream) {
  return guarded([&] {
    Status status = l4convert::check(*attention);
    if (!status.empty()) return status;
    DriverLauncher launcher(stream);
    return launcher.ready().empty() ? l4convert::enqueue(launcher, *attention, *shape, *buffers) : launcher.ready();
  });
}

int l4_preload(const char* op) {
  return guarded([&] { return DriverLauncher(nullptr).preload(op); });
}

int l4_launch(const char* kernel, uint32_t x, uint32_t y, uint32_t z, const l4_argument* arguments, int32_t count,
              void* stream) {
  return guarded([&] {
    std::vector<Argument> converted;
    for (int32_t i = 0; i < count; ++i) {
      const Status status = convert(arguments[i], &converted);
      if (!status.empty()) return status;
    }
    return DriverLauncher(stream).launch(kernel, {x, y, z}, converted);
  });
}

}  // extern "C"
