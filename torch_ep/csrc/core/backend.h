// A backend runs whole operators for one group and for tensors of some devices. Each kind of backend registers itself;
// nothing outside a backend's folder asks which one runs.
#pragma once

#include "core/in_flight.h"
#include "core/types.h"

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ep {

class Backend;

// One level of an exchange on a grid of nodes: the rail or the node of this rank.
struct GridLevel {
  Backend& backend;
  const PlanTensors& plan;
  std::string_view group_name;
};

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

  // The first halves of dispatch and combine: see Note [In flight]. By default they wait for the results.
  virtual std::unique_ptr<Arrival> dispatch_send(
      const PlanTensors& plan,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales);
  virtual std::unique_ptr<Arrival> combine_send(
      const PlanTensors& plan,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales);

  // dispatch and combine on two levels: see Note [Linked groups]. By default one level follows the other.
  // `rail.backend` is this backend.
  virtual Payloads dispatch_on_grid(
      const GridLevel& rail,
      const GridLevel& node,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales);
  virtual Payloads combine_on_grid(
      const GridLevel& rail,
      const GridLevel& node,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales);

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

// Note [Linked groups]
// On a grid of nodes, one call of a public function is an exchange among the ranks of a rail and an exchange inside a
// node: plan and dispatch exchange over the rail first, combine inside the node first. A failure in one of them reaches
// the ranks of that group alone. The others wait in the second exchange for a rank that will not come. So the two
// groups of a rank are linked: an operator that throws on one group reports the failure to the other one. Every rank of
// a node is on another rail, so all ranks learn of it, each takes part in the same number of exchanges as its peers,
// and the groups stay usable. The second exchange waits a little longer than the first, so that a report comes in time.

// Links the groups of this rank. Replaces earlier links of either.
void link_groups(const std::string& rail, const std::string& node);
// A name without a link is not an error.
void unlink_group(const std::string& group_name);
bool is_linked(const std::string& group_name);
// Whether `op` exchanges over this group after it has exchanged over the linked group.
bool is_second_exchange(OpKind op, const std::string& group_name);
// Reports a failure in `op` on this group to the ranks of the linked group, if there is one.
void report_to_linked_group(OpKind op, std::string_view group_name, const std::string& failure);

// Reports to the group and to the group that is linked with it.
void report_failure(OpKind op, std::string_view group_name, const std::string& failure);

// Number of exchanges that this thread has begun. It shows whether a failed operator had reached its exchange, in which
// its peers learn of the failure.
int64_t& exchanges_begun();

// Runs `run`, a backend's part of an operator, and returns its result. The backend reports a failure to the group
// itself.
template <class Run>
auto linked(OpKind op, std::string_view group_name, const Run& run) {
  try {
    return run();
  } catch (const std::exception& error) {
    report_to_linked_group(op, group_name, message_of(error));
    throw;
  }
}

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
