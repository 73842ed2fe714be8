// The operators: each checks its arguments once, for every backend, and calls the backend of the group.
#include "core/backend.h"
#include "core/checks.h"
#include "core/low_latency_wire_row.h"
#include "ops/ops.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <utility>

namespace ep {
namespace {

constexpr auto kDispatch = OpKind::low_latency_dispatch;
constexpr auto kCombine = OpKind::low_latency_combine;

void check_plan_arguments(
    const at::Tensor& topk_idx,
    int64_t num_experts,
    bool expert_major,
    int64_t alignment,
    std::optional<int64_t> capacity,
    int64_t world_size) {
  const char* op = name_of(OpKind::plan);
  check_tensor(op, "topk_idx", topk_idx, {"num_tokens", "num_topk"}, topk_idx);
  check_index_type(op, "topk_idx", topk_idx);
  check_topk(op, topk_idx.size(1));
  check_at_most(op, "entries of topk_idx", topk_idx.numel(), kMaxSize);
  check_experts(op, num_experts, world_size);
  TORCH_CHECK_VALUE(alignment > 0, op, ": expected a positive alignment, got ", alignment);
  check_at_most(op, "alignment", alignment, kMaxPadding / (num_experts / world_size));
  TORCH_CHECK_VALUE(
      expert_major || alignment == 1, op, ": expected alignment 1 with layout 'rank_major', got ", alignment);
  if (capacity) {
    TORCH_CHECK_VALUE(
        *capacity >= 0 && *capacity % alignment == 0 && *capacity <= kMaxSize,
        op,
        ": expected a capacity from 0 to 2**31 - 1 that is a multiple of the alignment ",
        alignment,
        ", got ",
        *capacity);
  }
}

PlanResult make_plan(
    const at::Tensor& topk_idx,
    int64_t num_experts,
    c10::string_view layout,
    int64_t alignment,
    std::optional<int64_t> capacity,
    int64_t world_size,
    c10::string_view group_name,
    std::optional<int64_t> max_tokens_per_rank) {
  constexpr auto op = OpKind::plan;
  PlanOptions options{num_experts, false, alignment, capacity, max_tokens_per_rank};
  const auto backend = checked(op, group_name, [&] {
    options.expert_major = is_expert_major(name_of(op), layout);
    check_plan_arguments(topk_idx, num_experts, options.expert_major, alignment, capacity, world_size);
    if (max_tokens_per_rank && is_second_exchange(op, std::string(group_name))) {
      TORCH_CHECK_VALUE(
          topk_idx.size(0) <= *max_tokens_per_rank,
          name_of(op),
          ": expected at most max_relay_rows = ",
          *max_tokens_per_rank,
          " rows from all nodes for one rank to relay, got ",
          topk_idx.size(0),
          ": pass a larger max_relay_rows to torch_ep.init, or a capacity to the plan, which drops rows");
    }
    return find_backend(op, group_name, world_size, topk_idx);
  });
  return linked(op, group_name, [&] { return backend->plan(topk_idx, options); });
}

// Checks rows and their payloads: per token in dispatch, per received row in combine.
void check_payloads(
    const char* op,
    const char* rows_name,
    const at::Tensor& rows,
    int64_t num_rows,
    const ShapeOf& rows_of,
    const std::optional<at::Tensor>& topk_weights,
    at::ArrayRef<Dim> weights_shape,
    const ShapeOf& weights_of,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& device_of) {
  check_tensor(op, rows_name, rows, {num_rows, "hidden"}, device_of, rows_of);
  if (topk_weights) {
    check_tensor(op, "topk_weights", *topk_weights, weights_shape, device_of, weights_of);
    check_sum_type(op, "topk_weights", *topk_weights);
  }
  if (scales) {
    check_tensor(op, "scales", *scales, {num_rows, "n"}, device_of, rows_of);
  }
}

// Checks what dispatch moves. On a grid, `plan` is the rail's, which takes the tokens.
void check_dispatch_payloads(
    const PlanTensors& plan,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  const char* op = name_of(OpKind::dispatch);
  const auto& send_row = plan.send_row;
  check_payloads(op, "x", x, send_row.size(0), kTokens, topk_weights, dims_of(send_row), kTokenSlots, scales, send_row);
  check_row_type(op, "x", x);
}

void check_combine_payloads(
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  const char* op = name_of(OpKind::combine);
  const auto& recv_map = plan.recv_map;
  check_payloads(
      op, "y", y, recv_map.size(0), kRows, topk_weights, dims_of(recv_map), kReturnedWeights, scales, plan.send_row);
  check_sum_type(op, "y", y);
  if (scales) {
    check_sum_type(op, "scales", *scales);
  }
}

void check_weighted_rows(const PlanTensors& plan, const at::Tensor& y, const at::Tensor& row_weights) {
  const char* op = name_of(OpKind::combine);
  const int64_t rows = plan.recv_map.size(0);
  check_tensor(op, "y", y, {rows, "hidden"}, plan.send_row, kRows);
  check_sum_type(op, "y", y);
  check_tensor(op, "row_weights", row_weights, {rows}, plan.send_row, kRowWeights);
  check_sum_type(op, "row_weights", row_weights);
}

void check_grid_plan(const char* op, const PlanTensors& rail, const PlanTensors& node) {
  check_plan(op, rail);
  check_plan(op, node);
  check_tensor(
      op,
      "send_row",
      node.send_row,
      {rail.recv_map.size(0), rail.num_topk()},
      rail.send_row,
      {", one row per row that this rank relays", ": pass the plan as torch_ep.plan returned it"});
}

// The backends of a rail and of a node.
std::pair<std::shared_ptr<Backend>, std::shared_ptr<Backend>> find_backends(
    OpKind op,
    c10::string_view rail_name,
    const PlanTensors& rail,
    c10::string_view node_name,
    const PlanTensors& node) {
  return {
      find_backend(op, rail_name, rail.world_size(), rail.send_row),
      find_backend(op, node_name, node.world_size(), node.send_row)};
}

ArrivalShape shape_of(
    int64_t rows,
    const at::Tensor& sent,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  ArrivalShape shape{rows, sent.size(1), sent.scalar_type(), std::nullopt, std::nullopt, std::nullopt};
  if (topk_weights) {
    shape.weights_dtype = topk_weights->scalar_type();
  }
  if (scales) {
    shape.scales_columns = scales->size(1);
    shape.scales_dtype = scales->scalar_type();
  }
  return shape;
}

// The second half of dispatch and combine.
Payloads receive(
    OpKind op,
    const at::Tensor& ticket,
    PlanTensors plan,
    c10::string_view layout,
    c10::string_view group_name,
    const ArrivalShape& shape) {
  const auto name = std::string(name_of(op)) + "_recv";
  plan.expert_major = is_expert_major(name.c_str(), layout);
  check_plan(name.c_str(), plan);
  check_tensor(name.c_str(), "ticket", ticket, {1}, plan.send_row, kInFlight);
  TORCH_CHECK_TYPE(
      ticket.scalar_type() == at::kDouble, name, ": expected ticket of dtype Double, got ", ticket.scalar_type());
  const auto arrival = take_in_flight(op, group_name, ticket, shape);
  return linked(op, group_name, [&] { return arrival->receive(); });
}

Quantize quantize_of(const char* op, std::string_view name) {
  constexpr std::array<std::string_view, 4> names{"", "fp8", "fp8_pow2", "fp8_ue8m0"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(
      found != names.end(), op, ": expected quantize '', 'fp8', 'fp8_pow2' or 'fp8_ue8m0', got '", name, "'");
  return static_cast<Quantize>(found - names.begin());
}

// Sizes of the low-latency pair that all ranks share.
struct LowLatencySizes {
  int64_t num_experts, num_topk, max_tokens_per_rank, world_size;

  int64_t num_local_experts() const { return num_experts / world_size; }
};

void check_sizes(const char* op, const LowLatencySizes& sizes) {
  check_topk(op, sizes.num_topk);
  check_experts(op, sizes.num_experts, sizes.world_size);
  TORCH_CHECK_VALUE(
      sizes.max_tokens_per_rank > 0, op, ": expected a positive max_tokens_per_rank, got ", sizes.max_tokens_per_rank);
  // What recv_pair and recv_row count.
  const int64_t factor = std::max(sizes.num_topk, sizes.num_local_experts());
  TORCH_CHECK_VALUE(
      sizes.max_tokens_per_rank <= kMaxSize / (sizes.world_size * factor),
      op,
      ": expected max_tokens_per_rank of at most ",
      kMaxSize / (sizes.world_size * factor),
      " with world_size ",
      sizes.world_size,
      " and ",
      factor,
      " slots per token or local experts, got ",
      sizes.max_tokens_per_rank);
}

void check_topk_idx(
    const char* op,
    const at::Tensor& topk_idx,
    at::ArrayRef<Dim> shape,
    const at::Tensor& device_of,
    const ShapeOf& of) {
  check_tensor(op, "topk_idx", topk_idx, shape, device_of, of);
  check_index_type(op, "topk_idx", topk_idx);
}

void check_float(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, op, ": expected ", name, " of dtype Float, got ", t.scalar_type());
}

void check_hidden(const char* op, int64_t hidden) {
  TORCH_CHECK_VALUE(hidden > 0, op, ": expected a positive hidden, got ", hidden);
  check_at_most(op, "hidden", hidden, kMaxSize);
}

void check_in_flight(
    const char* op,
    const at::Tensor& status,
    const at::Tensor& in_flight,
    int64_t rows,  // -1: any number
    int64_t wire_row_bytes,
    int64_t world_size) {
  check_tensor(op, "status", status, {2, world_size}, status, kInFlight);
  TORCH_CHECK_TYPE(
      status.scalar_type() == at::kLong, op, ": expected status of dtype Long, got ", status.scalar_type());
  check_tensor(op, "in_flight", in_flight, {rows < 0 ? Dim("rows") : Dim(rows), wire_row_bytes}, status, kInFlight);
  TORCH_CHECK_TYPE(
      in_flight.scalar_type() == at::kByte, op, ": expected in_flight of dtype Byte, got ", in_flight.scalar_type());
}

// Checks the arguments of low_latency_dispatch and its _send half.
LowLatencyOptions check_tokens(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size) {
  const char* op = name_of(kDispatch);
  LowLatencyOptions options{quantize_of(op, quantize), num_experts, 0, max_tokens_per_rank, 0, x.scalar_type()};
  check_tensor(op, "x", x, {"num_tokens", "hidden"}, x);
  check_low_latency_type(op, "x", x.scalar_type());
  options.hidden = x.size(1);
  check_hidden(op, options.hidden);
  check_topk_idx(op, topk_idx, {x.size(0), "num_topk"}, x, kTokensOfX);
  if (topk_weights) {
    check_tensor(op, "topk_weights", *topk_weights, {topk_idx.size(0), topk_idx.size(1)}, x, kEntries);
    check_float(op, "topk_weights", *topk_weights);
  }
  options.num_topk = topk_idx.size(1);
  check_sizes(op, {num_experts, options.num_topk, max_tokens_per_rank, world_size});
  return options;
}

// Checks the arguments of low_latency_combine and its _send half.
void check_results(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    int64_t world_size) {
  const char* op = name_of(kCombine);
  check_tensor(op, "recv_row", recv_row, {"rows", "num_topk"}, recv_row, kLowLatencyPlanField);
  check_int32(op, "recv_row", recv_row);
  check_topk(op, recv_row.size(1));
  check_experts(op, num_experts, world_size);
  const int64_t rows = recv_row.size(0);
  TORCH_CHECK_VALUE(
      rows % world_size == 0,
      op,
      ": expected recv_row to have the same number of rows for each of ",
      world_size,
      " ranks, got ",
      rows);
  const LowLatencySizes sizes{num_experts, recv_row.size(1), rows / world_size, world_size};
  check_sizes(op, sizes);
  check_tensor(op, "y", y, {sizes.num_local_experts(), rows, "hidden"}, recv_row, kLowLatencyRows);
  check_low_latency_type(op, "y", y.scalar_type());
  check_hidden(op, y.size(2));
  check_tensor(op, "row_weights", row_weights, {sizes.num_local_experts(), rows}, recv_row, kLowLatencyPlanField);
  check_float(op, "row_weights", row_weights);
  check_topk_idx(op, topk_idx, {"num_tokens", sizes.num_topk}, recv_row, kLowLatencyPlanField);
}

}  // namespace

PlanResult plan(
    const at::Tensor& topk_idx,
    int64_t num_experts,
    c10::string_view layout,
    int64_t alignment,
    int64_t world_size,
    c10::string_view group_name,
    std::optional<int64_t> max_tokens_per_rank,
    const std::optional<at::Tensor>& /*after*/) {
  return make_plan(topk_idx, num_experts, layout, alignment, std::nullopt, world_size, group_name, max_tokens_per_rank);
}

PlanResult plan_capacity(
    const at::Tensor& topk_idx,
    int64_t num_experts,
    c10::string_view layout,
    int64_t alignment,
    int64_t capacity,
    int64_t world_size,
    c10::string_view group_name,
    std::optional<int64_t> max_tokens_per_rank,
    const std::optional<at::Tensor>& /*after*/) {
  return make_plan(topk_idx, num_experts, layout, alignment, capacity, world_size, group_name, max_tokens_per_rank);
}

Payloads dispatch(
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::dispatch;
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto backend = checked(op, group_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_plan(name_of(op), plan);
    check_dispatch_payloads(plan, x, topk_weights, scales);
    return find_backend(op, group_name, plan.world_size(), send_row);
  });
  return linked(op, group_name, [&] { return backend->dispatch(plan, x, topk_weights, scales); });
}

