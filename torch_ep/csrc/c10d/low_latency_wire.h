// Rows of the low-latency pair on every backend but nvlink: as they travel, and as they arrive.
#pragma once

#include "core/backend.h"

#include <optional>
#include <vector>

namespace ep {

inline int64_t ceil_div(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// The numbers that all ranks share.
struct Sizes {
  int64_t num_experts, num_topk, max_tokens_per_rank, world_size;

  int64_t num_local_experts() const { return num_experts / world_size; }
  int64_t room() const { return world_size * max_tokens_per_rank; }  // rows of an expert
};

// Channels that share a scale.
constexpr int64_t kGroup = 128;

// What one rank sends of one token to another, as bytes: its row, its scales, int32 [1 + num_topk] (the token, then its
// experts, counted on the destination rank, or -1) and float32 [num_topk] weights.
struct Record {
  Record(int64_t hidden, at::ScalarType dtype, Quantize quantize, int64_t num_topk)
      : row_type(quantize == Quantize::none ? dtype : at::kFloat8_e4m3fn),
        row_bytes(hidden * static_cast<int64_t>(c10::elementSize(row_type))),
        scale_type(quantize == Quantize::fp8_ue8m0 ? at::kInt : at::kFloat) {
    const int64_t groups = ceil_div(hidden, kGroup);
    scales = quantize == Quantize::none ? 0 : quantize == Quantize::fp8_ue8m0 ? ceil_div(groups, 4) : groups;
    scales_at = aligned(row_bytes);
    topk_at = aligned(scales_at + 4 * scales);
    topk_bytes = 4 * (1 + num_topk);
    weights_at = aligned(topk_at + topk_bytes);
    weight_bytes = 4 * num_topk;
    bytes = aligned(weights_at + weight_bytes);
  }

  // That part of all records.
  static at::Tensor part(const at::Tensor& records, int64_t at, int64_t bytes, at::ScalarType type) {
    return records.narrow(1, at, bytes).contiguous().view(type);
  }
  at::Tensor topk(const at::Tensor& records) const { return part(records, topk_at, topk_bytes, at::kInt); }

  // Parts begin at multiples of 16 bytes.
  static int64_t aligned(int64_t n) { return ceil_div(n, 16) * 16; }

  at::ScalarType row_type;
  int64_t row_bytes;
  at::ScalarType scale_type;
  int64_t scales;  // numbers of scale_type
  int64_t scales_at, topk_at, topk_bytes, weights_at, weight_bytes, bytes;
};

// What came by an exchange, in the order of the source ranks.
struct Arrived {
  at::Tensor records;  // uint8 [rows, bytes]
  std::vector<int64_t> counts, wait_ns;
};

struct Quantised {
  at::Tensor rows;                   // [num_tokens, hidden]
  std::optional<at::Tensor> scales;  // [num_tokens, Record::scales]
};

// By the formulas in the docstring of torch_ep.low_latency_dispatch.
Quantised quantized(const at::Tensor& x, Quantize quantize);

// Throws ValueError unless `place` can take the records: each names a token of its source, more than the one before it
// does, and different experts.
void check_records(const char* op, const Arrived& arrived, const Record& record, const Sizes& sizes);

// Rows in the places of their experts, and the plan of that.
LowLatencyRows place(const Arrived& arrived, const Record& record, const Sizes& sizes);

}  // namespace ep
