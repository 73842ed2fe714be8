#include "local/composed_backend.h"

#include "core/integer_tensors.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

namespace ep {
namespace {

int64_t bytes_per_row(const std::optional<at::Tensor>& t) {
  return t ? c10::multiply_integers(t->sizes().slice(1)) * static_cast<int64_t>(t->element_size()) : 0;
}

// Undefined if no byte of `t` is sent.
int64_t dtype_of(const std::optional<at::Tensor>& t) {
  return static_cast<int64_t>(bytes_per_row(t) > 0 ? t->scalar_type() : at::ScalarType::Undefined);
}

std::vector<int64_t> sizes_with(const at::Tensor& like, int64_t rows) {
  auto sizes = like.sizes().vec();
  sizes[0] = rows;
  return sizes;
}

at::Tensor with_rows(const at::Tensor& like, int64_t rows) {
  return at::empty(sizes_with(like, rows), like.options());
}

// The first `rows` rows of `t`, followed by zeros where it has fewer.
at::Tensor fit_rows(const at::Tensor& t, int64_t rows) {
  if (t.size(0) == rows) {
    return t;
  }
  if (t.size(0) > rows) {
    return t.narrow(0, 0, rows);
  }
  auto out = with_rows(t, rows);
  out.narrow(0, 0, t.size(0)).copy_(t);
  out.narrow(0, t.size(0), rows - t.size(0)).zero_();
  return out;
}

void check_counts(const char* op, const char* name, const std::vector<int64_t>& counts) {
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(
        count >= 0 && count < kMaxSize, op, ": expected ", name, " of this plan in [0, ", kMaxSize, "), got ", count);
  }
}

// Throws unless the values of the plan are consistent: the kernels do not check them.
void check_plan_values(
    const char* op,
    const PlanTensors& plan,
    const std::vector<int64_t>& sent,
    const std::vector<int64_t>& received) {
  check_counts(op, "send_counts", sent);
  check_counts(op, "recv_counts", received);
  const auto& kernels = permute_kernels(plan.send_row);
  kernels.check_send_row(op, plan.send_row, sum(sent));
  // With several ranks, the headers compare these.
  TORCH_CHECK_VALUE(
      sent.size() > 1 || sent == received,
      op,
      ": expected send_counts and recv_counts of this plan to be equal on one rank, got ",
      sent,
      " and ",
      received);
  const int64_t wire_rows = sum(received);
  check_at_most(op, "rows of recv_counts of this plan", wire_rows, kMaxSize);
  if (plan.expert_major) {
    kernels.check_recv_pair(op, plan.recv_map, wire_rows * plan.num_topk());
  }
}

std::vector<Agreed> agreed_of(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  return {
      {"hidden", rows.size(1)},
      {"dtype", static_cast<int64_t>(rows.scalar_type()), true},
      {"bytes of topk_weights per token", bytes_per_row(topk_weights)},
      {"bytes of scales per token", bytes_per_row(scales)},
      {"dtype of topk_weights", dtype_of(topk_weights), true},
      {"dtype of scales", dtype_of(scales), true}};
}

// The wire rows that combine sends for one payload: each is the sum of this rank's rows of one token.
at::Tensor wire_of(
    const PermuteKernels& kernels,
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    int64_t wire_rows,
    const Allocate& allocate) {
  if (plan.expert_major) {
    return kernels.reduce_rows(y, row_weights, plan.recv_map, wire_rows, plan.num_topk(), allocate);
  }
  if (!row_weights) {
    return fit_rows(y, wire_rows);
  }
  // rank_major: every row is a wire row. A reduction over a single slot applies the weight.
  const auto pairs = at::arange(std::min(y.size(0), wire_rows), plan.send_row.options());
  return kernels.reduce_rows(y, row_weights, pairs, wire_rows, 1, allocate);
}

at::Tensor allocate_new(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

}  // namespace

// The exchange of one operator under a plan. With one rank, nothing is exchanged.
class ComposedBackend::Transfer {
 public:
  Transfer(
      ComposedBackend& backend,
      OpKind op,
      const PlanTensors& plan,
      const at::Tensor& rows,
      const std::vector<Agreed>& agreed) {
    const bool forward = op == OpKind::dispatch;
    out_rows = to_host(forward ? plan.send_counts : plan.recv_counts);
    in_rows = to_host(forward ? plan.recv_counts : plan.send_counts);
    backend.reported(op, [&] {
      backend.check_limit(op, "hidden", backend.limits_.hidden, rows.size(1));
      check_plan_values(name_of(op), plan, forward ? out_rows : in_rows, forward ? in_rows : out_rows);
    });
    exchange_ = backend.begin_exchange(op, out_rows, in_rows, agreed);
  }

  // Waits until every rank has checked the headers, before any row is sent. Call it after packing, which overlaps the
  // exchange of headers.
  void confirm() {
    if (exchange_ && !confirmed_) {
      exchange_->confirm();
      confirmed_ = true;
    }
  }

  // Starts to send `wire`. Returns the tensor of received rows, made by `allocate`; it is complete after `finish`.
  at::Tensor start(const at::Tensor& wire, const Allocate& allocate = allocate_new) {
    if (!exchange_) {
      return wire;
    }
    const auto received = allocate(sizes_with(wire, sum(in_rows)), wire.options());
    exchange_->start(received, wire, in_rows);
    return received;
  }

  // Like `start`, into the first rows of `result`.
  void start_into(const at::Tensor& result, const at::Tensor& wire) {
    if (!exchange_) {
      result.narrow(0, 0, wire.size(0)).copy_(wire);
      return;
    }
    exchange_->start(result.narrow(0, 0, sum(in_rows)), wire, in_rows);
  }

  void finish() {
    if (exchange_) {
      exchange_->finish();
    }
  }

  template <class F>
  auto run(const F& f) {
    return exchange_ ? exchange_->run(f) : f();
  }

  std::vector<int64_t> out_rows, in_rows;

 private:
  std::unique_ptr<RowExchange> exchange_;
  bool confirmed_ = false;
};

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