Payloads combine(
    const at::Tensor& y,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::combine;
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto backend = checked(op, group_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_plan(name_of(op), plan);
    check_combine_payloads(plan, y, topk_weights, scales);
    return find_backend(op, group_name, plan.world_size(), send_row);
  });
  return linked(op, group_name, [&] { return backend->combine(plan, y, std::nullopt, topk_weights, scales); });
}

at::Tensor combine_weighted(
    const at::Tensor& y,
    const at::Tensor& row_weights,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::combine;
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto backend = checked(op, group_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_plan(name_of(op), plan);
    check_weighted_rows(plan, y, row_weights);
    return find_backend(op, group_name, plan.world_size(), send_row);
  });
  return linked(
      op, group_name, [&] { return std::get<0>(backend->combine(plan, y, row_weights, std::nullopt, std::nullopt)); });
}

at::Tensor dispatch_send(
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::dispatch;
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto backend = checked(op, group_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_plan(name_of(op), plan);
    check_dispatch_payloads(plan, x, topk_weights, scales);
    check_may_send(op, group_name);
    return find_backend(op, group_name, plan.world_size(), send_row);
  });
  auto arrival = linked(op, group_name, [&] { return backend->dispatch_send(plan, x, topk_weights, scales); });
  return add_in_flight(
      op, group_name, std::move(arrival), shape_of(recv_map.size(0), x, topk_weights, scales), x.device());
}

