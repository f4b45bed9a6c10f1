// Arithmetic of sizes that the launch code of every op has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace l4convert {

// Pieces of a workspace begin at multiples of it.
constexpr std::size_t kAlignment = 256;

inline std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace l4convert
