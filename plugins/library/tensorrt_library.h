// TensorRT's own library, if this process has it: nothing here is linked against it.
#pragma once

#include <string>

namespace l4convert {

// The address of a function that libnvinfer exports; null where no such library is loaded.
void* tensorrt_function(const char* name);

// Whether the TensorRT of this process has the major number of the headers that this library was built with, or there is
// none. Plugins and their creators are the same to TensorRT 10 and 11; its registry and its logger are not, and calling
// a method of those would be calling another one.
bool tensorrt_fits();

// Whether a function of the object file that holds `address` is among those that wait for this one to return.
bool called_from_object_of(const void* address) noexcept;

}  // namespace l4convert
