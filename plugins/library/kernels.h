// The kernels in this library: a table and images that `l4convert plugins build` generates (build.py).
#pragma once

#include "api.h"

namespace l4convert {

extern const l4_kernel_info kKernels[];
extern const int kKernelCount;
extern const char* const kVersion;

}  // namespace l4convert
