/* One call of a plugin on real buffers, from first to last as an engine makes it: created from fields, configured,
 * serialized, created again as a loaded engine does, attached, told its shapes, enqueued. For Python (conformance.py),
 * which has the buffers and compares. Functions that return int return 0 when they are done; `why` gets one line. */
#ifndef L4CONVERT_CONFORMANCE_CALL_H
#define L4CONVERT_CONFORMANCE_CALL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { L4_MOST_DIMS = 8, L4_WHY_BYTES = 512 };

/* A field: kind 'i' (integer), 'f' (real) or 's' (text). */
struct l4_field {
  const char* name;
  int32_t kind;
  int32_t integer;
  float real;
  const char* text;
};

/* A tensor: its element type is what the plugin takes there, a number of nvinfer1::DataType. */
struct l4_tensor {
  int32_t type;
  int32_t rank;
  int64_t dims[L4_MOST_DIMS];
};

struct l4_call;

/* The report of all checks, as JSON; to be freed with l4_conformance_free. */
char* l4_conformance_run(const char* library);
void l4_conformance_free(char* text);

/* Prepare a call. `inputs` have their dims; `types` of them are filled in, and all of `outputs`, which has room for
 * `output_room`. NULL where the plugin refuses something. */
struct l4_call* l4_conformance_open(const char* library, const char* plugin, const struct l4_field* fields,
                                    int32_t field_count, struct l4_tensor* inputs, int32_t input_count,
                                    struct l4_tensor* outputs, int32_t output_room, int32_t* output_count,
                                    size_t* workspace, char* why);
/* The input that an output is, or -1. */
int32_t l4_conformance_alias(struct l4_call* call, int32_t output);
int l4_conformance_enqueue(struct l4_call* call, const void* const* inputs, void* const* outputs, void* workspace,
                           void* stream, char* why);
void l4_conformance_close(struct l4_call* call);

#ifdef __cplusplus
}
#endif
#endif
