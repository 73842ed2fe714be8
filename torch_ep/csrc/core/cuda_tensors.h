// Converts tensors to kernel arguments, and allocates results.
#pragma once

#include "core/element.h"

#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>

namespace ep {

inline Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Element::f64;
    case at::kFloat:
      return Element::f32;
    case at::kBFloat16:
      return Element::bf16;
    default:
      return Element::f16;
  }
}

template <class T>
const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// at::empty on the device of `like`, without the overhead of the dispatcher.
inline at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like, at::ScalarType type) {
  return at::detail::empty_cuda(sizes, type, like.device(), std::nullopt);
}

inline at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
  return empty(sizes, like, like.scalar_type());
}

}  // namespace ep
