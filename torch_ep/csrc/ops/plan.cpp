// ep::plan: who sends what where.
//   route   (local)     which wire row carries each (token, slot); how many go to each rank
//   exchange            the counts ride in the exchange's headers, then each wire row's experts follow
//   place   (local)     where each received row goes in the result
#include "core/backend.h"
#include "core/checks.h"
#include "core/host_copy.h"
#include "local/permute.h"
#include "ops/ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

namespace ep {
namespace {

constexpr const char* kOp = "ep::plan";

void check_arguments(
    const at::Tensor& topk_idx,
    int64_t num_experts,
    bool expert_major,
    int64_t alignment,
    std::optional<int64_t> capacity,
    int64_t world_size) {
  check_tensor(kOp, "topk_idx", topk_idx, {"num_tokens", "num_topk"}, topk_idx);
  check_index_type(kOp, "topk_idx", topk_idx);
  check_topk(kOp, topk_idx.size(1));
  check_at_most(kOp, "entries of topk_idx", topk_idx.numel(), kMaxSize);
  check_experts(kOp, num_experts, world_size);
  TORCH_CHECK_VALUE(alignment > 0, kOp, ": expected a positive alignment, got ", alignment);
  check_at_most(kOp, "alignment", alignment, kMaxPadding / (num_experts / world_size));
  TORCH_CHECK_VALUE(
      expert_major || alignment == 1, kOp, ": expected alignment 1 with layout 'rank_major', got ", alignment);
  if (capacity) {
    TORCH_CHECK_VALUE(
        *capacity >= 0 && *capacity % alignment == 0 && *capacity <= kMaxSize,
        kOp,
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
  const bool expert_major = or_tell(OpKind::plan, group_name, [&] {
    const bool is_major = is_expert_major(kOp, layout);
    check_arguments(topk_idx, num_experts, is_major, alignment, capacity, world_size);
    return is_major;
  });
  const std::string group(group_name);
  if (const auto backend = find_backend(group, world_size, topk_idx, OpKind::plan)) {
    return backend->plan(topk_idx, {num_experts, expert_major, alignment, capacity, max_tokens_per_rank});
  }
  const auto check_num_tokens = [&] {
    TORCH_CHECK_VALUE(
        !max_tokens_per_rank || topk_idx.size(0) <= *max_tokens_per_rank,
        kOp,
        ": expected at most max_tokens_per_rank = ",
        max_tokens_per_rank.value_or(0),
        " tokens, got ",
        topk_idx.size(0));
  };
  const PlacementOptions options{expert_major, num_experts / world_size, alignment, capacity, topk_idx.scalar_type()};
  if (const auto* alone = one_rank_kernels(topk_idx, world_size)) {
    check_num_tokens();
    return alone->plan(topk_idx, options);
  }
  const auto comm = find_communicator(group, world_size, OpKind::plan);
  const auto& local = local_kernels(topk_idx);
  const int64_t num_topk = topk_idx.size(1);
  const auto routed = or_tell(OpKind::plan, comm, [&] {
    if (comm) {
      check_limit(OpKind::plan, "num_topk", comm->max_topk, num_topk);
      check_limit(OpKind::plan, "num_experts", comm->max_experts, num_experts);
    }
    check_num_tokens();
    return local.route(kOp, topk_idx, num_experts, world_size);
  });

  at::Tensor wire_topk = routed.wire_topk;
  std::vector<int64_t> recv_rows;
  if (comm) {
    const auto send_rows = to_host(routed.send_counts);
    Exchange exchange(comm, OpKind::plan, send_rows, {}, {{"num_experts", num_experts}, {"num_topk", num_topk}});
    recv_rows = exchange.confirm();
    wire_topk = exchange.run([&] { return at::empty({sum(recv_rows), num_topk}, routed.wire_topk.options()); });
    exchange.start(wire_topk, routed.wire_topk, recv_rows);
    exchange.finish();
  } else {
    recv_rows = {wire_topk.size(0)};
  }
  auto placement = local.place(wire_topk, recv_rows, options);
  const auto recv_counts = at::tensor(recv_rows, at::kInt).to(topk_idx.device());
  return {
      routed.send_row,
      routed.send_counts,
      recv_counts,
      placement.recv_map,
      placement.offsets,
      placement.tokens_per_expert,
      placement.num_dropped};
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

}  // namespace ep
