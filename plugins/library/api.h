/* The C interface of libl4convert_plugins.so: what is in it, and one call of each op without TensorRT.
 *
 * Functions that return int return 0 when they are done; otherwise l4_last_error() is one line that says why. Calls may
 * come from any thread; they work in the CUDA context that is current, put their work on the stream and return.
 */
#ifndef L4CONVERT_PLUGINS_API_H
#define L4CONVERT_PLUGINS_API_H

#include <stddef.h>
#include <stdint.h>

#include "../long_context_attention/launch.h"
#include "../moe/launch.h"

/* Everything else in the library is hidden. */
#define L4_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* One kernel for one SM. */
struct l4_kernel_info {
  const char* name;        /* the variant */
  const char* op;          /* the op whose kernel it is */
  int32_t sm;              /* compiled for: 90 is 9.0 */
  int32_t exact;           /* 1: runs on that SM only; 0: also on later ones of the same major number */
  const void* image;       /* the cubin */
  uint64_t size;           /* its bytes */
  const char* symbol;      /* the kernel's name in it */
  int32_t warps;           /* of a block */
  int32_t shared;          /* bytes of shared memory of a block */
  const char* types;       /* a letter a parameter: p pointer, i int32, l int64, f float32; I, L: a multiple of 16 */
  const char* parameters;  /* "x:*bf16,rows:i32" in order, for people and tools */
  const char* constants;   /* "BLOCK=128,MASKED=1" : the constexpr parameters, in the same form */
  int32_t registers;       /* of a thread */
  int32_t spills;          /* bytes of local memory of a thread */
  int32_t blocks;          /* that fit a multiprocessor at once */
};

/* One argument for l4_launch: type is a letter as in l4_kernel_info.types (lower case). */
struct l4_argument {
  int32_t type;
  union {
    const void* pointer;
    int32_t int32;
    int64_t int64;
    float float32;
  } value;
};

L4_API const char* l4_version(void);
/* Of this thread's last call that failed; valid until the next one fails. */
L4_API const char* l4_last_error(void);
L4_API int32_t l4_kernel_count(void);
/* NULL where there is no kernel of this number. */
L4_API const struct l4_kernel_info* l4_kernel(int32_t index);

L4_API int l4_moe_check(const struct l4_moe* moe);
L4_API int l4_moe_workspace(const struct l4_moe* moe, int64_t tokens, size_t* bytes);
L4_API int l4_moe_enqueue(const struct l4_moe* moe, int64_t tokens, const struct l4_moe_buffers* buffers, void* stream);

L4_API int l4_attention_check(const struct l4_attention* attention);
L4_API int l4_attention_workspace(const struct l4_attention* attention, const struct l4_attention_shape* shape,
                           int32_t multiprocessors, size_t* bytes);
L4_API int l4_attention_enqueue(const struct l4_attention* attention, const struct l4_attention_shape* shape,
                         const struct l4_attention_buffers* buffers, void* stream);

/* Load every kernel of one op ("moe", "long_context_attention") into the current context, so that no later call does
 * (loading is not allowed while a stream is captured). */
L4_API int l4_preload(const char* op);
/* Launch one kernel by itself, as for timing it. */
L4_API int l4_launch(const char* kernel, uint32_t x, uint32_t y, uint32_t z, const struct l4_argument* arguments,
              int32_t count, void* stream);

#ifdef __cplusplus
}
#endif
#endif
