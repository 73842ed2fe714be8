// Copies small integer tensors to vectors on the host and back.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <numeric>
#include <vector>

namespace ep {

inline std::vector<int64_t> to_host(const at::Tensor& values) {
  const auto host = values.cpu().to(at::kLong).contiguous();
  const auto* value = host.const_data_ptr<int64_t>();
  return {value, value + host.numel()};
}

inline at::Tensor to_device(const std::vector<int64_t>& values, const at::Tensor& like) {
  return at::tensor(values, at::kLong).to(like.device());
}

// [minimum, maximum].
inline at::Tensor ends_of(const at::Tensor& values) {
  const auto [least, greatest] = values.aminmax();
  return at::stack({least, greatest});
}

inline int64_t sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

}  // namespace ep
