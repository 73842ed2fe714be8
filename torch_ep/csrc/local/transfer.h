// The exchange of one operator under a plan, and what it checks: shared by the files of ComposedBackend.
#pragma once

#include "core/integer_tensors.h"
#include "local/composed_backend.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace ep {

inline int64_t bytes_per_row(const std::optional<at::Tensor>& t) {
  return t ? c10::multiply_integers(t->sizes().slice(1)) * static_cast<int64_t>(t->element_size()) : 0;
}

// Undefined if no byte of `t` is sent.
inline int64_t dtype_of(const std::optional<at::Tensor>& t) {
  return static_cast<int64_t>(bytes_per_row(t) > 0 ? t->scalar_type() : at::ScalarType::Undefined);
}

inline std::vector<int64_t> sizes_with(const at::Tensor& like, int64_t rows) {
  auto sizes = like.sizes().vec();
  sizes[0] = rows;
  return sizes;
}

inline at::Tensor with_rows(const at::Tensor& like, int64_t rows) {
  return at::empty(sizes_with(like, rows), like.options());
}

// The first `rows` rows of `t`, followed by zeros where it has fewer.
inline at::Tensor fit_rows(const at::Tensor& t, int64_t rows) {
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

inline void check_counts(const char* op, const char* name, const std::vector<int64_t>& counts) {
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(
        count >= 0 && count < kMaxSize, op, ": expected ", name, " of this plan in [0, ", kMaxSize, "), got ", count);
  }
}

// Throws unless the values of the plan are consistent: the kernels do not check them.
inline void check_plan_values(
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

inline std::vector<Agreed> agreed_of(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    int64_t parts = 1) {
  return {
      {"hidden", rows.size(1)},
      {"dtype", static_cast<int64_t>(rows.scalar_type()), true},
      {"bytes of topk_weights per token", bytes_per_row(topk_weights)},
      {"bytes of scales per token", bytes_per_row(scales)},
      {"dtype of topk_weights", dtype_of(topk_weights), true},
      {"dtype of scales", dtype_of(scales), true},
      {"levels and parts (1: one level)", parts}};
}

inline at::Tensor allocate_new(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

// The wire rows that combine sends for one payload: each is the sum of this rank's rows of one token.
inline at::Tensor wire_of(
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

  // Starts to send `wire` into `received`. Returns a number for `wait`. These need several ranks.
  size_t start_rows(const at::Tensor& received, const at::Tensor& wire, bool has_own_rows = false) {
    return exchange_->start(received, wire, in_rows, has_own_rows);
  }
  void wait(size_t transfer) { exchange_->wait(transfer); }
  int64_t rank() const { return exchange_->rank(); }

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

  // Between these, other exchanges may run.
  void suspend() { exchange_->suspend(); }
  void resume() { exchange_->resume(); }

  template <class F>
  auto run(const F& f) {
    return exchange_ ? exchange_->run(f) : f();
  }

  std::vector<int64_t> out_rows, in_rows;

 private:
  std::unique_ptr<RowExchange> exchange_;
  bool confirmed_ = false;
};

}  // namespace ep
