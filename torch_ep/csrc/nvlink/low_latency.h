// The low-latency pair on the host: tensors to kernel arguments.
#pragma once

#include "core/backend.h"
#include "nvlink/params.h"

namespace ep::nvlink {

// Limits of `torch_ep.init`.
struct LowLatencyLimits {
  int64_t hidden, num_topk, num_experts;
};

// Implements Backend's low-latency functions on a stream of the current device.
class LowLatencyPair {
 public:
  // `multiprocessors`: as launch_low_latency_dispatch takes it.
  LowLatencyPair(const Comm& comm, const LowLatencyLimits& limits, int multiprocessors)
      : comm_(comm), layout_(comm.low_latency), limits_(limits), multiprocessors_(multiprocessors) {}

  LowLatencyRows dispatch(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options,
      cudaStream_t stream) const;
  at::Tensor dispatch_send(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options,
      cudaStream_t stream) const;
  LowLatencyRows dispatch_recv(const at::Tensor& status, const LowLatencyOptions& options, cudaStream_t stream) const;
  std::tuple<at::Tensor, at::Tensor> combine(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts,
      cudaStream_t stream) const;
  at::Tensor combine_send(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts,
      cudaStream_t stream) const;
  std::tuple<at::Tensor, at::Tensor> combine_recv(
      const at::Tensor& status,
      const at::Tensor& topk_idx,
      int64_t hidden,
      at::ScalarType dtype,
      int64_t num_experts,
      cudaStream_t stream) const;

 private:
  LowLatencyDispatchArgs args_of(const LowLatencyOptions& options, Part part) const;
  LowLatencyCombineArgs
  args_of(int64_t hidden, at::ScalarType dtype, const at::Tensor& topk_idx, int64_t num_experts, Part part) const;
  LowLatencyRows
  make_results(LowLatencyDispatchArgs& args, const LowLatencyOptions& options, const at::TensorOptions& on) const;
  std::tuple<at::Tensor, at::Tensor> make_sums(LowLatencyCombineArgs& args, int64_t hidden, const at::TensorOptions& on)
      const;
  void set_results(
      LowLatencyCombineArgs& args,
      const at::Tensor& y,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row) const;
  at::Tensor make_status(const at::Tensor& like) const;
  void check_row(OpKind op, int64_t num_topk, int64_t num_experts, int64_t hidden, int64_t row_bytes) const;
  void check_wire_row(OpKind op, int64_t bytes) const;

  const Comm comm_;
  const LowLatencyLayout layout_;
  const LowLatencyLimits limits_;
  const int multiprocessors_;
};

}  // namespace ep::nvlink