Payloads dispatch_recv(
    const at::Tensor& ticket,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    int64_t hidden,
    at::ScalarType dtype,
    std::optional<at::ScalarType> weights_dtype,
    std::optional<int64_t> scales_columns,
    std::optional<at::ScalarType> scales_dtype,
    const std::optional<at::Tensor>& /*after*/) {
  const PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const ArrivalShape shape{recv_map.size(0), hidden, dtype, weights_dtype, scales_columns, scales_dtype};
  return receive(OpKind::dispatch, ticket, plan, layout, group_name, shape);
}

at::Tensor combine_send(
    const at::Tensor& y,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::combine;
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto backend = checked(op, group_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_plan(name_of(op), plan);
    check_combine_payloads(plan, y, topk_weights, scales);
    check_may_send(op, group_name);
    return find_backend(op, group_name, plan.world_size(), send_row);
  });
  auto arrival =
      linked(op, group_name, [&] { return backend->combine_send(plan, y, std::nullopt, topk_weights, scales); });
  return add_in_flight(
      op, group_name, std::move(arrival), shape_of(send_row.size(0), y, topk_weights, scales), y.device());
}

at::Tensor combine_send_weighted(
    const at::Tensor& y,
    const at::Tensor& row_weights,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::combine;
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto backend = checked(op, group_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_plan(name_of(op), plan);
    check_weighted_rows(plan, y, row_weights);
    check_may_send(op, group_name);
    return find_backend(op, group_name, plan.world_size(), send_row);
  });
  auto arrival =
      linked(op, group_name, [&] { return backend->combine_send(plan, y, row_weights, std::nullopt, std::nullopt); });
  return add_in_flight(
      op, group_name, std::move(arrival), shape_of(send_row.size(0), y, std::nullopt, std::nullopt), y.device());
}

