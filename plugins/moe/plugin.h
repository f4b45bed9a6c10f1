// l4convert::MoE for TensorRT: its attributes and tensors; plugins/library/plugin.h does the rest.
#pragma once

#include "../library/op.h"
#include "launch.h"

namespace l4convert {

const OpKind& moe_kind();

}  // namespace l4convert
