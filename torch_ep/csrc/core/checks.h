// Argument checks shared by the operators. A message names the operator, the expected and the actual value.
// `torch_ep/meta.py` raises the same messages while tracing.
#pragma once

#include "core/types.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <limits>
#include <optional>
#include <ostream>
#include <string_view>

namespace ep {

// Upper bounds of integer arguments. They keep every product of two arguments and every sum of rows within an int64,
// and they bound the size of every table. `torch_ep/meta.py` has the same bounds.
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();  // bound of int32 counts and indices
constexpr int64_t kMaxExperts = int64_t{1} << 24;
constexpr int64_t kMaxTopk = (int64_t{1} << 16) - 1;
constexpr int64_t kMaxPadding = int64_t{1} << 30;  // rows of padding of all local experts

inline void check_at_most(const char* op, const char* name, int64_t got, int64_t most) {
  TORCH_CHECK_VALUE(got <= most, op, ": expected ", name, " of at most ", most, ", got ", got);
}

inline void check_topk(const char* op, int64_t num_topk) {
  TORCH_CHECK_VALUE(num_topk > 0, op, ": expected at least one expert per token, got ", num_topk);
  check_at_most(op, "num_topk", num_topk, kMaxTopk);
}

// Also bounds world_size, which divides num_experts.
inline void check_experts(const char* op, int64_t num_experts, int64_t world_size) {
  TORCH_CHECK_VALUE(world_size > 0, op, ": expected a positive world_size, got ", world_size);
  TORCH_CHECK_VALUE(
      num_experts > 0 && num_experts % world_size == 0,
      op,
      ": expected num_experts to be a positive multiple of the world size ",
      world_size,
      ", got ",
      num_experts);
  check_at_most(op, "num_experts", num_experts, kMaxExperts);
}

// Throws if `got` is above a limit of torch_ep.init; -1: no limit.
inline void check_limit(const char* op, const char* name, int64_t limit, int64_t got) {
  TORCH_CHECK_VALUE(
      limit < 0 || got <= limit,
      op,
      ": expected at most ",
      name,
      " = ",
      limit,
      ", the limit given to torch_ep.init, got ",
      got);
}

inline void check_num_tokens(const char* op, int64_t num_tokens, std::optional<int64_t> max_tokens_per_rank) {
  TORCH_CHECK_VALUE(
      !max_tokens_per_rank || num_tokens <= *max_tokens_per_rank,
      op,
      ": expected at most max_tokens_per_rank = ",
      max_tokens_per_rank.value_or(0),
      " tokens, got ",
      num_tokens);
}

inline bool is_expert_major(const char* op, std::string_view layout) {
  TORCH_CHECK_VALUE(
      layout == "rank_major" || layout == "expert_major",
      op,
      ": expected layout 'rank_major' or 'expert_major', got '",
      layout,
      "'");
  return layout == "expert_major";
}

// One dimension of an expected shape: a size, or the name of a size that may take any value.
struct Dim {
  Dim(int64_t size) : size(size) {}
  Dim(const char* name) : name(name) {}

