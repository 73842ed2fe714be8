// Argument checks shared by the operators. A message names the op, what was expected and what came; `torch_ep/meta.py`
// raises the same ones while tracing.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

namespace ep {

struct PlanTensors {
  const at::Tensor& send_slot;
  const at::Tensor& send_counts;
  const at::Tensor& recv_counts;
  const at::Tensor& recv_map;
  bool expert_major;
};

inline bool is_expert_major(const char* op, std::string_view layout) {
  TORCH_CHECK_VALUE(
      layout == "rank_major" || layout == "expert_major",
      op,
      ": expected layout 'rank_major' or 'expert_major', got '",
      layout,
      "'");
  return layout == "expert_major";
}

inline void check_tensor(
    const char* op,
    const char* name,
    const at::Tensor& t,
    at::IntArrayRef shape,  // -1: any size
    const at::Tensor& device_of) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i] < 0 || shape[i] == t.size(i);
  }
  TORCH_CHECK_VALUE(fits, op, ": expected ", name, " of shape ", shape, " (-1: any size), got ", t.sizes());
  TORCH_CHECK_VALUE(
      t.device() == device_of.device(), op, ": expected ", name, " on ", device_of.device(), ", got ", t.device());
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": expected contiguous ", name, ", got strides ", t.strides());
}

inline void check_int32(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, op, ": expected ", name, " of dtype Int, got ", t.scalar_type());
}

inline void check_plan(const char* op, const PlanTensors& plan) {
  const auto& on = plan.send_slot;
  check_tensor(op, "send_slot", plan.send_slot, {-1, -1}, on);
  check_int32(op, "send_slot", plan.send_slot);
  check_tensor(op, "send_counts", plan.send_counts, {-1}, on);
  check_int32(op, "send_counts", plan.send_counts);
  check_tensor(op, "recv_counts", plan.recv_counts, plan.send_counts.sizes(), on);
  check_int32(op, "recv_counts", plan.recv_counts);
  if (plan.expert_major) {
    check_tensor(op, "recv_slot", plan.recv_map, {-1}, on);
    check_int32(op, "recv_slot", plan.recv_map);
  } else {
    check_tensor(op, "recv_topk_idx", plan.recv_map, {-1, plan.send_slot.size(1)}, on);
  }
}

// What the low-latency operators carry.
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

// What dispatch copies unseen: numbers, or bytes that hold some of four bits.
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
