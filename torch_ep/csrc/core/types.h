// Types that operators and backends share. Shapes and meanings: torch_ep/ops.py and low_latency.py.
//
// W: ranks; T: tokens of this rank; K: experts per token; L: experts per rank; R: rows that dispatch returns.
#pragma once

#include "core/op_kind.h"
#include "core/quantization.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace ep {

const char* name_of(OpKind op);
// Throws if no operator has that name.
OpKind kind_of(const std::string& name);

// `error.what()` without the C++ backtrace of a c10::Error.
std::string message_of(const std::exception& error);

struct PlanOptions {
  int64_t num_experts;
  bool expert_major;
  int64_t alignment;
  std::optional<int64_t> capacity;
  std::optional<int64_t> max_tokens_per_rank;
};

// The tensors of a plan that dispatch and combine use.
struct PlanTensors {
  const at::Tensor& send_row;
  const at::Tensor& send_counts;
  const at::Tensor& recv_counts;
  const at::Tensor& recv_map;  // expert_major: recv_pair; rank_major: recv_topk_idx
  bool expert_major;

  int64_t world_size() const { return send_counts.size(0); }
  int64_t num_topk() const { return send_row.size(1); }
};

// send_row, send_counts, recv_counts, recv_map, offsets, tokens_per_expert, num_dropped
using PlanResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// rows, topk_weights, scales
using Payloads = std::tuple<at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>>;

// Options of a low-latency dispatch. They are equal on all ranks.
struct LowLatencyOptions {
  Quantize quantize;
  int64_t num_experts, num_topk, max_tokens_per_rank, hidden;
  at::ScalarType dtype;
};

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
// sums, wait_ns
using LowLatencySums = std::tuple<at::Tensor, at::Tensor>;
// status, in_flight
using InFlight = std::tuple<at::Tensor, at::Tensor>;

}  // namespace ep
