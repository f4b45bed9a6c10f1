// A Launcher on the CUDA driver's API, which is loaded with dlopen when it is first needed: the library links to
// nothing of CUDA, and can be loaded (and asked what it holds) where there is no driver.
#pragma once

#include "launcher.h"

namespace l4convert {

class DriverLauncher final : public Launcher {
 public:
  // `stream` is a CUstream of the context that is current now and during every call. Whatever is wrong with the driver
  // or the context is returned by the calls that follow.
  explicit DriverLauncher(void* stream);

  Status launch(const std::string& kernel, Grid grid, const std::vector<Argument>& arguments) override;
  Status zero(void* to, std::size_t bytes) override;
  Status copy(void* to, const void* from, std::size_t bytes) override;
  int multiprocessors() const override;
  int sm() const override;
  bool has(const std::string& kernel) const override;
  std::int64_t constant(const std::string& kernel, const std::string& name, std::int64_t missing) const override;

  // Empty where there is a driver and a current context.
  const Status& ready() const { return status_; }
  // Loads every kernel of an op, so that no later launch has to.
  Status preload(const std::string& op);

 private:
  struct Context;  // of driver.cpp: what is loaded in one CUDA context

  static Status current(Context** context);

  void* stream_;
  Context* context_ = nullptr;
  Status status_;
};

// Whether the library has a kernel of this name for any SM: what plugin creation asks where there is no GPU.
bool library_has(const std::string& kernel);

}  // namespace l4convert
