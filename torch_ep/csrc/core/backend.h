// Backends that are more than a process group: they run whole operators on tensors of their device, under the same
// schemas and plans. So far one, nvlink (csrc/nvlink); every other group moves its rows by c10d/exchange.h.
#pragma once

#include "c10d/communicator.h"
#include "c10d/exchange.h"
#include "core/checks.h"
#include "ops/ops.h"

namespace ep {

struct PlanOptions {
  int64_t num_experts;
  bool expert_major;
  int64_t alignment;
  std::optional<int64_t> capacity;
  std::optional<int64_t> max_tokens_per_rank;
};

enum class Quantize : int64_t { none, fp8, fp8_pow2, fp8_ue8m0 };

// Of a low-latency dispatch, the same on every rank.
struct LowLatencyOptions {
  Quantize quantize;
  int64_t num_experts, num_topk, max_tokens_per_rank, hidden;
  at::ScalarType dtype;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Arguments are checked, but for the limits of `init`.
  virtual PlanResult plan(const at::Tensor& topk_idx, const PlanOptions& options) = 0;
  virtual Payloads dispatch(
      const PlanTensors& plan,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) = 0;
  virtual Payloads combine(
      const PlanTensors& plan,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) = 0;

  // The low-latency pair, whole and in halves; a half that sends returns its ticket.
  virtual LowLatencyRows low_latency_dispatch(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) = 0;
  virtual at::Tensor low_latency_dispatch_send(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) = 0;
  virtual LowLatencyRows low_latency_dispatch_recv(const at::Tensor& ticket, const LowLatencyOptions& options) = 0;
  // (sums, wait_ns)
  virtual std::tuple<at::Tensor, at::Tensor> low_latency_combine(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) = 0;
  virtual at::Tensor low_latency_combine_send(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) = 0;
  virtual std::tuple<at::Tensor, at::Tensor> low_latency_combine_recv(
      const at::Tensor& ticket,
      const at::Tensor& topk_idx,
      int64_t hidden,
      at::ScalarType dtype,
      int64_t num_experts) = 0;

  virtual bool takes(const at::Tensor& t) const = 0;
  virtual int64_t world_size() const = 0;

  // Bits of ranks that the low-latency pair of this rank leaves out; `mask` adds some.
  virtual int64_t masked() const = 0;
  virtual void mask(int64_t ranks) = 0;

  // Local halves of torch_ep.reset: waits for the device and tells the last exchange; then goes on from a later one.
  virtual int64_t settle() = 0;
  virtual void restart(int64_t epoch) = 0;
  // Whether nothing of it runs any more, so that its memory may go.
  virtual bool is_idle() const = 0;
};

bool has_backend(const std::string& group_name);
// The backend for `t` on that group, or nullptr. Throws as find_communicator does.
std::shared_ptr<Backend>
find_backend(const std::string& group_name, int64_t world_size, const at::Tensor& t, OpKind op);

struct NvlinkOptions {
  std::string group_name;
  int64_t rank, world_size;
  at::IntArrayRef buffers;  // address of every rank's symmetric buffer; zeroed before
  at::IntArrayRef limits;   // max_tokens_per_rank, hidden, num_topk, num_experts, low_latency_tokens (0: none)
  int64_t num_sms;
  int64_t timeout_ms;
  // Ranks without a process group: one alone, or several in one process.
  bool groupless;
  // In the low-latency pair a timeout masks the peer, instead of failing.
  bool masks;
};

bool has_nvlink();
// Whether its kernels were built for the current CUDA device.
bool nvlink_runs();
// Experts that it takes at most.
int64_t nvlink_most_experts(int64_t world_size);
// Bytes of symmetric memory of each rank.
int64_t nvlink_bytes(int64_t world_size, at::IntArrayRef limits, int64_t num_sms);
// Local; the group's communicator has to be there before unless groupless. Returns what destroy_backend would, of the
// one that it replaces.
bool init_nvlink(const NvlinkOptions& options);
int64_t settle_nvlink(const std::string& group_name);
void restart_nvlink(const std::string& group_name, int64_t epoch);
int64_t masked_nvlink(const std::string& group_name);
void mask_nvlink(const std::string& group_name, int64_t ranks);
// False: some of it still runs on the device, so its buffers have to stay. A name without a backend is no error.
bool destroy_backend(const std::string& group_name);

}  // namespace ep
