// Every schema of torch_ep. Importing the extension registers them. The fakes are in torch_ep/meta.py, the
// autograd formulas in torch_ep/ops.py.
#include "ops/ops.h"

#include "core/backend.h"
#include "local/permute.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

namespace {

void report_failure(std::string op, std::string group_name, std::string failure) {
  ep::report_failure(ep::kind_of(op), group_name, failure);
}

void link_groups(std::string rail, std::string node) {
  ep::link_groups(rail, node);
}

void unlink_group(std::string group_name) {
  ep::unlink_group(group_name);
}

void drop_in_flight(std::string group_name) {
  ep::drop_in_flight(group_name);
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

  // Exact: as many rows as arrive. Only this exchange waits for the device, so CUDA graphs are split here.
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

  // Each is the transpose of the other, payload by payload: rows, numbers per (token, slot), and scales per row.
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
  // The same on a grid of nodes: by a plan among the ranks of a rail, then by one inside the node.
  m.def(
      "dispatch.grid(Tensor x, Tensor? topk_weights, Tensor? scales, Tensor rail_send_row, Tensor rail_send_counts, "
      "Tensor rail_recv_counts, Tensor rail_recv_map, Tensor send_row, Tensor send_counts, Tensor recv_counts, "
      "Tensor recv_map, str layout, str rail_name, str group_name, Tensor? after=None) -> (Tensor, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine.grid(Tensor y, Tensor? topk_weights, Tensor? scales, Tensor rail_send_row, Tensor rail_send_counts, "
      "Tensor rail_recv_counts, Tensor rail_recv_map, Tensor send_row, Tensor send_counts, Tensor recv_counts, "
      "Tensor recv_map, str layout, str rail_name, str group_name, Tensor? after=None) -> (Tensor, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine.grid_weighted(Tensor y, Tensor row_weights, Tensor rail_send_row, Tensor rail_send_counts, "
      "Tensor rail_recv_counts, Tensor rail_recv_map, Tensor send_row, Tensor send_counts, Tensor recv_counts, "
      "Tensor recv_map, str layout, str rail_name, str group_name, Tensor? after=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});

  // The halves: the ticket is that of an exchange in flight. What arrives is stated again, since fakes need it.
  m.def(
      "dispatch_send(Tensor x, Tensor? topk_weights, Tensor? scales, Tensor send_row, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, str layout, str group_name, Tensor? after=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dispatch_recv(Tensor ticket, Tensor send_row, Tensor send_counts, Tensor recv_counts, Tensor recv_map, "
      "str layout, str group_name, SymInt hidden, ScalarType dtype, ScalarType? weights_dtype, SymInt? scales_columns, "
      "ScalarType? scales_dtype, Tensor? after=None) -> (Tensor, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine_send(Tensor y, Tensor? topk_weights, Tensor? scales, Tensor send_row, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, str layout, str group_name, Tensor? after=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine_send.weighted(Tensor y, Tensor row_weights, Tensor send_row, Tensor send_counts, Tensor recv_counts, "
      "Tensor recv_map, str layout, str group_name, Tensor? after=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine_recv(Tensor ticket, Tensor send_row, Tensor send_counts, Tensor recv_counts, Tensor recv_map, "
      "str layout, str group_name, SymInt hidden, ScalarType dtype, ScalarType? weights_dtype, SymInt? scales_columns, "
      "ScalarType? scales_dtype, Tensor? after=None) -> (Tensor, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});

  // For decoding: no plan, static shapes, inference only. `quantize`: '' for none. The halves are joined by `status`
  // ([2, world_size]: rows from each rank, wait_ns) and `in_flight` ([world_size * max_tokens_per_rank, bytes per wire
  // row]; nvlink keeps the data elsewhere and leaves it undefined).
  m.def(
      "low_latency_dispatch(Tensor x, Tensor topk_idx, Tensor? topk_weights, str quantize, int num_experts, "
      "int max_tokens_per_rank, int world_size, str group_name, Tensor? after=None) -> (Tensor rows, Tensor? scales, "
      "Tensor tokens_per_expert, Tensor source_offsets, Tensor recv_pair, Tensor recv_row, Tensor row_weights, "
      "Tensor wait_ns)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_dispatch_send(Tensor x, Tensor topk_idx, Tensor? topk_weights, str quantize, int num_experts, "
      "int max_tokens_per_rank, int world_size, str group_name, Tensor? after=None) -> (Tensor status, Tensor "
      "in_flight)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_dispatch_recv(Tensor status, Tensor in_flight, SymInt hidden, ScalarType dtype, int num_topk, "
      "str quantize, int num_experts, int max_tokens_per_rank, int world_size, str group_name, Tensor? after=None) -> "
      "(Tensor rows, "
      "Tensor? scales, Tensor tokens_per_expert, Tensor source_offsets, Tensor recv_pair, Tensor recv_row, "
      "Tensor row_weights, Tensor wait_ns)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_combine(Tensor y, Tensor topk_idx, Tensor row_weights, Tensor recv_row, int num_experts, "
      "int world_size, str group_name, Tensor? after=None) -> (Tensor out, Tensor wait_ns)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_combine_send(Tensor y, Tensor topk_idx, Tensor row_weights, Tensor recv_row, int num_experts, "
      "int world_size, str group_name, Tensor? after=None) -> (Tensor status, Tensor in_flight)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "low_latency_combine_recv(Tensor status, Tensor in_flight, Tensor topk_idx, SymInt hidden, ScalarType dtype, "
      "int num_experts, int world_size, str group_name, Tensor? after=None) -> (Tensor out, Tensor wait_ns)",
      {at::Tag::pt2_compliant_tag});

  // A zero of shape [] that depends on `dep`: with it, a backward keeps the order that `after` sets in the forward.
  m.def("zero_after(Tensor dep) -> Tensor", {at::Tag::pt2_compliant_tag});

  // a[rows of group i] @ b[i], zero past the last group; and the transpose in b: a[rows of group i]^T @ g[the same].
  m.def(
      "grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});  // reads the offsets on the host
  m.def(
      "grouped_mm.transpose(Tensor a, Tensor g, Tensor offsets) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});

  // The rest of torch_ep.init and its relatives is registered by the backends.
  m.def("_backends() -> str[]", &ep::backend_names);
  m.def("_report_failure(str op, str group_name, str failure) -> ()", &report_failure);
  m.def("_link_groups(str rail, str node) -> ()", &link_groups);
  m.def("_unlink_group(str group_name) -> ()", &unlink_group);
  m.def("_drop_in_flight(str group_name) -> ()", &drop_in_flight);
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
  m.impl("dispatch_send", &ep::dispatch_send);
  m.impl("dispatch_recv", &ep::dispatch_recv);
  m.impl("combine_send", &ep::combine_send);
  m.impl("combine_send.weighted", &ep::combine_send_weighted);
  m.impl("combine_recv", &ep::combine_recv);
  m.impl("dispatch.grid", &ep::dispatch_grid);
  m.impl("combine.grid", &ep::combine_grid);
  m.impl("combine.grid_weighted", &ep::combine_grid_weighted);
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

// These operators have no derivatives. Without this error, autograd would treat their results as constants.
void refuse_derivatives(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (!argument.isTensor()) {
      continue;
    }
    const auto& t = argument.toTensor();
    constexpr const char* instead =
        ": this operator is for inference only: call it under torch.no_grad(); for training use torch_ep.plan, "
        "dispatch and "
        "combine";
    TORCH_CHECK(
        !at::GradMode::is_enabled() || !t.requires_grad(),
        op.schema().name(),
        ": expected no argument to require a gradient",
        instead);
    // Undefined if forward mode is off.
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
  // The inputs of the _recv halves have no gradient.
  for (const char* name :
       {"low_latency_dispatch", "low_latency_dispatch_send", "low_latency_combine", "low_latency_combine_send"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives>());
  }
}