Payloads combine_recv(
    const at::Tensor& ticket,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    int64_t hidden,
    at::ScalarType dtype,
    std::optional<at::ScalarType> weights_dtype,
    std::optional<int64_t> scales_columns,
    std::optional<at::ScalarType> scales_dtype,
    const std::optional<at::Tensor>& /*after*/) {
  const PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const ArrivalShape shape{send_row.size(0), hidden, dtype, weights_dtype, scales_columns, scales_dtype};
  return receive(OpKind::combine, ticket, plan, layout, group_name, shape);
}

Payloads dispatch_grid(
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& rail_send_row,
    const at::Tensor& rail_send_counts,
    const at::Tensor& rail_recv_counts,
    const at::Tensor& rail_recv_map,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view rail_name,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::dispatch;
  const PlanTensors rail_plan{rail_send_row, rail_send_counts, rail_recv_counts, rail_recv_map, false};
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto [rail, node] = checked(op, rail_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_grid_plan(name_of(op), rail_plan, plan);
    check_dispatch_payloads(rail_plan, x, topk_weights, scales);
    return find_backends(op, rail_name, rail_plan, group_name, plan);
  });
  return rail->dispatch_on_grid({*rail, rail_plan, rail_name}, {*node, plan, group_name}, x, topk_weights, scales);
}

