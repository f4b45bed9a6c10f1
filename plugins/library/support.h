// Whether the library has every kernel that an op may launch: asked before an engine is built, or a plugin made.
#pragma once

#include <memory>

#include "op.h"

namespace l4convert {

// Of the device whose context is current in this thread; 0 where there is none.
int device_sm();

// Empty, or which kernel is missing for that compute capability (90: 9.0). 0: some one of those that the library was
// built for must have all of them, since an engine may be built where there is no GPU.
Status check_kernels(const Op& op, int sm);

// Reads an op's fields and makes it, if the library has its kernels. `fields` gets their values.
Status make_op(const OpKind& kind, const nvinfer1::PluginFieldCollection* given, const std::vector<FieldRule>& rules,
               int sm, Fields& fields, std::shared_ptr<const Op>& op);

// The library's table of ops.
const std::vector<const OpKind*>& op_kinds();

}  // namespace l4convert
