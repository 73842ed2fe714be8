// A backend composed of permute kernels and one exchange of wire rows per operator:
//   plan       plan_send -> exchange of the wire rows' experts -> plan_recv
//   dispatch   pack -> exchange -> (expert_major) expand
//   combine    (expert_major) reduce -> exchange -> sum
// With one rank, nothing is exchanged.
#pragma once

#include "core/backend.h"
#include "local/permute.h"
#include "local/row_exchange.h"

#include <functional>

namespace ep {

// The wire rows that a rank has received in a low-latency operator.
struct LowLatencyArrival {
  at::Tensor wire;                       // uint8 [rows, bytes per wire row], in the order of the source ranks
  std::vector<int64_t> counts, wait_ns;  // per source rank
};

class ComposedBackend : public Backend {
 public:
  PlanResult plan(const at::Tensor& topk_idx, const PlanOptions& options) override;
  Payloads dispatch(
      const PlanTensors& plan,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override;
  Payloads combine(
      const PlanTensors& plan,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override;

  std::unique_ptr<Arrival> dispatch_send(
      const PlanTensors& plan,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override;
  std::unique_ptr<Arrival> combine_send(
      const PlanTensors& plan,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override;

  // On the CPU, both levels work on columns of the rows by turns: one's transfer overlaps the other's work.
  Payloads dispatch_on_grid(
      const GridLevel& rail,
      const GridLevel& node,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override;
  Payloads combine_on_grid(
      const GridLevel& rail,
      const GridLevel& node,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override;

  LowLatencyRows low_latency_dispatch(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) override;
  InFlight low_latency_dispatch_send(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) override;
  LowLatencyRows low_latency_dispatch_recv(const InFlight& sent, const LowLatencyOptions& options) override;
  LowLatencySums low_latency_combine(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) override;
  InFlight low_latency_combine_send(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) override;
  LowLatencySums low_latency_combine_recv(
      const InFlight& sent,
      const at::Tensor& topk_idx,
      int64_t hidden,
      at::ScalarType dtype,
      int64_t num_experts) override;

 protected:
  struct Limits {
    int64_t hidden = -1, num_topk = -1, num_experts = -1;  // -1: no limit
  };
  // Large host buffers that live for one operator: the wire rows sent, and those received if they are not the result.
  enum class WireBuffer { send, recv };

  ComposedBackend(int64_t world_size, const Limits& limits) : world_size_(world_size), limits_(limits) {}

  // Begins an exchange; nullptr with one rank. `send_rows[r]`: rows that this rank will send to r; `recv_rows[r]`: rows
  // that it expects from r, empty if only the exchange determines them.
  virtual std::unique_ptr<RowExchange> begin_exchange(
      OpKind op,
      const std::vector<int64_t>& send_rows,
      const std::vector<int64_t>& recv_rows,
      const std::vector<Agreed>& agreed) = 0;
  // Reports to the peers an error that this rank raised before its exchange began.
  virtual void report(OpKind op, const std::string& failure) = 0;
  virtual at::Tensor make_wire_buffer(WireBuffer which, at::IntArrayRef sizes, const at::TensorOptions& options);

  const int64_t world_size_;

 private:
  class Transfer;
  class Dispatch;
  class Combine;

  template <class F>
  auto reported(OpKind op, const F& f) {
    try {
      return f();
    } catch (const std::exception& error) {
      report(op, message_of(error));
      throw;
    }
  }
  void check_limit(OpKind op, const char* name, int64_t limit, int64_t got) const;
  Allocate allocator(WireBuffer which);

  struct LowLatencySizes;
  struct LowLatencyReturn;
  SendPlan low_latency_send_plan(const char* op, const at::Tensor& topk_idx, const LowLatencySizes& sizes) const;
  void check_low_latency_limits(OpKind op, const LowLatencySizes& sizes, int64_t hidden) const;
  LowLatencyArrival send_tokens(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options);
  LowLatencyReturn send_sums(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts);
  LowLatencyArrival exchange_wire(
      OpKind op,
      const std::vector<int64_t>& send_rows,
      const std::vector<int64_t>& recv_rows,
      const std::vector<Agreed>& agreed,
      const std::function<at::Tensor()>& pack);

  const Limits limits_;
};

}  // namespace ep
