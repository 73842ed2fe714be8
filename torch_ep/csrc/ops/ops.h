// The operators' functions; torch_ep/ops.py documents shapes and meanings.
#pragma once

#include "core/types.h"

namespace ep {

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

// The halves: see Note [In flight] in core/in_flight.h.
at::Tensor dispatch_send(
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

Payloads dispatch_recv(
    const at::Tensor& ticket,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    int64_t hidden,
    at::ScalarType dtype,
    std::optional<at::ScalarType> weights_dtype,
    std::optional<int64_t> scales_columns,
    std::optional<at::ScalarType> scales_dtype,
    const std::optional<at::Tensor>& after);

at::Tensor combine_send(
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

at::Tensor combine_send_weighted(
    const at::Tensor& y,
    const at::Tensor& row_weights,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    const std::optional<at::Tensor>& after);

Payloads combine_recv(
    const at::Tensor& ticket,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view group_name,
    int64_t hidden,
    at::ScalarType dtype,
    std::optional<at::ScalarType> weights_dtype,
    std::optional<int64_t> scales_columns,
    std::optional<at::ScalarType> scales_dtype,
    const std::optional<at::Tensor>& after);

Payloads dispatch_grid(
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& rail_send_row,
    const at::Tensor& rail_send_counts,
    const at::Tensor& rail_recv_counts,
    const at::Tensor& rail_recv_map,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view rail_name,
    c10::string_view group_name,
    const std::optional<at::Tensor>& after);

Payloads combine_grid(
    const at::Tensor& y,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales,
    const at::Tensor& rail_send_row,
    const at::Tensor& rail_send_counts,
    const at::Tensor& rail_recv_counts,
    const at::Tensor& rail_recv_map,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view rail_name,
    c10::string_view group_name,
    const std::optional<at::Tensor>& after);

at::Tensor combine_grid_weighted(
    const at::Tensor& y,
    const at::Tensor& row_weights,
    const at::Tensor& rail_send_row,
    const at::Tensor& rail_send_counts,
    const at::Tensor& rail_recv_counts,
    const at::Tensor& rail_recv_map,
    const at::Tensor& send_row,
    const at::Tensor& send_counts,
    const at::Tensor& recv_counts,
    const at::Tensor& recv_map,
    c10::string_view layout,
    c10::string_view rail_name,
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
    const std::optional<at::Tensor>& after);

LowLatencyRows low_latency_dispatch_recv(
    const at::Tensor& status,
    const at::Tensor& in_flight,
    int64_t hidden,
    at::ScalarType dtype,
    int64_t num_topk,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& after);

LowLatencySums low_latency_combine(
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
    const std::optional<at::Tensor>& after);

LowLatencySums low_latency_combine_recv(
    const at::Tensor& status,
    const at::Tensor& in_flight,
    const at::Tensor& topk_idx,
    int64_t hidden,
    at::ScalarType dtype,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& after);

at::Tensor zero_after(const at::Tensor& dep);

at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets);
at::Tensor grouped_mm_transpose(const at::Tensor& a, const at::Tensor& g, const at::Tensor& offsets);

}  // namespace ep
