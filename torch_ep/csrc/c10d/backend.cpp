// The backend of any process group: permute kernels, and an exchange of rows over the communicator's own connections
// (CPU) or over the process group (CUDA).
#include "c10d/communicator.h"
#include "c10d/exchange.h"
#include "core/checks.h"
#include "local/composed_backend.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

namespace ep {
namespace {

class C10dBackend final : public ComposedBackend {
 public:
  explicit C10dBackend(std::shared_ptr<Communicator> comm)
      : ComposedBackend(
            comm->world_size,
            {.hidden = comm->max_hidden, .num_topk = comm->max_topk, .num_experts = comm->max_experts}),
        comm_(std::move(comm)) {}

 protected:
  std::unique_ptr<RowExchange> begin_exchange(
      OpKind op,
      const std::vector<int64_t>& send_rows,
      const std::vector<int64_t>& recv_rows,
      const std::vector<Agreed>& agreed) override {
    return std::make_unique<Exchange>(comm_, op, send_rows, recv_rows, agreed);
  }

  void report(OpKind op, const std::string& failure) override { send_failure(op, comm_, failure); }

  at::Tensor make_wire_buffer(WireBuffer which, at::IntArrayRef sizes, const at::TensorOptions& options) override {
    if (options.device().is_cpu()) {
      return comm_->channel->wire_buffer(static_cast<size_t>(which), sizes, options);
    }
    return ComposedBackend::make_wire_buffer(which, sizes, options);
  }

 private:
  std::shared_ptr<Communicator> comm_;
};

std::shared_ptr<Backend>
find_c10d(OpKind op, const std::string& group_name, int64_t world_size, const at::Tensor& /*t*/) {
  return std::make_shared<C10dBackend>(find_communicator(op, group_name, world_size));
}

bool report_over_c10d(OpKind op, const std::string& group_name, const std::string& failure) {
  send_failure(op, guess_communicator(group_name), failure);
  return true;
}

void check_c10d_group(OpKind op, const std::string& group_name, int64_t world_size) {
  find_communicator(op, group_name, world_size);
}

// Last in order: it runs every group that no other kind runs, or throws the reason why it cannot.
const BackendRegistration registration(
    {.name = "c10d",
     .order = 2,
     .find = find_c10d,
     .report_failure = report_over_c10d,
     .check_group = check_c10d_group});

bool init(
    std::string group_name,
    std::string connections,
    int64_t timeout_ms,
    std::optional<int64_t> max_tokens_per_rank,
    std::optional<int64_t> hidden,
    std::optional<int64_t> num_topk,
    std::optional<int64_t> num_experts,
    std::optional<int64_t> low_latency_tokens,
    std::string backend,
    int64_t num_sms,
    std::string provider,
    std::string on_timeout,
    at::IntArrayRef global_ranks) {
  return init_communicator(
      group_name,
      connections,
      {timeout_ms,
       max_tokens_per_rank,
       hidden,
       num_topk,
       num_experts,
       low_latency_tokens,
       backend,
       num_sms,
       provider,
       on_timeout,
       global_ranks.vec()});
}

void destroy(std::string group_name) {
  destroy_communicator(group_name);
}

bool is_connected_to_all(std::string group_name) {
  return is_connected(group_name);
}

// Messages and bytes sent since the ranks connected, and bytes of headers held.
std::vector<int64_t> traffic_of(std::string group_name) {
  const auto comm = guess_communicator(group_name);
  TORCH_CHECK(
      comm && comm->group_name == group_name, "torch_ep: expected an initialized group, got '", group_name, "'");
  const auto& traffic = comm->channel->traffic();
  return {traffic.messages, traffic.bytes, comm->channel->header_bytes()};
}

void set_init_hint(std::string hint) {
  hint_at_init(hint);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ep, m) {
  m.def(
      "_init(str group_name, str connections, *, int timeout_ms, int? max_tokens_per_rank, int? hidden, int? num_topk, "
      "int? num_experts, int? low_latency_tokens, str backend, int num_sms, str provider, str on_timeout, "
      "int[] global_ranks) -> bool",
      &init);
  m.def("_is_connected(str group_name) -> bool", &is_connected_to_all);
  m.def("_orphaned() -> str[]", &orphaned_communicators);
  m.def("_hint_at_init(str hint) -> ()", &set_init_hint);
  m.def("_traffic(str group_name) -> int[]", &traffic_of);
  m.def("_destroy(str group_name) -> ()", &destroy);
}

}  // namespace ep
