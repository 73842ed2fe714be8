// Every schema of torch_ep. Importing the extension is what registers them. The fakes are in torch_ep/meta.py, the
// autograd formulas in torch_ep/ops.py.
#include "ops/ops.h"

#include "core/backend.h"
#include "local/permute.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>

namespace {

bool init(
    std::string group_name,
    std::string connections,
    int64_t timeout_ms,
    at::IntArrayRef limits,
    at::IntArrayRef choice) {
  return ep::init_communicator(group_name, connections, timeout_ms, limits, choice);
}

void tell(std::string op, std::string group_name, std::string failure) {
  ep::tell_failure(ep::kind_of(op), c10::string_view(group_name), failure);
}

bool is_connected(std::string group_name) {
  return ep::is_connected(group_name);
}

void hint_at_init(std::string hint) {
  ep::hint_at_init(hint);
}

void destroy(std::string group_name) {
  ep::destroy_communicator(group_name);
}

bool destroy_nvlink(std::string group_name) {
  return ep::destroy_backend(group_name);
}

bool init_nvlink(
    std::string group_name,
    int64_t rank,
    int64_t world_size,
    at::IntArrayRef buffers,
    at::IntArrayRef limits,
    int64_t num_sms,
    int64_t timeout_ms,
    bool groupless,
    bool masks) {
  return ep::init_nvlink({group_name, rank, world_size, buffers, limits, num_sms, timeout_ms, groupless, masks});
}

int64_t nvlink_bytes(int64_t world_size, at::IntArrayRef limits, int64_t num_sms) {
  // With these the number of bytes does not overflow, whose buffers would be too small.
  constexpr int64_t most = int64_t{1} << 24;
  constexpr std::array<const char*, 5> names{
      "max_tokens_per_rank", "hidden", "num_topk", "num_experts", "low_latency_tokens"};
  TORCH_CHECK_VALUE(limits.size() == names.size(), "torch_ep.init: expected ", names.size(), " limits, got ", limits);
  for (size_t i = 0; i < names.size(); ++i) {
    TORCH_CHECK_VALUE(
        limits[i] <= most,
        "torch_ep.init: expected ",
        names[i],
        " of at most ",
        most,
        " on backend nvlink, got ",
        limits[i]);
  }
  return ep::nvlink_bytes(world_size, limits, num_sms);
}

int64_t settle_nvlink(std::string group_name) {
  return ep::settle_nvlink(group_name);
}

void restart_nvlink(std::string group_name, int64_t epoch) {
  ep::restart_nvlink(group_name, epoch);
}

int64_t masked_nvlink(std::string group_name) {
  return ep::masked_nvlink(group_name);
}

void mask_nvlink(std::string group_name, int64_t ranks) {
  ep::mask_nvlink(group_name, ranks);
}

void force_aten(bool on) {
  ep::force_aten = on;
}

void force_parts(bool on) {
  ep::force_parts = on;
}

}  // namespace

