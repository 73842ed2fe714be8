// The operators' functions; shapes and meanings are those of torch_ep/ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace ep {

// send_row, send_counts, recv_counts, recv_map, offsets, tokens_per_expert, num_dropped
using PlanResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// rows, topk_weights, scales
using Payloads = std::tuple<at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>>;

// rows, scales, tokens_per_expert, source_offsets, recv_pair, recv_row, row_weights, wait_ns
using LowLatencyRows = std::tuple<
    at::Tensor,
    std::optional<at::Tensor>,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor>;
// ticket, in_flight
using InFlight = std::tuple<at::Tensor, at::Tensor>;

PlanResult plan(
    const at::Tensor& topk_idx,
    int64_t num_experts,
    c10::string_view layout,
    int64_t alignment,
    int64_t world_size,
    c10::string_view group_name,
    std::optional<int64_t> max_tokens_per_rank,
    const std::optional<at::Tensor>& after);

PlanResult plan_capacity(
    const at::Tensor& topk_idx,
    int64_t num_experts,
    c10::string_view layout,
    int64_t alignment,
    int64_t capacity,
    int64_t world_size,
    c10::string_view group_name,
    std::optional<int64_t> max_tokens_per_rank,
    const std::optional<at::Tensor>& after);

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
    const std::optional<at::Tensor>& after);

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
    const std::optional<at::Tensor>& after);

at::Tensor combine_weighted(
    const at::Tensor& y,
    const at::Tensor& row_weights,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    const std::optional<at::Tensor>& after);

LowLatencyRows low_latency_dispatch(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& after);

InFlight low_latency_dispatch_send(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size,
    c10::string_view group_name,
    int64_t in_flight_rows,
    const std::optional<at::Tensor>& after);

LowLatencyRows low_latency_dispatch_recv(
    const at::Tensor& ticket,
    const at::Tensor& in_flight,
    int64_t hidden,
    at::ScalarType dtype,
    int64_t num_topk,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size,
    c10::string_view group_name);

std::tuple<at::Tensor, at::Tensor> low_latency_combine(  // out, wait_ns
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& after);

InFlight low_latency_combine_send(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name,
    int64_t in_flight_rows,
    const std::optional<at::Tensor>& after);

std::tuple<at::Tensor, at::Tensor> low_latency_combine_recv(  // out, wait_ns
    const at::Tensor& ticket,
    const at::Tensor& in_flight,
    const at::Tensor& topk_idx,
    int64_t hidden,
    at::ScalarType dtype,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name);

at::Tensor zero_after(const at::Tensor& dep);

at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets);
at::Tensor grouped_mm_transpose(const at::Tensor& a, const at::Tensor& g, const at::Tensor& offsets);

}  // namespace ep
