// The wire row of the low-latency pair on composed backends (local/composed_backend.h).
#pragma once

#include "core/integer_math.h"
#include "core/types.h"

namespace ep {

// Byte layout of one wire row: the row, its scales, int32 [1 + num_topk] (the token, then its local experts on the
// destination rank, -1 for none) and float32 [num_topk] weights. Each part begins at a multiple of 16 bytes.
struct LowLatencyWireRow {
  explicit LowLatencyWireRow(const LowLatencyOptions& options)
      : row_type(options.quantize == Quantize::none ? options.dtype : at::kFloat8_e4m3fn),
        row_bytes(options.hidden * static_cast<int64_t>(c10::elementSize(row_type))),
        scale_type(options.quantize == Quantize::fp8_ue8m0 ? at::kInt : at::kFloat) {
    const int64_t groups = ceil_div(options.hidden, kScaleGroup);
    num_scales = options.quantize == Quantize::none        ? 0
                 : options.quantize == Quantize::fp8_ue8m0 ? ceil_div(groups, 4)
                                                           : groups;
    scales_at = round_up(row_bytes, kAlignment);
    topk_at = round_up(scales_at + 4 * num_scales, kAlignment);
    topk_bytes = 4 * (1 + options.num_topk);
    weights_at = round_up(topk_at + topk_bytes, kAlignment);
    weight_bytes = 4 * options.num_topk;
    bytes = round_up(weights_at + weight_bytes, kAlignment);
  }

  // One part of all wire rows.
  static at::Tensor part(const at::Tensor& wire, int64_t at, int64_t bytes, at::ScalarType type) {
    return wire.narrow(1, at, bytes).contiguous().view(type);
  }
  at::Tensor topk(const at::Tensor& wire) const { return part(wire, topk_at, topk_bytes, at::kInt); }

  static constexpr int64_t kAlignment = 16;

  at::ScalarType row_type;
  int64_t row_bytes;
  at::ScalarType scale_type;
  int64_t num_scales;  // of scale_type, per token
  int64_t scales_at, topk_at, topk_bytes, weights_at, weight_bytes, bytes;
};

}  // namespace ep