TORCH_LIBRARY(ep, m) {
  m.set_python_module("torch_ep.meta");

  // Exact: as many rows as arrive. The one exchange that waits for the device, so CUDA graphs are cut here.
  m.def(
      "plan(Tensor topk_idx, int num_experts, str layout, int alignment, int world_size, str group_name, "
      "int? max_tokens_per_rank=None, Tensor? after=None) -> (Tensor send_row, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, Tensor offsets, Tensor tokens_per_expert, Tensor num_dropped)",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});
  m.def(
      "plan.capacity(Tensor topk_idx, int num_experts, str layout, int alignment, SymInt capacity, int world_size, "
      "str group_name, int? max_tokens_per_rank=None, Tensor? after=None) -> (Tensor send_row, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, Tensor offsets, Tensor tokens_per_expert, Tensor num_dropped)",
      {at::Tag::pt2_compliant_tag});

  // Each is the other's transpose, payload by payload: rows, numbers per (token, slot), and scales that go with rows.
  m.def(
      "dispatch(Tensor x, Tensor? topk_weights, Tensor? scales, Tensor send_row, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, str layout, str group_name, Tensor? after=None) "
      "-> (Tensor, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine(Tensor y, Tensor? topk_weights, Tensor? scales, Tensor send_row, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, str layout, str group_name, Tensor? after=None) "
      "-> (Tensor, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine.weighted(Tensor y, Tensor row_weights, Tensor send_row, Tensor send_counts, Tensor recv_counts, "
      "Tensor recv_map, str layout, str group_name, Tensor? after=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});

  // For decoding: no plan, static shapes, inference only. `quantize`: '' for none. The halves are joined by `ticket`
  // ([2, world_size]: rows from each rank, wait_ns) and `in_flight` (on c10d: the data, in_flight_rows records).
  m.def(
      "low_latency_dispatch(Tensor x, Tensor topk_idx, Tensor? topk_weights, str quantize, int num_experts, "
      "int max_tokens_per_rank, int world_size, str group_name, Tensor? after=None) -> (Tensor rows, Tensor? scales, "
      "Tensor tokens_per_expert, Tensor source_offsets, Tensor recv_pair, Tensor recv_row, Tensor row_weights, "
      "Tensor wait_ns)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_dispatch_send(Tensor x, Tensor topk_idx, Tensor? topk_weights, str quantize, int num_experts, "
      "int max_tokens_per_rank, int world_size, str group_name, int in_flight_rows, Tensor? after=None) "
      "-> (Tensor ticket, Tensor in_flight)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_dispatch_recv(Tensor ticket, Tensor in_flight, SymInt hidden, ScalarType dtype, int num_topk, "
      "str quantize, int num_experts, int max_tokens_per_rank, int world_size, str group_name) -> (Tensor rows, "
      "Tensor? scales, Tensor tokens_per_expert, Tensor source_offsets, Tensor recv_pair, Tensor recv_row, "
      "Tensor row_weights, Tensor wait_ns)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_combine(Tensor y, Tensor topk_idx, Tensor row_weights, Tensor recv_row, int num_experts, "
      "int world_size, str group_name, Tensor? after=None) -> (Tensor out, Tensor wait_ns)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_combine_send(Tensor y, Tensor topk_idx, Tensor row_weights, Tensor recv_row, int num_experts, "
      "int world_size, str group_name, int in_flight_rows, Tensor? after=None) -> (Tensor ticket, Tensor in_flight)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_combine_recv(Tensor ticket, Tensor in_flight, Tensor topk_idx, SymInt hidden, ScalarType dtype, "
      "int num_experts, int world_size, str group_name) -> (Tensor out, Tensor wait_ns)",
      {at::Tag::pt2_compliant_tag});

  // A zero of shape [] that exists only once `dep` does: how a backward keeps the order that `after` set forward.
  m.def("zero_after(Tensor dep) -> Tensor", {at::Tag::pt2_compliant_tag});

  // a[rows of group i] @ b[i], zero past the last group; and the transpose in b: a[rows of group i]^T @ g[the same].
  m.def(
      "grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});  // reads the offsets on the host
  m.def(
      "grouped_mm.transpose(Tensor a, Tensor g, Tensor offsets) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});

  // Collective and local halves of torch_ep.init and torch_ep.destroy.
  m.def("_init(str group_name, str connections, int timeout_ms, int[] limits, int[] choice) -> bool", &init);
  m.def("_tell(str op, str group_name, str failure) -> ()", &tell);
  m.def("_is_connected(str group_name) -> bool", &is_connected);
  m.def("_orphaned() -> str[]", &ep::orphaned_communicators);
  m.def("_hint_at_init(str hint) -> ()", &hint_at_init);
  m.def("_destroy(str group_name) -> ()", &destroy);
  m.def("_has_nvlink() -> bool", &ep::has_nvlink);
  m.def("_nvlink_runs() -> bool", &ep::nvlink_runs);
  m.def("_nvlink_most_experts(int world_size) -> int", &ep::nvlink_most_experts);
  m.def("_nvlink_bytes(int world_size, int[] limits, int num_sms) -> int", &nvlink_bytes);
  m.def(
      "_init_nvlink(str group_name, int rank, int world_size, int[] buffers, int[] limits, int num_sms, "
      "int timeout_ms, bool groupless, bool masks) -> bool",  // of the backend that it replaces: as _destroy_nvlink
      &init_nvlink);
  m.def("_destroy_nvlink(str group_name) -> bool", &destroy_nvlink);  // false: it still runs, its buffers have to stay
  m.def("_settle_nvlink(str group_name) -> int", &settle_nvlink);
  m.def("_restart_nvlink(str group_name, int epoch) -> ()", &restart_nvlink);
  m.def("_masked_nvlink(str group_name) -> int", &masked_nvlink);
  m.def("_mask_nvlink(str group_name, int ranks) -> ()", &mask_nvlink);
  m.def("_force_aten(bool on) -> ()", &force_aten);
  m.def("_force_parts(bool on) -> ()", &force_parts);
}

namespace {

void implement(torch::Library& m) {
  m.impl("plan", &ep::plan);
  m.impl("plan.capacity", &ep::plan_capacity);
  m.impl("dispatch", &ep::dispatch);
  m.impl("combine", &ep::combine);
  m.impl("combine.weighted", &ep::combine_weighted);
  m.impl("low_latency_dispatch", &ep::low_latency_dispatch);
  m.impl("low_latency_dispatch_send", &ep::low_latency_dispatch_send);
  m.impl("low_latency_dispatch_recv", &ep::low_latency_dispatch_recv);
  m.impl("low_latency_combine", &ep::low_latency_combine);
  m.impl("low_latency_combine_send", &ep::low_latency_combine_send);
  m.impl("low_latency_combine_recv", &ep::low_latency_combine_recv);
  m.impl("zero_after", &ep::zero_after);
  m.impl("grouped_mm", &ep::grouped_mm);
  m.impl("grouped_mm.transpose", &ep::grouped_mm_transpose);
}

// In place of derivatives, which these operators do not have: their results would pass for constants otherwise.
void refuse_derivatives(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (!argument.isTensor()) {
      continue;
    }
    const auto& t = argument.toTensor();
    constexpr const char* instead =
        ": this operator is for inference only: use torch_ep.plan, dispatch and combine for training";
    TORCH_CHECK(
        !at::GradMode::is_enabled() || !t.requires_grad(),
        op.schema().name(),
        ": expected no argument to require a gradient",
        instead);
    // Undefined where forward mode is off.
    TORCH_CHECK(
        !t._fw_grad(/*level=*/0).defined(),
        op.schema().name(),
        ": expected no argument to have a tangent (forward mode)",
        instead);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(ep, CPU, m) {
  implement(m);
}

TORCH_LIBRARY_IMPL(ep, CUDA, m) {
  implement(m);
}

TORCH_LIBRARY_IMPL(ep, Autograd, m) {
  // What the _recv halves take has no gradient.
  for (const char* name :
       {"low_latency_dispatch", "low_latency_dispatch_send", "low_latency_combine", "low_latency_combine_send"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives>());
  }
}
