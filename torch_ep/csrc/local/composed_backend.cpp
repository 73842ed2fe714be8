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

namespace {

// A plan that outlives the operator's arguments.
struct OwnedPlan {
  explicit OwnedPlan(const PlanTensors& plan)
      : send_row(plan.send_row),
        send_counts(plan.send_counts),
        recv_counts(plan.recv_counts),
        recv_map(plan.recv_map),
        expert_major(plan.expert_major) {}

  int64_t num_topk() const { return send_row.size(1); }

  at::Tensor send_row, send_counts, recv_counts, recv_map;
  bool expert_major;
};

}  // namespace

// A dispatch whose rows are being transferred.
class ComposedBackend::Dispatch final : public Arrival {
 public:
  // `is_whole`: the exchange ends in the same operator, so that it can use the buffers that the backend keeps.
  Dispatch(
      ComposedBackend& backend,
      const PlanTensors& plan,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales,
      bool is_whole)
      : kernels_(permute_kernels(x)),
        plan_(plan),
        transfer_(backend, OpKind::dispatch, plan, x, agreed_of(x, topk_weights, scales)) {
    const auto allocator_of = [&](WireBuffer which) {
      return is_whole ? backend.allocator(which) : Allocate(allocate_new);
    };
    transfer_.run([&] {
      const int64_t out_rows = sum(transfer_.out_rows);
      // With one rank, rank_major rows are the wire rows: they are the result.
      const bool is_result = backend.world_size_ == 1 && !plan.expert_major;
      rows_ = kernels_.pack_rows(
          x, plan.send_row, out_rows, is_result ? Allocate(allocate_new) : allocator_of(WireBuffer::send));
      if (topk_weights) {
        weights_ = kernels_.pack_slots(*topk_weights, plan.send_row, out_rows);
      }
      if (scales) {
        scales_ = kernels_.pack_rows(*scales, plan.send_row, out_rows, allocate_new);
      }
      transfer_.confirm();
      start(rows_, plan.expert_major ? allocator_of(WireBuffer::recv) : Allocate(allocate_new));
      if (weights_) {
        start(*weights_, allocate_new);
      }
      if (scales_) {
        start(*scales_, allocate_new);
      }
    });
  }

  void suspend() { transfer_.suspend(); }

  Payloads receive() override {
    transfer_.resume();
    return finish();
  }

  Payloads finish() {
    return transfer_.run([&] {
      transfer_.finish();
      Payloads result{finish_rows(rows_), std::nullopt, std::nullopt};
      if (weights_) {
        std::get<1>(result) =
            plan_.expert_major ? kernels_.expand_slots(*weights_, plan_.recv_map) : finish_rows(*weights_);
      }
      if (scales_) {
        std::get<2>(result) = finish_rows(*scales_);
      }
      return result;
    });
  }

 private:
  // Starts to send `wire`, then sets it to the tensor that receives.
  void start(at::Tensor& wire, const Allocate& allocate) {
    const int64_t in_rows = sum(transfer_.in_rows), rows = plan_.recv_map.size(0);
    if (plan_.expert_major || rows <= in_rows) {
      wire = transfer_.start(wire, allocate);
      return;
    }
    // rank_major: rows arrive in the result itself, so only its tail has to be zeroed.
    auto result = with_rows(wire, rows);
    result.narrow(0, in_rows, rows - in_rows).zero_();
    transfer_.start_into(result, wire);
    wire = result;
  }

  at::Tensor finish_rows(const at::Tensor& wire) const {
    if (plan_.expert_major) {
      return kernels_.expand_rows(wire, plan_.recv_map, plan_.num_topk());
    }
    const int64_t rows = plan_.recv_map.size(0);
    return rows < wire.size(0) ? wire.narrow(0, 0, rows).clone() : wire;
  }

  const PermuteKernels& kernels_;
  const OwnedPlan plan_;
  Transfer transfer_;
  at::Tensor rows_;
  std::optional<at::Tensor> weights_, scales_;
};

