#include "op.h"

namespace l4convert {

std::string shape_text(const char* name, const nvinfer1::Dims& dims) {
  std::string text = std::string(name) + " [";
  for (std::int32_t i = 0; i < dims.nbDims && i < nvinfer1::Dims::MAX_DIMS; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
  }
  return text + "]";
}

Status match_shapes(const std::vector<Tensor>& tensors, const std::vector<nvinfer1::Dims>& shapes, bool partial,
                    Sizes& sizes) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const nvinfer1::Dims& dims = shapes.at(i);
    if (dims.nbDims != static_cast<std::int32_t>(tensor.dims.size())) {
      return shape_text(tensor.name, dims) + " does not have " + std::to_string(tensor.dims.size()) + " dimensions";
    }
    for (std::size_t axis = 0; axis < tensor.dims.size(); ++axis) {
      const Extent& extent = tensor.dims[axis];
      std::int64_t given = dims.d[axis];
      if (partial && (given < 0 || extent.symbol != '\0')) continue;
      std::int64_t wanted = extent.symbol == '\0' ? extent.fixed : sizes[extent.symbol];
      if (given < 0) return shape_text(tensor.name, dims) + ": dimension " + std::to_string(axis) + " is not known";
      if (wanted < 0) {
        sizes[extent.symbol] = given;
      } else if (given != wanted) {
        return shape_text(tensor.name, dims) + ": dimension " + std::to_string(axis) + " is not " +
               std::to_string(wanted);
      }
    }
  }
  return {};
}

}  // namespace l4convert
