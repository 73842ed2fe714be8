#include "local/transfer.h"

#include <ATen/ops/tensor.h>

namespace ep {
at::Tensor
ComposedBackend::make_wire_buffer(WireBuffer /*which*/, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

Allocate ComposedBackend::allocator(WireBuffer which) {
  return [this, which](at::IntArrayRef sizes, const at::TensorOptions& options) {
    return make_wire_buffer(which, sizes, options);
  };
}

void ComposedBackend::check_limit(OpKind op, const char* name, int64_t limit, int64_t got) const {
  ep::check_limit(name_of(op), name, limit, got);
}

PlanResult ComposedBackend::plan(const at::Tensor& topk_idx, const PlanOptions& options) {
  constexpr auto kOp = OpKind::plan;
  const auto& kernels = permute_kernels(topk_idx);
  const int64_t num_topk = topk_idx.size(1);
  const auto send_plan = reported(kOp, [&] {
    check_limit(kOp, "num_topk", limits_.num_topk, num_topk);
    check_limit(kOp, "num_experts", limits_.num_experts, options.num_experts);
    check_num_tokens(name_of(kOp), topk_idx.size(0), options.max_tokens_per_rank);
    return kernels.plan_send(name_of(kOp), topk_idx, options.num_experts, world_size_);
  });

  at::Tensor wire_topk = send_plan.wire_topk;
  std::vector<int64_t> recv_rows{wire_topk.size(0)};
  const auto exchange = begin_exchange(
      kOp,
      world_size_ > 1 ? to_host(send_plan.send_counts) : std::vector<int64_t>(),
      {},
      {{"num_experts", options.num_experts}, {"num_topk", num_topk}});
  if (exchange) {
    recv_rows = exchange->confirm();
    wire_topk = exchange->run([&] { return at::empty({sum(recv_rows), num_topk}, send_plan.wire_topk.options()); });
    exchange->start(wire_topk, send_plan.wire_topk, recv_rows);
    exchange->finish();
  }
  const auto recv_plan = kernels.plan_recv(
      wire_topk,
      recv_rows,
      {options.expert_major,
       options.num_experts / world_size_,
       options.alignment,
       options.capacity,
       topk_idx.scalar_type()});
  return {
      send_plan.send_row,
      send_plan.send_counts,
      at::tensor(recv_rows, at::kInt).to(topk_idx.device()),
      recv_plan.recv_map,
      recv_plan.offsets,
      recv_plan.tokens_per_expert,
      recv_plan.num_dropped};
}

Payloads ComposedBackend::dispatch(
    const PlanTensors& plan,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  Transfer transfer(*this, OpKind::dispatch, plan, x, agreed_of(x, topk_weights, scales));
  return transfer.run([&] { return dispatch_payloads(transfer, plan, x, topk_weights, scales); });
}

Payloads ComposedBackend::dispatch_payloads(
    Transfer& transfer,
    const PlanTensors& plan,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  const auto& kernels = permute_kernels(x);
  const int64_t out_rows = sum(transfer.out_rows), in_rows = sum(transfer.in_rows);
  const int64_t rows = plan.recv_map.size(0);
  // With one rank, rank_major rows are the wire rows: they are the result.
  const bool is_result = world_size_ == 1 && !plan.expert_major;
  auto wire_x =
      kernels.pack_rows(x, plan.send_row, out_rows, is_result ? Allocate(allocate_new) : allocator(WireBuffer::send));
  std::optional<at::Tensor> wire_weights, wire_scales;
  if (topk_weights) {
    wire_weights = kernels.pack_slots(*topk_weights, plan.send_row, out_rows);
  }
  if (scales) {
    wire_scales = kernels.pack_rows(*scales, plan.send_row, out_rows, allocate_new);
  }
  transfer.confirm();

  const auto start = [&](at::Tensor& wire, const Allocate& allocate) {
    if (plan.expert_major || rows <= in_rows) {
      wire = transfer.start(wire, allocate);
      return;
    }
    // rank_major: rows arrive in the result itself, so only its tail has to be zeroed.
    auto result = with_rows(wire, rows);
    result.narrow(0, in_rows, rows - in_rows).zero_();
    transfer.start_into(result, wire);
    wire = result;
  };
  start(wire_x, plan.expert_major ? allocator(WireBuffer::recv) : Allocate(allocate_new));
  if (wire_weights) {
    start(*wire_weights, allocate_new);
  }
  if (wire_scales) {
    start(*wire_scales, allocate_new);
  }
  transfer.finish();

  const auto finish_rows = [&](const at::Tensor& wire) {
    if (plan.expert_major) {
      return kernels.expand_rows(wire, plan.recv_map, plan.num_topk());
    }
    return rows < wire.size(0) ? wire.narrow(0, 0, rows).clone() : wire;
  };
  Payloads result{finish_rows(wire_x), std::nullopt, std::nullopt};
  if (wire_weights) {
    std::get<1>(result) =
        plan.expert_major ? kernels.expand_slots(*wire_weights, plan.recv_map) : finish_rows(*wire_weights);
  }
  if (wire_scales) {
    std::get<2>(result) = finish_rows(*wire_scales);
  }
  return result;
}

Payloads ComposedBackend::combine(
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  Transfer transfer(*this, OpKind::combine, plan, y, agreed_of(y, topk_weights, scales));
  return transfer.run([&] { return combine_payloads(transfer, plan, y, row_weights, topk_weights, scales); });
}

Payloads ComposedBackend::combine_payloads(
    Transfer& transfer,
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  const auto& kernels = permute_kernels(y);
  const int64_t wire_rows = sum(transfer.out_rows);
  if (wire_rows > plan.recv_map.size(0)) {
    // Rows were dropped. The headers bound their number, so allocate memory for them only after all ranks agree.
    transfer.confirm();
  }
  const auto wire_y = wire_of(kernels, plan, y, row_weights, wire_rows, allocator(WireBuffer::send));
  std::optional<at::Tensor> wire_weights, wire_scales;
  if (topk_weights) {
    wire_weights = plan.expert_major ? kernels.return_slots(*topk_weights, plan.recv_map, wire_rows, plan.num_topk())
                                     : fit_rows(*topk_weights, wire_rows);
  }
  if (scales) {
    wire_scales = wire_of(kernels, plan, *scales, std::nullopt, wire_rows, allocate_new);
  }
  transfer.confirm();
  const auto returned_y = transfer.start(wire_y, allocator(WireBuffer::recv));
  std::optional<at::Tensor> returned_weights, returned_scales;
  if (wire_weights) {
    returned_weights = transfer.start(*wire_weights);
  }
  if (wire_scales) {
    returned_scales = transfer.start(*wire_scales);
  }
  transfer.finish();
  Payloads result{kernels.sum_rows(returned_y, plan.send_row), std::nullopt, std::nullopt};
  if (returned_weights) {
    std::get<1>(result) = kernels.gather_slots(*returned_weights, plan.send_row);
  }
  if (returned_scales) {
    std::get<2>(result) = kernels.sum_rows(*returned_scales, plan.send_row);
  }
  return result;
}

}  // namespace ep
