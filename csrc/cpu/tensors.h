// Tensors to pointers, checked.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

namespace prefopt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The data of a contiguous tensor of this dtype and shape; an error names it otherwise.
inline void* checked(const Tensor& tensor, const char* name, ScalarType dtype, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < tensor.dim(); i++) same = tensor.size(i) == shape[static_cast<size_t>(i)];
  STD_TORCH_CHECK(same, name, " has the wrong shape");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  return tensor.data_ptr();
}

template <class T>
T* checked(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  constexpr ScalarType dtype = torch::headeronly::CppTypeToScalarType<std::remove_const_t<T>>::value;
  return static_cast<T*>(checked(tensor, name, dtype, shape));
}

template <class T>
T* checked(const std::optional<Tensor>& tensor, const char* name, const std::vector<int64_t>& shape) {
  return tensor ? checked<T>(*tensor, name, shape) : nullptr;
}

}  // namespace prefopt
