// The checks: every method of TensorRT's plugin contract, each driven with what is right and with what is not.
#pragma once

#include "report.h"
#include "subject.h"

namespace l4convert::conformance {

// Runs all checks on a library. Attention is checked with the first of some head sizes that the library has, and both
// ops with the types of activations that it has kernels for.
Report check_library(const std::string& path);

// creation.cpp: fields taken and refused, serialization, clones. False where no plugin can be made at all.
bool check_creation(const Library& library, const Case& given, Report& report);
// tensors.cpp: types, shapes, formats, configuration, workspace, aliases, shape changes.
void check_tensors(const Library& library, const Case& given, Report& report);

}  // namespace l4convert::conformance
