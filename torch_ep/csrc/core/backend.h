// A backend runs whole operators for one group and for tensors of some devices. Each kind of backend registers itself;
// nothing outside a backend's folder asks which one runs.
#pragma once

#include "core/types.h"

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ep {

// Arguments have been checked, except for the limits given to torch_ep.init.
class Backend {
 public:
  virtual ~Backend() = default;

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

  // The low-latency pair, whole and in halves.
  virtual LowLatencyRows low_latency_dispatch(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) = 0;
  virtual InFlight low_latency_dispatch_send(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) = 0;
  virtual LowLatencyRows low_latency_dispatch_recv(const InFlight& sent, const LowLatencyOptions& options) = 0;
  virtual LowLatencySums low_latency_combine(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) = 0;
  virtual InFlight low_latency_combine_send(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) = 0;
  virtual LowLatencySums low_latency_combine_recv(
      const InFlight& sent,
      const at::Tensor& topk_idx,
      int64_t hidden,
      at::ScalarType dtype,
      int64_t num_experts) = 0;
};

// A kind of backend, as its folder registers it.
struct BackendKind {
  const char* name;
  // Kinds are asked in ascending order.
  int order;
  // The backend that runs `op` on tensors like `t` of that group; nullptr: a later kind may. Throws if the group is
  // this kind's and cannot be used.
  std::shared_ptr<Backend> (*find)(OpKind op, const std::string& group_name, int64_t world_size, const at::Tensor& t);
  // Sends an error of this rank alone to the other ranks, which are in `op` or will come to it. Collective with their
  // exchange. False: the group is not this kind's. Throws nothing except what a signal handler raises.
  bool (*report_failure)(OpKind op, const std::string& group_name, const std::string& failure);
  // Throws unless the group is still the process group that torch_ep.init was called with. nullptr: the kind does not
  // check.
  void (*check_group)(OpKind op, const std::string& group_name, int64_t world_size) = nullptr;
};

struct BackendRegistration {
  explicit BackendRegistration(const BackendKind& kind);
};

// Names of the registered kinds, in their order.
std::vector<std::string> backend_names();

// Throws if no backend can run the operator.
std::shared_ptr<Backend> find_backend(OpKind op, std::string_view group_name, int64_t world_size, const at::Tensor& t);

// As BackendKind::check_group, of all kinds.
void check_group(OpKind op, const std::string& group_name, int64_t world_size);

void report_failure(OpKind op, std::string_view group_name, const std::string& failure);

// Number of exchanges that this thread has begun. It shows whether a failed operator had reached its exchange, in which
// its peers learn of the failure.
int64_t& exchanges_begun();

// Runs `check` and returns its result. Reports an error to the other ranks of the group, which would otherwise wait for
// this rank until they time out.
template <class Check>
auto checked(OpKind op, std::string_view group_name, const Check& check) {
  try {
    return check();
  } catch (const std::exception& error) {
    report_failure(op, group_name, message_of(error));
    throw;
  }
}

}  // namespace ep
