#include "lookup.h"

#include <cstdlib>

namespace l4convert {

bool runs_on(const l4_kernel_info& kernel, int sm) {
  if (kernel.exact) return kernel.sm == sm;
  return kernel.sm / 10 == sm / 10 && kernel.sm <= sm;
}

const l4_kernel_info* find_kernel(const std::string& name, int sm) {
  const l4_kernel_info* best = nullptr;
  for (int i = 0; i < kKernelCount; ++i) {
    const l4_kernel_info& kernel = kKernels[i];
    if (name != kernel.name || !runs_on(kernel, sm)) continue;
    if (best == nullptr || best->sm < kernel.sm) best = &kernel;
  }
  return best;
}

std::int64_t constant_of(const l4_kernel_info& kernel, const std::string& name, std::int64_t missing) {
  const std::string text = std::string(",") + kernel.constants;
  const std::size_t at = text.find("," + name + "=");
  if (at == std::string::npos) return missing;
  const char* begin = text.c_str() + at + name.size() + 2;
  char* end = nullptr;
  const long long value = std::strtoll(begin, &end, 10);
  return end != begin && (*end == ',' || *end == '\0') ? value : missing;
}

}  // namespace l4convert