Payloads ComposedBackend::dispatch(
    const PlanTensors& plan,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  return Dispatch(*this, plan, x, topk_weights, scales, true).finish();
}

std::unique_ptr<Arrival> ComposedBackend::dispatch_send(
    const PlanTensors& plan,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  if (world_size_ == 1) {
    return Backend::dispatch_send(plan, x, topk_weights, scales);
  }
  auto sent = std::make_unique<Dispatch>(*this, plan, x, topk_weights, scales, false);
  sent->suspend();
  return sent;
}

// A combine whose rows are being transferred.
class ComposedBackend::Combine final : public Arrival {
 public:
  // `is_whole`: as for Dispatch.
  Combine(
      ComposedBackend& backend,
      const PlanTensors& plan,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales,
      bool is_whole)
      : kernels_(permute_kernels(y)),
        send_row_(plan.send_row),
        transfer_(backend, OpKind::combine, plan, y, agreed_of(y, topk_weights, scales)) {
    const auto allocator_of = [&](WireBuffer which) {
      return is_whole ? backend.allocator(which) : Allocate(allocate_new);
    };
    transfer_.run([&] {
      const int64_t wire_rows = sum(transfer_.out_rows);
      if (wire_rows > plan.recv_map.size(0)) {
        // Rows were dropped. The headers bound their number, so allocate memory for them only after all ranks agree.
        transfer_.confirm();
      }
      const auto wire_y = wire_of(kernels_, plan, y, row_weights, wire_rows, allocator_of(WireBuffer::send));
      std::optional<at::Tensor> wire_weights, wire_scales;
      if (topk_weights) {
        wire_weights = plan.expert_major
                           ? kernels_.return_slots(*topk_weights, plan.recv_map, wire_rows, plan.num_topk())
                           : fit_rows(*topk_weights, wire_rows);
      }
      if (scales) {
        wire_scales = wire_of(kernels_, plan, *scales, std::nullopt, wire_rows, allocate_new);
      }
      // A first half has read its arguments when it returns, so it sends none of them in place.
      const auto own = [&](const at::Tensor& wire, const at::Tensor& argument) {
        return !is_whole && wire.is_alias_of(argument) ? wire.clone() : wire;
      };
      transfer_.confirm();
      returned_ = transfer_.start(own(wire_y, y), allocator_of(WireBuffer::recv));
      if (wire_weights) {
        weights_ = transfer_.start(own(*wire_weights, *topk_weights));
      }
      if (wire_scales) {
        scales_ = transfer_.start(own(*wire_scales, *scales));
      }
    });
  }

  void suspend() { transfer_.suspend(); }

  Payloads receive() override {
    transfer_.resume();
    return finish();
  }

  Payloads finish() {
    return transfer_.run([&] {
      transfer_.finish();
      Payloads result{kernels_.sum_rows(returned_, send_row_), std::nullopt, std::nullopt};
      if (weights_) {
        std::get<1>(result) = kernels_.gather_slots(*weights_, send_row_);
      }
      if (scales_) {
        std::get<2>(result) = kernels_.sum_rows(*scales_, send_row_);
      }
      return result;
    });
  }

 private:
  const PermuteKernels& kernels_;
  const at::Tensor send_row_;
  Transfer transfer_;
  at::Tensor returned_;
  std::optional<at::Tensor> weights_, scales_;
};

Payloads ComposedBackend::combine(
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  return Combine(*this, plan, y, row_weights, topk_weights, scales, true).finish();
}

std::unique_ptr<Arrival> ComposedBackend::combine_send(
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  if (world_size_ == 1) {
    return Backend::combine_send(plan, y, row_weights, topk_weights, scales);
  }
  auto sent = std::make_unique<Combine>(*this, plan, y, row_weights, topk_weights, scales, false);
  sent->suspend();
  return sent;
}

}  // namespace ep