  int64_t size = 0;
  const char* name = nullptr;
};

inline std::ostream& operator<<(std::ostream& out, const Dim& dim) {
  return dim.name ? out << dim.name : out << dim.size;
}

inline c10::SmallVector<Dim, 2> dims_of(const at::Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

// Ends of an error message: why a shape is expected, and what to do about another shape.
struct ShapeOf {
  const char* what;
  const char* remedy;
};

constexpr ShapeOf kOwnShape{"", ""};
constexpr ShapeOf kPlanField{"", ": pass the plan as torch_ep.plan returned it"};
constexpr ShapeOf kTokens{", one row per token of the plan", ": pass the tokens of the plan's topk_idx"};
constexpr ShapeOf kTokenSlots{", one per token and slot of the plan", ": pass the weights of the plan's topk_idx"};
constexpr ShapeOf kRows{
    ", one row per row of the dispatch",
    ": pass the experts' results for the rows that it returned"};
constexpr ShapeOf kRowWeights{
    ", one per row of the dispatch",
    ": pass the weights that it returned in layout expert_major"};
constexpr ShapeOf kReturnedWeights{
    ", as dispatch returned the weights",
    ": pass these, or others in their places; to weigh rows pass row_weights="};
constexpr ShapeOf kTokensOfX{", one row per token of x", ": pass the topk_idx of these tokens"};
constexpr ShapeOf kEntries{", one per entry of topk_idx", ": pass the weights of that topk_idx"};
constexpr ShapeOf kLowLatencyRows{
    ", as low_latency_dispatch returned the rows",
    ": pass the experts' results in their places"};
constexpr ShapeOf kLowLatencyPlanField{"", ": pass the plan as torch_ep.low_latency_dispatch returned it"};
constexpr ShapeOf kInFlight{"", ": pass what the send returned, whole"};
constexpr ShapeOf kGroups{", one end per group", ""};

// Throws if the tensor's memory was freed. FSDP, for example, frees the storage of a parameter and keeps the tensor.
inline void check_memory(const char* op, const char* name, const at::Tensor& t) {
  int64_t elements = t.numel() == 0 ? 0 : t.storage_offset() + 1;
  for (int64_t dim = 0; elements > 0 && dim < t.dim(); ++dim) {
    elements += (t.size(dim) - 1) * t.stride(dim);
  }
  const auto bytes = elements * static_cast<int64_t>(t.element_size());
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(t.storage().nbytes()) >= bytes,
      op,
      ": expected ",
      name,
      " with a storage of at least ",
      bytes,
      " bytes, got ",
      t.storage().nbytes(),
      ": its memory was freed, as FSDP frees that of parameters: pass it while it is there");
}

inline void check_tensor(
    const char* op,
    const char* name,
    const at::Tensor& t,
    at::ArrayRef<Dim> shape,
    const at::Tensor& device_of,
    const ShapeOf& of = kOwnShape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i].name != nullptr || shape[i].size == t.size(i);
  }
  TORCH_CHECK_VALUE(fits, op, ": expected ", name, " of shape ", shape, of.what, ", got ", t.sizes(), of.remedy);
  TORCH_CHECK_VALUE(
      t.device() == device_of.device(), op, ": expected ", name, " on ", device_of.device(), ", got ", t.device());
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": expected contiguous ", name, ", got strides ", t.strides());
  check_memory(op, name, t);
}

inline void check_int32(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, op, ": expected ", name, " of dtype Int, got ", t.scalar_type());
}

inline void check_index_type(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == at::kInt || t.scalar_type() == at::kLong,
      op,
      ": expected ",
      name,
      " of dtype Int or Long, got ",
      t.scalar_type());
}

inline void check_plan(const char* op, const PlanTensors& plan) {
  const auto& on = plan.send_row;
  check_tensor(op, "send_row", plan.send_row, {"num_tokens", "num_topk"}, on, kPlanField);
  check_int32(op, "send_row", plan.send_row);
  check_topk(op, plan.send_row.size(1));
  check_tensor(op, "send_counts", plan.send_counts, {"world_size"}, on, kPlanField);
  check_int32(op, "send_counts", plan.send_counts);
  check_tensor(op, "recv_counts", plan.recv_counts, {plan.send_counts.size(0)}, on, kPlanField);
  check_int32(op, "recv_counts", plan.recv_counts);
  if (plan.expert_major) {
    check_tensor(op, "recv_pair", plan.recv_map, {"num_rows"}, on, kPlanField);
    check_int32(op, "recv_pair", plan.recv_map);
  } else {
    check_tensor(op, "recv_topk_idx", plan.recv_map, {"num_rows", plan.send_row.size(1)}, on, kPlanField);
    check_index_type(op, "recv_topk_idx", plan.recv_map);
  }
}

// Throws unless the low-latency operators send rows of this dtype.
inline void check_low_latency_type(const char* op, const char* name, at::ScalarType type) {
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
      op,
      ": expected ",
      name,
      " of dtype Float, BFloat16 or Half, got ",
      type);
}

inline bool is_sum_type(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline void check_sum_type(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(
      is_sum_type(t.scalar_type()),
      op,
      ": expected ",
      name,
      " of dtype Double, Float, BFloat16 or Half, got ",
      t.scalar_type());
}

// Throws unless dispatch copies rows of this dtype. It does not interpret them: a Byte may hold two 4-bit numbers.
inline void check_row_type(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(
      is_sum_type(t.scalar_type()) || t.scalar_type() == at::kFloat8_e4m3fn || t.scalar_type() == at::kFloat8_e5m2 ||
          t.scalar_type() == at::kByte,
      op,
      ": expected ",
      name,
      " of dtype Double, Float, BFloat16, Half, Float8_e4m3fn, Float8_e5m2 or Byte, got ",
      t.scalar_type());
}

}  // namespace ep
