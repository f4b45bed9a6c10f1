// The part of the CUDA driver's API that the library calls, declared here so that no CUDA installation is needed to
// build it. Names, values and argument lists are those of NVIDIA's cuda.h.
#pragma once

#include <cstddef>

#include "launcher.h"

namespace l4convert::cuda {

using Result = int;
using Device = int;
using Pointer = unsigned long long;
using Context = struct ContextTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using Stream = struct StreamTag*;

constexpr Result kSuccess = 0;
// CUdevice_attribute
constexpr int kMultiprocessorCount = 16;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxSharedMemoryOptin = 97;
// CUfunction_attribute
constexpr int kMaxDynamicSharedSize = 8;

struct Api {
  Result (*get_error_name)(Result, const char**);
  Result (*get_error_string)(Result, const char**);
  Result (*context_get_current)(Context*);
  // CUDA 12: an address may serve a new context after the old one is gone, a number never does. May be null.
  Result (*context_get_id)(Context, unsigned long long*);
  Result (*context_get_device)(Device*);
  Result (*device_get_attribute)(int*, int, Device);
  Result (*module_load_data)(Module*, const void*);
  // CUDA 12.4: where modules load lazily, this is what loads. May be null.
  Result (*function_load)(Function);
  Result (*module_get_function)(Function*, Module, const char*);
  Result (*function_set_attribute)(Function, int, int);
  Result (*launch_kernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**,
                          void**);
  Result (*copy_device)(Pointer, Pointer, std::size_t, Stream);
  Result (*set_bytes)(Pointer, unsigned char, std::size_t, Stream);
};

// The driver, loaded once; null with a reason where there is none.
const Api* api(Status* why);
// "cuLaunchKernel: CUDA_ERROR_INVALID_VALUE (invalid argument)"
Status explain(const Api& api, const std::string& what, Result result);

}  // namespace l4convert::cuda