Payloads combine_grid(
    const at::Tensor& y,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& rail_send_row,
    const at::Tensor& rail_send_counts,
    const at::Tensor& rail_recv_counts,
    const at::Tensor& rail_recv_map,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view rail_name,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::combine;
  const PlanTensors rail_plan{rail_send_row, rail_send_counts, rail_recv_counts, rail_recv_map, false};
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto [rail, node] = checked(op, group_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_grid_plan(name_of(op), rail_plan, plan);
    check_combine_payloads(plan, y, topk_weights, scales);
    return find_backends(op, rail_name, rail_plan, group_name, plan);
  });
  return rail->combine_on_grid(
      {*rail, rail_plan, rail_name}, {*node, plan, group_name}, y, std::nullopt, topk_weights, scales);
}

at::Tensor combine_grid_weighted(
    const at::Tensor& y,
    const at::Tensor& row_weights,
    const at::Tensor& rail_send_row,
    const at::Tensor& rail_send_counts,
    const at::Tensor& rail_recv_counts,
    const at::Tensor& rail_recv_map,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view rail_name,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr auto op = OpKind::combine;
  const PlanTensors rail_plan{rail_send_row, rail_send_counts, rail_recv_counts, rail_recv_map, false};
  PlanTensors plan{send_row, send_counts, recv_counts, recv_map, false};
  const auto [rail, node] = checked(op, group_name, [&] {
    plan.expert_major = is_expert_major(name_of(op), layout);
    check_grid_plan(name_of(op), rail_plan, plan);
    check_weighted_rows(plan, y, row_weights);
    return find_backends(op, rail_name, rail_plan, group_name, plan);
  });
  return std::get<0>(rail->combine_on_grid(
      {*rail, rail_plan, rail_name}, {*node, plan, group_name}, y, row_weights, std::nullopt, std::nullopt));
}

