#include "nvlink/low_latency.h"

#include "core/checks.h"
#include "core/cuda_tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAException.h>

namespace ep::nvlink {
namespace {

constexpr auto kDispatch = OpKind::low_latency_dispatch;
constexpr auto kCombine = OpKind::low_latency_combine;

// Rows at an address that is a multiple of 16, as the kernels require.
at::Tensor aligned(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kVector == 0 ? t : t.clone();
}

void set_tokens(
    LowLatencyDispatchArgs& args,
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights) {
  args.x = data<char>(x);
  args.topk_idx = topk_idx.const_data_ptr();
  args.wide_idx = topk_idx.scalar_type() == at::kLong;
  args.topk_weights = topk_weights ? data<float>(*topk_weights) : nullptr;
  args.num_tokens = x.size(0) <= args.max_tokens ? static_cast<int>(x.size(0)) : 0;
}

void check_tokens(OpKind op, int64_t num_tokens, int64_t max_tokens) {
  TORCH_CHECK_VALUE(
      num_tokens <= max_tokens,
      name_of(op),
      ": expected at most max_tokens_per_rank = ",
      max_tokens,
      " tokens, got ",
      num_tokens);
}

}  // namespace

LowLatencyRows LowLatencyPair::dispatch(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    const LowLatencyOptions& options,
    cudaStream_t stream) const {
  auto args = args_of(options, Part::both);
  const auto rows = aligned(x);
  set_tokens(args, rows, topk_idx, topk_weights);
  auto result = make_results(args, options, x.options());
  C10_CUDA_CHECK(launch_low_latency_dispatch(args, multiprocessors_, stream));
  // After an exchange without tokens, so that no peer waits until its timeout.
  check_tokens(kDispatch, x.size(0), options.max_tokens_per_rank);
  return result;
}

at::Tensor LowLatencyPair::dispatch_send(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    const LowLatencyOptions& options,
    cudaStream_t stream) const {
  if (x.size(0) > options.max_tokens_per_rank) {
    dispatch(x, topk_idx, topk_weights, options, stream);  // throws; nothing stays in flight
  }
  auto args = args_of(options, Part::send);
  const auto rows = aligned(x);
  set_tokens(args, rows, topk_idx, topk_weights);
  const auto status = make_status(x);
  args.status = mutable_data<int64_t>(status);
  C10_CUDA_CHECK(launch_low_latency_dispatch(args, multiprocessors_, stream));
  return status;
}

LowLatencyRows
LowLatencyPair::dispatch_recv(const at::Tensor& status, const LowLatencyOptions& options, cudaStream_t stream) const {
  auto args = args_of(options, Part::receive);
  args.status = const_cast<int64_t*>(data<int64_t>(status));
  auto result = make_results(args, options, status.options());
  C10_CUDA_CHECK(launch_low_latency_dispatch(args, multiprocessors_, stream));
  return result;
}

std::tuple<at::Tensor, at::Tensor> LowLatencyPair::combine(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    cudaStream_t stream) const {
  auto args = args_of(y.size(2), y.scalar_type(), topk_idx, num_experts, Part::both);
  const auto rows = aligned(y);
  set_results(args, rows, row_weights, recv_row);
  const auto result = make_sums(args, y.size(2), y.options());
  C10_CUDA_CHECK(launch_low_latency_combine(args, multiprocessors_, stream));
  return result;
}

at::Tensor LowLatencyPair::combine_send(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    cudaStream_t stream) const {
  auto args = args_of(y.size(2), y.scalar_type(), topk_idx, num_experts, Part::send);
  const auto rows = aligned(y);
  set_results(args, rows, row_weights, recv_row);
  const auto status = make_status(y);
  args.status = mutable_data<int64_t>(status);
  C10_CUDA_CHECK(launch_low_latency_combine(args, multiprocessors_, stream));
  return status;
}

std::tuple<at::Tensor, at::Tensor> LowLatencyPair::combine_recv(
    const at::Tensor& status,
    const at::Tensor& topk_idx,
    int64_t hidden,
    at::ScalarType dtype,
    int64_t num_experts,
    cudaStream_t stream) const {
  auto args = args_of(hidden, dtype, topk_idx, num_experts, Part::receive);
  args.status = const_cast<int64_t*>(data<int64_t>(status));
  const auto result = make_sums(args, hidden, status.options().dtype(dtype));
  C10_CUDA_CHECK(launch_low_latency_combine(args, multiprocessors_, stream));
  return result;
}

at::Tensor LowLatencyPair::make_status(const at::Tensor& like) const {
  return at::empty({2, layout_.world_size}, like.options().dtype(at::kLong));
}

void LowLatencyPair::check_row(OpKind op, int64_t num_topk, int64_t num_experts, int64_t hidden, int64_t row_bytes)
    const {
  TORCH_CHECK(
      layout_.max_tokens > 0,
      name_of(op),
      ": expected low_latency_tokens of torch_ep.init to be given, on backend nvlink, got None");
  check_limit(name_of(op), "num_topk", limits_.num_topk, num_topk);
  check_limit(name_of(op), "num_experts", limits_.num_experts, num_experts);
  check_limit(name_of(op), "hidden", limits_.hidden, hidden);
  TORCH_CHECK_VALUE(
      row_bytes % kVector == 0,
      name_of(op),
      ": expected rows of a multiple of ",
      kVector,
      " bytes on backend nvlink, got ",
      row_bytes);
}

void LowLatencyPair::check_wire_row(OpKind op, int64_t bytes) const {
  TORCH_CHECK_VALUE(
      bytes <= max_wire_row_bytes(),
      name_of(op),
      ": expected rows of at most ",
      max_wire_row_bytes(),
      " bytes with what travels along on backend nvlink, got ",
      bytes);
  TORCH_CHECK_VALUE(
      bytes <= layout_.wire_row_bytes,
      name_of(op),
      ": expected rows of at most ",
      layout_.wire_row_bytes,
      " bytes with what travels along, got ",
      bytes,
      ": torch_ep.init makes rows_per_expert for rows of hidden = ",
      limits_.hidden,
      " elements of two bytes; give it a larger hidden for wider ones");
}

LowLatencyDispatchArgs LowLatencyPair::args_of(const LowLatencyOptions& options, Part part) const {
  LowLatencyDispatchArgs args{};
  args.comm = comm_;
  args.part = part;
  args.element = element_of(options.dtype);
  args.quantize = options.quantize;
  args.max_tokens = static_cast<int>(options.max_tokens_per_rank);
  args.num_topk = static_cast<int>(options.num_topk);
  args.num_experts = static_cast<int>(options.num_experts);
  args.hidden = static_cast<int>(options.hidden);
  args.handshake.num_experts = args.num_experts;
  args.handshake.num_topk = args.num_topk;
  args.handshake.hidden = args.hidden;
  args.handshake.dtype = static_cast<int32_t>(options.dtype);
  args.handshake.max_tokens = args.max_tokens;
  args.handshake.quantize = static_cast<int32_t>(options.quantize);
  const auto groups = static_cast<int>(ceil_div(options.hidden, kScaleGroup));
  if (options.quantize == Quantize::none) {
    args.row_bytes = args.hidden * static_cast<int>(c10::elementSize(options.dtype));
  } else {
    args.row_bytes = args.hidden;
    args.num_scales = options.quantize == Quantize::fp8_ue8m0 ? static_cast<int>(ceil_div(groups, 4)) : groups;
  }
  check_row(kDispatch, options.num_topk, options.num_experts, options.hidden, args.row_bytes);
  check_limit(name_of(kDispatch), "low_latency_tokens", layout_.max_tokens, options.max_tokens_per_rank);
  check_wire_row(kDispatch, args.wire_row_bytes());
  return args;
}

LowLatencyRows LowLatencyPair::make_results(
    LowLatencyDispatchArgs& args,
    const LowLatencyOptions& options,
    const at::TensorOptions& on) const {
  const int64_t world_size = layout_.world_size, num_local = options.num_experts / world_size;
  const int64_t rows_per_expert = world_size * options.max_tokens_per_rank;
  const bool quantized = options.quantize != Quantize::none;
  const auto ints = on.dtype(at::kInt);
  const auto rows =
      at::empty({num_local, rows_per_expert, options.hidden}, on.dtype(quantized ? at::kFloat8_e4m3fn : options.dtype));
  std::optional<at::Tensor> scales;
  if (quantized) {
    args.scale_rows = round_up(rows_per_expert, 4);
    scales = at::empty_strided(
        {num_local, rows_per_expert, args.num_scales},
        {args.num_scales * args.scale_rows, 1, args.scale_rows},
        on.dtype(options.quantize == Quantize::fp8_ue8m0 ? at::kInt : at::kFloat));
    args.scales = scales->mutable_data_ptr();
  }
  const auto tokens_per_expert = at::empty({num_local}, ints);
  const auto source_offsets = at::empty({num_local, world_size}, ints);
  // A rank that is masked in the middle of an exchange leaves holes in it.
  const auto recv_pair =
      comm_.masks ? at::full({num_local, rows_per_expert}, -1, ints) : at::empty({num_local, rows_per_expert}, ints);
  const auto recv_row = at::empty({rows_per_expert, options.num_topk}, ints);
  const auto row_weights = at::empty({num_local, rows_per_expert}, on.dtype(at::kFloat));
  const auto wait_ns = at::empty({world_size}, on.dtype(at::kLong));
  args.rows = static_cast<char*>(rows.mutable_data_ptr());
  args.tokens_per_expert = mutable_data<int32_t>(tokens_per_expert);
  args.source_offsets = mutable_data<int32_t>(source_offsets);
  args.recv_pair = mutable_data<int32_t>(recv_pair);
  args.recv_row = mutable_data<int32_t>(recv_row);
  args.row_weights = mutable_data<float>(row_weights);
  args.wait_ns = mutable_data<int64_t>(wait_ns);
  return {rows, scales, tokens_per_expert, source_offsets, recv_pair, recv_row, row_weights, wait_ns};
}

LowLatencyCombineArgs LowLatencyPair::args_of(
    int64_t hidden,
    at::ScalarType dtype,
    const at::Tensor& topk_idx,
    int64_t num_experts,
    Part part) const {
  LowLatencyCombineArgs args{};
  args.comm = comm_;
  args.part = part;
  args.topk_idx = topk_idx.const_data_ptr();
  args.wide_idx = topk_idx.scalar_type() == at::kLong;
  args.num_tokens = static_cast<int>(topk_idx.size(0));
  args.element = element_of(dtype);
  args.num_topk = static_cast<int>(topk_idx.size(1));
  args.num_experts = static_cast<int>(num_experts);
  args.row_bytes = static_cast<int>(hidden * static_cast<int64_t>(c10::elementSize(dtype)));
  args.handshake.hidden = static_cast<int32_t>(hidden);
  args.handshake.dtype = static_cast<int32_t>(dtype);
  check_row(kCombine, args.num_topk, num_experts, hidden, args.row_bytes);
  check_limit(name_of(kCombine), "low_latency_tokens", layout_.max_tokens, args.num_tokens);
  check_wire_row(kCombine, args.row_bytes);
  return args;
}

void LowLatencyPair::set_results(
    LowLatencyCombineArgs& args,
    const at::Tensor& y,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row) const {
  args.y = static_cast<const char*>(y.const_data_ptr());
  args.row_weights = data<float>(row_weights);
  args.recv_row = data<int32_t>(recv_row);
  args.max_tokens = static_cast<int>(recv_row.size(0) / layout_.world_size);
  check_limit(name_of(kCombine), "low_latency_tokens", layout_.max_tokens, args.max_tokens);
  check_tokens(kCombine, args.num_tokens, args.max_tokens);
}

std::tuple<at::Tensor, at::Tensor>
LowLatencyPair::make_sums(LowLatencyCombineArgs& args, int64_t hidden, const at::TensorOptions& on) const {
  const auto out = at::empty({args.num_tokens, hidden}, on);
  const auto wait_ns = at::empty({layout_.world_size}, on.dtype(at::kLong));
  args.out = static_cast<char*>(out.mutable_data_ptr());
  args.wait_ns = mutable_data<int64_t>(wait_ns);
  return {out, wait_ns};
}

}  // namespace ep::nvlink
