// ep::dispatch and ep::combine: the same exchange in the two directions, between the local kernels that a layout needs.
//   dispatch   pack -> exchange -> (expert_major) expand
//   combine    (expert_major) fold -> exchange -> sum
#include "core/backend.h"
#include "core/checks.h"
#include "core/host_copy.h"
#include "local/permute.h"
#include "ops/ops.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace ep {
namespace {

int64_t bytes_per_row(const std::optional<at::Tensor>& t) {
  return t ? c10::multiply_integers(t->sizes().slice(1)) * static_cast<int64_t>(t->element_size()) : 0;
}

// Undefined: nothing of it is sent.
int64_t dtype_of(const std::optional<at::Tensor>& t) {
  return static_cast<int64_t>(bytes_per_row(t) > 0 ? t->scalar_type() : at::ScalarType::Undefined);
}

at::Tensor with_rows(const at::Tensor& like, int64_t rows) {
  auto sizes = like.sizes().vec();
  sizes[0] = rows;
  return at::empty(sizes, like.options());
}

std::shared_ptr<Backend> backend_of(const PlanTensors& plan, c10::string_view group_name, OpKind op) {
  return find_backend(std::string(group_name), plan.send_counts.size(0), plan.send_row, op);
}

void check_counts(const char* op, const char* name, const std::vector<int64_t>& counts) {
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(
        count >= 0 && count < kMaxSize, op, ": expected ", name, " of this plan in [0, ", kMaxSize, "), got ", count);
  }
}

// Throws unless the plan's numbers fit each other: the kernels follow them unseen.
void check_plan_values(
    const char* op,
    const PlanTensors& plan,
    const std::vector<int64_t>& sent,
    const std::vector<int64_t>& received) {
  check_counts(op, "send_counts", sent);
  check_counts(op, "recv_counts", received);
  const auto& local = local_kernels(plan.send_row);
  local.check_send_row(op, plan.send_row, sum(sent));
  // With several ranks the headers compare these.
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
    local.check_recv_pair(op, plan.recv_map, wire_rows * plan.send_row.size(1));
  }
}

// One exchange of rows under a plan, and the buffers of its payloads. With one rank it does nothing at all.
class Move {
 public:
  // `rows`: the payload that gives the row size.
  Move(
      OpKind op,
      const PlanTensors& plan,
      c10::string_view group_name,
      const at::Tensor& rows,
      const std::vector<Agreed>& agreed) {
    const auto comm = find_communicator(std::string(group_name), plan.send_counts.size(0), op);
    const bool forward = op == OpKind::dispatch;
    out_rows = to_host(forward ? plan.send_counts : plan.recv_counts);
    in_rows = to_host(forward ? plan.recv_counts : plan.send_counts);
    or_tell(op, comm, [&] {
      if (comm) {
        check_limit(op, "hidden", comm->max_hidden, rows.size(1));
      }
      check_plan_values(name_of(op), plan, forward ? out_rows : in_rows, forward ? in_rows : out_rows);
    });
    if (comm) {
      exchange_.emplace(comm, op, out_rows, in_rows, agreed);
    }
  }

  // Every rank checks the headers before any row moves; packing goes on meanwhile.
  void confirm() {
    if (exchange_ && !confirmed_) {
      exchange_->confirm();
      confirmed_ = true;
    }
  }

  // Returns what the other side gets of `wire`: in the first rows of `into` if given, and there only after `finish`.
  at::Tensor start(const at::Tensor& wire, const std::optional<at::Tensor>& into = std::nullopt) {
    if (!exchange_) {
      if (into) {
        into->narrow(0, 0, wire.size(0)).copy_(wire);
        return *into;
      }
      return wire;
    }
    auto received = into ? into->narrow(0, 0, sum(in_rows)) : with_rows(wire, sum(in_rows));
    exchange_->start(received, wire, in_rows);
    return into ? *into : received;
  }

  void finish() {
    if (exchange_) {
      exchange_->finish();
    }
  }

  // Returns what `f`, all that follows, does; an error in it is told to the other ranks.
  template <class F>
  auto run(const F& f) {
    return exchange_ ? exchange_->run(f) : f();
  }

