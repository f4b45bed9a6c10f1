// Which of the library's kernels serves a device: asked of devices that are there, and of others before engines are
// built for them.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

namespace l4convert {

// Whether a device of this compute capability (103: 10.3) runs the kernel.
bool runs_on(const l4_kernel_info& kernel, int sm);
// The kernel of that name that suits the compute capability best; null where there is none.
const l4_kernel_info* find_kernel(const std::string& name, int sm);
// An integer constexpr of a kernel; `missing` where it has none of that name.
std::int64_t constant_of(const l4_kernel_info& kernel, const std::string& name, std::int64_t missing);

}  // namespace l4convert
