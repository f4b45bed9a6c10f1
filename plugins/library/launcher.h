// What the launch code of an op needs of a GPU: kernels by name, a stream, two facts about the device.
//
// The launch code (plugins/<op>/launch.cpp) knows neither CUDA nor TensorRT: only this. driver.cpp implements it on the
// CUDA driver's API; tests may implement it on anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace l4convert {

// Empty: done. Otherwise one line that tells a person what is wrong.
using Status = std::string;

// One argument of a kernel, in the kernel's order, constexpr parameters left out.
class Argument {
 public:
  enum class Type { kPointer, kInt32, kInt64, kFloat32 };

  static Argument pointer(const void* value) {
    Argument argument(Type::kPointer);
    argument.value_.address = value;
    return argument;
  }
  static Argument i32(std::int32_t value) {
    Argument argument(Type::kInt32);
    argument.value_.int32 = value;
    return argument;
  }
  static Argument i64(std::int64_t value) {
    Argument argument(Type::kInt64);
    argument.value_.int64 = value;
    return argument;
  }
  static Argument f32(float value) {
    Argument argument(Type::kFloat32);
    argument.value_.float32 = value;
    return argument;
  }

  Type type() const { return type_; }
  // Where the value lies: what cuLaunchKernel reads 8 (pointer, int64) or 4 bytes from. Valid as long as this object.
  const void* data() const { return &value_; }
  const void* address() const { return value_.address; }
  std::int64_t integer() const { return type_ == Type::kInt32 ? value_.int32 : value_.int64; }

 private:
  explicit Argument(Type type) : type_(type) {}

  Type type_;
  union {
    const void* address;
    std::int32_t int32;
    std::int64_t int64;
    float float32;
  } value_ = {nullptr};
};

struct Grid {
  std::uint32_t x = 1, y = 1, z = 1;
};

// One call's stream, in the CUDA context that is current. Everything is put on the stream and returns at once.
class Launcher {
 public:
  virtual ~Launcher() = default;

  // Runs the kernel `kernel` (a Variant's name) as it was compiled for this device. An empty grid launches nothing.
  virtual Status launch(const std::string& kernel, Grid grid, const std::vector<Argument>& arguments) = 0;
  // Sets `bytes` bytes of device memory to zero.
  virtual Status zero(void* to, std::size_t bytes) = 0;
  // Copies device memory to device memory; the two do not overlap.
  virtual Status copy(void* to, const void* from, std::size_t bytes) = 0;

  virtual int multiprocessors() const = 0;
  // Compute capability: 90 for 9.0, 103 for 10.3.
  virtual int sm() const = 0;
  // Whether the library has this kernel for this device.
  virtual bool has(const std::string& kernel) const = 0;
  // An integer (or bool) constexpr of the kernel as it was compiled for this device, as a tile size that the grid
  // depends on; `missing` where the kernel or the constant is not there.
  virtual std::int64_t constant(const std::string& kernel, const std::string& name, std::int64_t missing = 0) const = 0;
};

}  // namespace l4convert