  std::vector<int64_t> out_rows, in_rows;

 private:
  std::optional<Exchange> exchange_;
  bool confirmed_ = false;
};

// The first `rows` rows of `t`, zeros where it has fewer.
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

// What goes out and comes back beside the rows: of tokens in dispatch, of received rows in combine.
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

std::vector<Agreed> agreed_of(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  return {
      {"hidden", rows.size(1)},
      {"dtype", static_cast<int64_t>(rows.scalar_type()), true},
      {"bytes of topk_weights a token", bytes_per_row(topk_weights)},
      {"bytes of scales a token", bytes_per_row(scales)},
      {"dtype of topk_weights", dtype_of(topk_weights), true},
      {"dtype of scales", dtype_of(scales), true}};
}

// What combine sends of one payload of rows: a wire row each, reduced here first where there are several.
at::Tensor wire_of(
    const LocalKernels& local,
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    int64_t wire_rows) {
  if (plan.expert_major) {
    return local.fold_rows(y, row_weights, plan.recv_map, wire_rows, plan.send_row.size(1));
  }
  if (!row_weights) {
    return fit_rows(y, wire_rows);
  }
  // Rows and wire rows are the same ones: a fold of one slot each.
  const auto slots = at::arange(std::min(y.size(0), wire_rows), plan.send_row.options());
  return local.fold_rows(y, row_weights, slots, wire_rows, 1);
}

Payloads combine_payloads(
    Move& move,
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  const auto& local = local_kernels(y);
  const int64_t wire_rows = sum(move.out_rows);
  if (wire_rows > plan.recv_map.size(0)) {
    // Rows were dropped, and what bounds their number is the headers: no memory for them before these are there.
    move.confirm();
  }
  const auto wire_y = wire_of(local, plan, y, row_weights, wire_rows);
  std::optional<at::Tensor> wire_weights, wire_scales;
  if (topk_weights) {
    wire_weights = plan.expert_major ? local.fold_slots(*topk_weights, plan.recv_map, wire_rows, plan.send_row.size(1))
                                     : fit_rows(*topk_weights, wire_rows);
  }
  if (scales) {
    wire_scales = wire_of(local, plan, *scales, std::nullopt, wire_rows);
  }
  move.confirm();
  const auto home_y = move.start(wire_y);
  std::optional<at::Tensor> home_weights, home_scales;
  if (wire_weights) {
    home_weights = move.start(*wire_weights);
  }
  if (wire_scales) {
    home_scales = move.start(*wire_scales);
  }
  move.finish();
  Payloads result{local.sum_rows(home_y, plan.send_row), std::nullopt, std::nullopt};
  if (home_weights) {
    std::get<1>(result) = local.gather_slots(*home_weights, plan.send_row);
  }
  if (home_scales) {
    std::get<2>(result) = local.sum_rows(*home_scales, plan.send_row);
  }
  return result;
}

Payloads combine_rows(
    const PlanTensors& plan,
    c10::string_view group_name,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  Move move(OpKind::combine, plan, group_name, y, agreed_of(y, topk_weights, scales));
  return move.run([&] { return combine_payloads(move, plan, y, row_weights, topk_weights, scales); });
}