LowLatencyRows low_latency_dispatch(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  const auto [options, backend] = checked(kDispatch, group_name, [&] {
    const auto valid = check_tokens(x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank, world_size);
    return std::pair(valid, find_backend(kDispatch, group_name, world_size, x));
  });
  return linked(kDispatch, group_name, [&, &options = options, &backend = backend] {
    return backend->low_latency_dispatch(x, topk_idx, topk_weights, options);
  });
}

InFlight low_latency_dispatch_send(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  const auto [options, backend] = checked(kDispatch, group_name, [&] {
    const auto valid = check_tokens(x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank, world_size);
    return std::pair(valid, find_backend(kDispatch, group_name, world_size, x));
  });
  return linked(kDispatch, group_name, [&, &options = options, &backend = backend] {
    return backend->low_latency_dispatch_send(x, topk_idx, topk_weights, options);
  });
}

LowLatencyRows low_latency_dispatch_recv(
    const at::Tensor& status,
    const at::Tensor& in_flight,
    int64_t hidden,
    at::ScalarType dtype,
    int64_t num_topk,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr const char* op = "ep::low_latency_dispatch_recv";
  const LowLatencyOptions options{quantize_of(op, quantize), num_experts, num_topk, max_tokens_per_rank, hidden, dtype};
  check_sizes(op, {num_experts, num_topk, max_tokens_per_rank, world_size});
  check_low_latency_type(op, "rows", dtype);
  check_hidden(op, hidden);
  const int64_t wire_row_bytes = LowLatencyWireRow(options).bytes;
  check_in_flight(op, status, in_flight, world_size * max_tokens_per_rank, wire_row_bytes, world_size);
  return linked(kDispatch, group_name, [&] {
    return find_backend(kDispatch, group_name, world_size, status)
        ->low_latency_dispatch_recv({status, in_flight}, options);
  });
}

LowLatencySums low_latency_combine(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  const auto backend = checked(kCombine, group_name, [&] {
    check_results(y, topk_idx, row_weights, recv_row, num_experts, world_size);
    return find_backend(kCombine, group_name, world_size, y);
  });
  return linked(kCombine, group_name, [&] {
    return backend->low_latency_combine(y, topk_idx, row_weights, recv_row, num_experts);
  });
}

InFlight low_latency_combine_send(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  const auto backend = checked(kCombine, group_name, [&] {
    check_results(y, topk_idx, row_weights, recv_row, num_experts, world_size);
    return find_backend(kCombine, group_name, world_size, y);
  });
  return linked(kCombine, group_name, [&] {
    return backend->low_latency_combine_send(y, topk_idx, row_weights, recv_row, num_experts);
  });
}

LowLatencySums low_latency_combine_recv(
    const at::Tensor& status,
    const at::Tensor& in_flight,
    const at::Tensor& topk_idx,
    int64_t hidden,
    at::ScalarType dtype,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  constexpr const char* op = "ep::low_latency_combine_recv";
  check_topk_idx(op, topk_idx, {"num_tokens", "num_topk"}, status, kInFlight);
  check_topk(op, topk_idx.size(1));
  check_experts(op, num_experts, world_size);
  check_low_latency_type(op, "rows", dtype);
  check_hidden(op, hidden);
  check_in_flight(op, status, in_flight, -1, hidden * static_cast<int64_t>(c10::elementSize(dtype)), world_size);
  return linked(kCombine, group_name, [&] {
    return find_backend(kCombine, group_name, world_size, status)
        ->low_latency_combine_recv({status, in_flight}, topk_idx, hidden, dtype, num_experts);
  });
}

at::Tensor zero_after(const at::Tensor& dep) {
  return at::zeros({}, dep.options());
}

}  // namespace ep
