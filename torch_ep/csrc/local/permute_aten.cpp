// The permute kernels composed of torch's own operators, for any device that has these. On CUDA they are the reference
// for the faster kernels. Deterministic: where a scatter writes an element twice, the values are equal or not used.
#include "local/permute.h"

#include "core/integer_tensors.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace ep {
namespace {

at::ScalarType accumulator_of(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_indices(const char* op, const at::Tensor& idx, int64_t num_experts) {
  const auto outside = idx.lt(-1).logical_or(idx.ge(num_experts));
  const auto sorted = std::get<0>(idx.sort(/*dim=*/1));
  const auto left = sorted.narrow(1, 0, idx.size(1) - 1), right = sorted.narrow(1, 1, idx.size(1) - 1);
  const auto twice = left.eq(right).logical_and(left.ge(0));
  if (!outside.any().logical_or(twice.any()).item<bool>()) {
    return;
  }
  // The CPU's check finds the first bad index and throws the error.
  cpu_kernels.plan_send(op, idx.cpu(), num_experts, 1);
}

SendPlan plan_send(const char* op, const at::Tensor& topk_idx, int64_t num_experts, int64_t world_size) {
  const int64_t num_tokens = topk_idx.size(0), num_topk = topk_idx.size(1);
  const int64_t num_local_experts = num_experts / world_size;
  check_indices(op, topk_idx, num_experts);
  const auto idx = topk_idx.to(at::kLong);
  const auto valid = idx.ge(0);
  const auto rank = idx.div(num_local_experts, "floor").clamp_min(0);
  // visits[token, rank]: whether the token has a wire row to the rank. The index of that wire row is the running count,
  // rank by rank.
  auto visits = at::zeros({num_tokens, world_size + 1}, idx.options());
  visits.scatter_(1, at::where(valid, rank, world_size), 1);
  visits = visits.narrow(1, 0, world_size);
  const auto position = visits.t().contiguous().view(-1).cumsum(0).view({world_size, num_tokens}).t() - 1;

  SendPlan plan;
  const auto wire_row = at::where(valid, position.gather(1, rank), -1);
  plan.send_row = wire_row.to(at::kInt).contiguous();
  const auto counts = visits.sum(0);
  plan.send_counts = counts.to(at::kInt);
  const int64_t wire_rows = counts.sum().item<int64_t>();
  auto wire_topk = at::full({wire_rows * num_topk + 1}, -1, topk_idx.options().dtype(at::kInt));
  const auto column = at::arange(num_topk, idx.options());
  const auto target =
      at::where(valid, wire_row * num_topk + column, wire_rows * num_topk);  // the last element is not used
  const auto expert = at::where(valid, idx.remainder(num_local_experts), -1).to(at::kInt);
  wire_topk.scatter_(0, target.view(-1), expert.view(-1));
  plan.wire_topk = wire_topk.narrow(0, 0, wire_rows * num_topk).view({wire_rows, num_topk});
  return plan;
}

RecvPlan plan_recv(const at::Tensor& wire_topk, const std::vector<int64_t>& recv_rows, const RecvPlanOptions& options) {
  const int64_t wire_rows = wire_topk.size(0), num_topk = wire_topk.size(1);
  const int64_t num_experts = options.num_local_experts;
  const auto ints = wire_topk.options();
  RecvPlan plan;
  if (!options.expert_major) {
    const int64_t rows = options.capacity.value_or(wire_rows), kept = std::min(rows, wire_rows);
    check_num_rows(rows, wire_rows);
    plan.recv_map = at::full({rows, num_topk}, -1, ints.dtype(options.index_dtype));
    plan.recv_map.narrow(0, 0, kept).copy_(wire_topk.narrow(0, 0, kept));
    plan.offsets = to_device(recv_rows, wire_topk).cumsum(0).clamp_max(rows).to(at::kInt);
    const auto experts = plan.recv_map.to(at::kLong).view(-1) + 1;
    plan.tokens_per_expert = experts.bincount({}, num_experts + 1).narrow(0, 1, num_experts).to(at::kInt);
    plan.num_dropped = at::full({}, wire_rows - kept, ints);
    return plan;
  }
  const auto flat = wire_topk.view(-1).to(at::kLong);
  // A stable sort by expert keeps wire order inside a group; -1 sorts after all experts.
  const auto [experts, order] = at::where(flat.ge(0), flat, num_experts).sort(/*stable=*/true, 0, false);
  const auto counts = experts.bincount({}, num_experts + 1).narrow(0, 0, num_experts);
  const auto padded = (counts + options.alignment - 1).div(options.alignment, "floor") * options.alignment;
  const auto ends = padded.cumsum(0);
  const int64_t rows = options.capacity ? *options.capacity : ends[num_experts - 1].item<int64_t>();
  check_num_rows(rows, wire_rows * num_topk);
  const auto sorted_begin = counts.cumsum(0) - counts, begin = ends - padded;
  const auto expert = experts.clamp_max(num_experts - 1);
  const auto rank_in_group = at::arange(experts.size(0), flat.options()) - sorted_begin.index_select(0, expert);
  auto row = begin.index_select(0, expert) + rank_in_group;
  row = at::where(experts.lt(num_experts).logical_and(row.lt(rows)), row, rows);
  auto recv_pair = at::full({rows + 1}, -1, ints);  // the last entry takes overflow
  recv_pair.scatter_(0, row, order.to(at::kInt));
  plan.recv_map = recv_pair.narrow(0, 0, rows);
  plan.offsets = ends.clamp_max(rows).to(at::kInt);
  const auto kept = (rows - begin).clamp_min(0).minimum(counts);
  plan.tokens_per_expert = kept.to(at::kInt);
  plan.num_dropped = (counts - kept).sum().to(at::kInt);
  return plan;
}

void check_send_row(const char* op, const at::Tensor& send_row, int64_t wire_rows) {
  if (send_row.numel() >= wire_rows && wire_rows > 0) {
    const auto entry = send_row.to(at::kLong).view(-1);
    const auto is_row = entry.ge(0).logical_and(entry.lt(wire_rows));
    const auto row = at::where(is_row, entry, wire_rows);  // the last element is not used
    const auto token = at::arange(entry.numel(), entry.options()).div(send_row.size(1), "floor");
    const auto token_of = at::full({wire_rows + 1}, -1, entry.options()).scatter_(0, row, token);
    const auto has_token = token_of.narrow(0, 0, wire_rows).ge(0).all();
    const auto is_one = token_of.index_select(0, row).eq(token).logical_or(is_row.logical_not()).all();
    if (is_row.logical_or(entry.eq(-1)).all().logical_and(has_token).logical_and(is_one).item<bool>()) {
      return;
    }
  }
  // The CPU's check finds the first bad index and throws the error.
  cpu_kernels.check_send_row(op, send_row.cpu(), wire_rows);
}

void check_recv_pair(const char* op, const at::Tensor& recv_pair, int64_t pairs) {
  if (recv_pair.numel() > 0 && recv_pair.lt(-1).logical_or(recv_pair.ge(pairs)).any().item<bool>()) {
    cpu_kernels.check_recv_pair(op, recv_pair.cpu(), pairs);
  }
}

// For each position in [0, size): the i with index[i] == position, or -1.
at::Tensor inverse(const at::Tensor& index, int64_t size) {
  auto out = at::full({size + 1}, -1, index.options().dtype(at::kLong));
  const auto target = at::where(index.ge(0), index.to(at::kLong), size);
  out.scatter_(0, target, at::arange(index.size(0), out.options()));
  return out.narrow(0, 0, size);
}

// rows[index], zero where the index is -1. fp8 lacks these operators, so its rows are selected as bytes.
at::Tensor select_or_zero(const at::Tensor& rows, const at::Tensor& index) {
  if (rows.size(0) == 0) {
    auto sizes = rows.sizes().vec();
    sizes[0] = index.size(0);
    return at::zeros(sizes, rows.options());
  }
  const auto bytes = c10::isFloat8Type(rows.scalar_type()) ? rows.view(at::kByte) : rows;
  auto out = bytes.index_select(0, index.clamp_min(0));
  auto mask_shape = std::vector<int64_t>(rows.dim(), 1);
  mask_shape[0] = index.size(0);
  out.masked_fill_(index.lt(0).view(mask_shape), 0);
  return out.view(rows.scalar_type());
}

at::Tensor pack_rows(const at::Tensor& x, const at::Tensor& send_row, int64_t wire_rows, const Allocate& /*allocate*/) {
  const int64_t num_tokens = send_row.size(0), num_topk = send_row.size(1);
  auto token = at::zeros({wire_rows + 1}, send_row.options().dtype(at::kLong));
  const auto target = at::where(send_row.ge(0), send_row.to(at::kLong), wire_rows).view(-1);
  // Slots that share a wire row write the same token.
  const auto tokens = at::arange(num_tokens, token.options()).unsqueeze(1).expand({num_tokens, num_topk});
  token.scatter_(0, target, tokens.reshape(-1));
  return select_or_zero(x, token.narrow(0, 0, wire_rows));
}

// The index of (token, slot) in a flat [wire_rows, num_topk], or -1.
at::Tensor flat_slots(const at::Tensor& send_row) {
  const auto wire_row = send_row.to(at::kLong);
  const auto column = at::arange(send_row.size(1), wire_row.options());
  return at::where(wire_row.ge(0), wire_row * send_row.size(1) + column, -1).view(-1);
}

at::Tensor pack_slots(const at::Tensor& w, const at::Tensor& send_row, int64_t wire_rows) {
  const int64_t num_topk = send_row.size(1);
  return select_or_zero(w.view(-1), inverse(flat_slots(send_row), wire_rows * num_topk)).view({wire_rows, num_topk});
}

at::Tensor expand_rows(const at::Tensor& wire, const at::Tensor& recv_pair, int64_t num_topk) {
  return select_or_zero(wire, recv_pair.to(at::kLong).div(num_topk, "floor"));
}

at::Tensor expand_slots(const at::Tensor& wire, const at::Tensor& recv_pair) {
  return select_or_zero(wire.view(-1), recv_pair.to(at::kLong));
}

// out[i] = sum over columns k of rows[index[i, k]] (times weights), -1 skipped.
at::Tensor sum_selected(const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& index) {
  const auto acc_type = accumulator_of(rows);
  // Adding -0 never changes a sum, not even the sign of a zero; a row that sums nothing is +0.
  auto acc = at::full({index.size(0), rows.size(1)}, -0.0, rows.options().dtype(acc_type));
  for (int64_t k = 0; k < index.size(1); ++k) {
    const auto column = index.select(1, k);
    auto term = select_or_zero(rows, column).to(acc_type);
    if (weights) {
      term = term * select_or_zero(*weights, column).to(acc_type).unsqueeze(1);
    }
    acc.add_(term.masked_fill(column.lt(0).unsqueeze(1), -0.0));
  }
  acc.masked_fill_(index.lt(0).all(1).unsqueeze(1), 0.0);
  return acc.to(rows.scalar_type());
}

at::Tensor reduce_rows(
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const at::Tensor& recv_pair,
    int64_t wire_rows,
    int64_t num_topk,
    const Allocate& /*allocate*/) {
  return sum_selected(y, row_weights, inverse(recv_pair, wire_rows * num_topk).view({wire_rows, num_topk}));
}

at::Tensor return_slots(const at::Tensor& w, const at::Tensor& recv_pair, int64_t wire_rows, int64_t num_topk) {
  return select_or_zero(w, inverse(recv_pair, wire_rows * num_topk)).view({wire_rows, num_topk});
}

at::Tensor sum_rows(const at::Tensor& wire, const at::Tensor& send_row) {
  // A slot counts only if no earlier one of its token names the same wire row.
  const int64_t num_topk = send_row.size(1);
  auto index = send_row.to(at::kLong);
  const auto earlier = at::ones({num_topk, num_topk}, index.options()).tril(-1).to(at::kBool);
  const auto repeats = index.unsqueeze(2).eq(index.unsqueeze(1)).logical_and(earlier).any(2);
  return sum_selected(wire, std::nullopt, at::where(repeats, -1, index));
}

at::Tensor gather_slots(const at::Tensor& wire, const at::Tensor& send_row) {
  return select_or_zero(wire.view(-1), flat_slots(send_row)).view(send_row.sizes());
}

}  // namespace

const PermuteKernels aten_kernels{
    .plan_send = plan_send,
    .plan_recv = plan_recv,
    .check_send_row = check_send_row,
    .check_recv_pair = check_recv_pair,
    .pack_rows = pack_rows,
    .pack_slots = pack_slots,
    .expand_rows = expand_rows,
    .expand_slots = expand_slots,
    .reduce_rows = reduce_rows,
    .return_slots = return_slots,
    .sum_rows = sum_rows,
    .gather_slots = gather_slots,
};

}  // namespace ep