Payloads dispatch_payloads(
    Move& move,
    const PlanTensors& plan,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  const auto& local = local_kernels(x);
  const int64_t out_rows = sum(move.out_rows), in_rows = sum(move.in_rows);
  const int64_t rows = plan.recv_map.size(0), num_topk = plan.send_row.size(1);
  auto wire_x = local.pack_rows(x, plan.send_row, out_rows);
  std::optional<at::Tensor> wire_weights, wire_scales;
  if (topk_weights) {
    wire_weights = local.pack_slots(*topk_weights, plan.send_row, out_rows);
  }
  if (scales) {
    wire_scales = local.pack_rows(*scales, plan.send_row, out_rows);
  }
  move.confirm();

  // Without expansion the rows arrive where the result has them; only its tail is left to clear.
  const auto start = [&](at::Tensor& wire) {
    if (plan.expert_major || rows <= in_rows) {
      wire = move.start(wire);
      return;
    }
    auto result = with_rows(wire, rows);
    result.narrow(0, in_rows, rows - in_rows).zero_();
    wire = move.start(wire, result);
  };
  start(wire_x);
  if (wire_weights) {
    start(*wire_weights);
  }
  if (wire_scales) {
    start(*wire_scales);
  }
  move.finish();

  const auto place_rows = [&](const at::Tensor& wire) {
    if (plan.expert_major) {
      return local.expand_rows(wire, plan.recv_map, num_topk);
    }
    return rows < wire.size(0) ? wire.narrow(0, 0, rows).clone() : wire;
  };
  Payloads result{place_rows(wire_x), std::nullopt, std::nullopt};
  if (wire_weights) {
    std::get<1>(result) =
        plan.expert_major ? local.expand_slots(*wire_weights, plan.recv_map) : place_rows(*wire_weights);
  }
  if (wire_scales) {
    std::get<2>(result) = place_rows(*wire_scales);
  }
  return result;
}

}  // namespace

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
  constexpr const char* op = "ep::dispatch";
  const auto plan = or_tell(OpKind::dispatch, group_name, [&] {
    const PlanTensors checked{send_row, send_counts, recv_counts, recv_map, is_expert_major(op, layout)};
    check_plan(op, checked);
    const auto num_tokens = send_row.size(0);
    check_payloads(op, "x", x, num_tokens, kTokens, topk_weights, dims_of(send_row), kTokenSlots, scales, send_row);
    check_row_type(op, "x", x);
    return checked;
  });
  if (const auto backend = backend_of(plan, group_name, OpKind::dispatch)) {
    return backend->dispatch(plan, x, topk_weights, scales);
  }
  if (const auto* alone = one_rank_kernels(x, send_counts.size(0))) {
    return alone->dispatch(plan, x, topk_weights, scales);
  }

  Move move(OpKind::dispatch, plan, group_name, x, agreed_of(x, topk_weights, scales));
  return move.run([&] { return dispatch_payloads(move, plan, x, topk_weights, scales); });
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
  constexpr const char* op = "ep::combine";
  const auto plan = or_tell(OpKind::combine, group_name, [&] {
    const PlanTensors checked{send_row, send_counts, recv_counts, recv_map, is_expert_major(op, layout)};
    check_plan(op, checked);
    const auto num_rows = recv_map.size(0);
    check_payloads(op, "y", y, num_rows, kRows, topk_weights, dims_of(recv_map), kReturnedWeights, scales, send_row);
    check_sum_type(op, "y", y);
    if (scales) {
      check_sum_type(op, "scales", *scales);
    }
    return checked;
  });
  if (const auto backend = backend_of(plan, group_name, OpKind::combine)) {
    return backend->combine(plan, y, std::nullopt, topk_weights, scales);
  }
  if (const auto* alone = one_rank_kernels(y, send_counts.size(0))) {
    return alone->combine(plan, y, std::nullopt, topk_weights, scales);
  }

  return combine_rows(plan, group_name, y, std::nullopt, topk_weights, scales);
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
  constexpr const char* op = "ep::combine";
  const auto plan = or_tell(OpKind::combine, group_name, [&] {
    const PlanTensors checked{send_row, send_counts, recv_counts, recv_map, is_expert_major(op, layout)};
    check_plan(op, checked);
    check_tensor(op, "y", y, {recv_map.size(0), "hidden"}, send_row, kRows);
    check_sum_type(op, "y", y);
    check_tensor(op, "row_weights", row_weights, {recv_map.size(0)}, send_row, kRowWeights);
    check_sum_type(op, "row_weights", row_weights);
    return checked;
  });
  if (const auto backend = backend_of(plan, group_name, OpKind::combine)) {
    return std::get<0>(backend->combine(plan, y, row_weights, std::nullopt, std::nullopt));
  }
  if (const auto* alone = one_rank_kernels(y, send_counts.size(0))) {
    return std::get<0>(alone->combine(plan, y, row_weights, std::nullopt, std::nullopt));
  }

  return std::get<0>(combine_rows(plan, group_name, y, row_weights, std::nullopt, std::nullopt));
}

at::Tensor zero_after(const at::Tensor& dep) {
  return at::zeros({}, dep.options());
}

}  // namespace ep
