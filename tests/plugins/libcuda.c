/* A stand-in for libcuda.so.1 in the process of a test: it knows one device and one context, keeps what it is given, and
 * hands launches, copies and fills to callbacks, which do them on host memory (tests/plugins/stand_in.py). */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { kSuccess = 0, kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500 };
enum { kMultiprocessorCount = 16, kMajor = 75, kMinor = 76, kMaxShared = 97 };
enum { kMaxFunctions = 8192, kMaxDynamicShared = 8 };

struct function {
  const void* image;
  char symbol[256];
  int max_dynamic_shared;
};

struct launch {
  const void* image;
  const char* symbol;
  uint32_t grid[3], block[3], shared;
  int32_t max_dynamic_shared;
  void* stream;
  void** parameters;
};

typedef int (*launch_callback)(const struct launch*);
typedef int (*copy_callback)(uint64_t to, uint64_t from, size_t bytes);
typedef int (*fill_callback)(uint64_t to, int value, size_t bytes);

struct device {
  int sm, multiprocessors, max_shared;
  uint64_t context; /* 0: none is current */
  launch_callback launch;
  copy_callback copy;
  fill_callback fill;
};

static struct device device;
static struct function functions[kMaxFunctions];
static int function_count;
static int module_count;
static char failing[64];
static int failing_code;

/* For the tests. */
void stand_in_device(const struct device* to) { device = *to; }
void stand_in_fail(const char* name, int code) {
  strncpy(failing, name, sizeof failing - 1);
  failing_code = code;
}
int stand_in_modules(void) { return module_count; }

static int result(const char* name) { return strcmp(name, failing) == 0 ? failing_code : kSuccess; }

#define CHECK(name)                    \
  do {                                 \
    int failure = result(name);        \
    if (failure != kSuccess) return failure; \
  } while (0)

/* The driver's functions. */
int cuGetErrorName(int code, const char** name) {
  *name = code == kInvalidValue     ? "CUDA_ERROR_INVALID_VALUE"
          : code == kInvalidContext ? "CUDA_ERROR_INVALID_CONTEXT"
          : code == 700             ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                    : NULL;
  return *name == NULL ? kInvalidValue : kSuccess;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == 700 ? "an illegal memory access was encountered" : NULL;
  return *text == NULL ? kInvalidValue : kSuccess;
}

int cuCtxGetCurrent(void** context) {
  CHECK("cuCtxGetCurrent");
  *context = (void*)(uintptr_t)device.context;
  return kSuccess;
}

int cuCtxGetId(void* context, unsigned long long* id) {
  *id = (uintptr_t)context;
  return kSuccess;
}

int cuCtxGetDevice(int* ordinal) {
  *ordinal = 0;
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int ordinal) {
  (void)ordinal;
  switch (attribute) {
    case kMajor:
      *value = device.sm / 10;
      return kSuccess;
    case kMinor:
      *value = device.sm % 10;
      return kSuccess;
    case kMultiprocessorCount:
      *value = device.multiprocessors;
      return kSuccess;
    case kMaxShared:
      *value = device.max_shared;
      return kSuccess;
  }
  return kInvalidValue;
}

int cuModuleLoadData(void** module, const void* image) {
  CHECK("cuModuleLoadData");
  ++module_count;
  *module = (void*)image;
  return kSuccess;
}

int cuModuleGetFunction(void** found, void* module, const char* symbol) {
  CHECK("cuModuleGetFunction");
  if (function_count == kMaxFunctions || strlen(symbol) >= sizeof functions[0].symbol) return kNotFound;
  struct function* function = &functions[function_count++];
  function->image = module;
  strcpy(function->symbol, symbol);
  function->max_dynamic_shared = 48 * 1024;
  *found = function;
  return kSuccess;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  CHECK("cuFuncSetAttribute");
  if (attribute != kMaxDynamicShared || value > device.max_shared) return kInvalidValue;
  ((struct function*)function)->max_dynamic_shared = value;
  return kSuccess;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  CHECK("cuLaunchKernel");
  const struct function* known = function;
  /* The limits of every GPU: a launch outside of them fails. */
  if (gx == 0 || gy == 0 || gz == 0 || gx > 0x7fffffffu || gy > 65535 || gz > 65535 || extra != NULL) return kInvalidValue;
  if (bx * by * bz > 1024 || (int)shared > known->max_dynamic_shared) return kInvalidValue;
  const struct launch launch = {known->image, known->symbol, {gx, gy, gz}, {bx, by, bz},
                                shared,       known->max_dynamic_shared, stream, parameters};
  return device.launch(&launch);
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  (void)stream;
  CHECK("cuMemcpyDtoDAsync");
  return device.copy(to, from, bytes);
}

int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
  (void)stream;
  CHECK("cuMemsetD8Async");
  return device.fill(to, value, bytes);
}
