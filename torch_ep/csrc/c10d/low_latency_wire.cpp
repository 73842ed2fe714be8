#include "c10d/low_latency_wire.h"

#include "core/host_copy.h"
#include "local/permute.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

namespace ep {
namespace {

// Largest number of float8_e4m3fn.
constexpr double kMaxFp8 = 448;
// Smallest maximum of a group: zeros too have a scale above zero.
constexpr double kMinAmax = 1e-4;
// Rows of an expert are padded to a multiple of this in the layout of scales.
constexpr int64_t kScaleRows = 4;

// Each index as often as its count says; `total`: the sum of the counts.
at::Tensor index_by_count(const at::Tensor& counts, int64_t total) {
  return at::repeat_interleave(counts, std::optional<int64_t>(total));
}

}  // namespace

Quantised quantized(const at::Tensor& x, Quantize quantize) {
  if (quantize == Quantize::none) {
    return {x, std::nullopt};
  }
  const int64_t num_tokens = x.size(0), hidden = x.size(1), groups = ceil_div(hidden, kGroup);
  const auto wide =
      at::constant_pad_nd(x.to(at::kFloat), {0, groups * kGroup - hidden}).view({num_tokens, groups, kGroup});
  const auto amax = wide.abs().amax(2).clamp_min(kMinAmax);
  // A tensor, since a division by a number may become a product with its reciprocal.
  const auto most = at::full_like(amax, kMaxFp8);
  const auto quotient = amax.div(most);
  at::Tensor scales, factor;
  if (quantize == Quantize::fp8) {
    scales = quotient;
    factor = most.div(amax);
  } else {
    constexpr int64_t mantissa_bits = 23, mantissa = (1 << mantissa_bits) - 1, nan_exponent = 255;
    const auto bits = quotient.view(at::kInt);  // positive
    const auto exponent =
        bits.bitwise_right_shift(mantissa_bits).add(bits.bitwise_and(mantissa).ne(0)).clamp_max(nan_exponent);
    scales = exponent.bitwise_left_shift(mantissa_bits).view(at::kFloat);
    factor = scales.reciprocal();
    if (quantize == Quantize::fp8_ue8m0) {
      scales = at::constant_pad_nd(exponent.to(at::kByte), {0, ceil_div(groups, 4) * 4 - groups}).view(at::kInt);
    }
  }
  const auto rows = wide.mul(factor.unsqueeze(2)).clamp(-kMaxFp8, kMaxFp8).to(at::kFloat8_e4m3fn);
  return {rows.view({num_tokens, groups * kGroup}).narrow(1, 0, hidden).contiguous(), scales};
}

void check_records(const char* op, const Arrived& arrived, const Record& record, const Sizes& sizes) {
  const auto host = record.topk(arrived.records).cpu();  // one wait
  const auto* number = host.const_data_ptr<int32_t>();
  const auto check_range = [op](const char* name, int64_t value, int64_t low, int64_t high) {
    TORCH_CHECK_VALUE(
        value >= low && value < high, op, ": expected ", name, " of in_flight in [", low, ", ", high, "), got ", value);
  };
  for (const int64_t count : arrived.counts) {
    int64_t last_token = -1;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t token = *number++;
      check_range("tokens", token, 0, sizes.max_tokens_per_rank);
      TORCH_CHECK_VALUE(
          token > last_token,
          op,
          ": expected tokens of in_flight that grow from row to row of a source rank, got ",
          token,
          " after ",
          last_token);
      last_token = token;
      const auto* experts = std::exchange(number, number + sizes.num_topk);
      for (int64_t slot = 0; slot < sizes.num_topk; ++slot) {
        check_range("experts", experts[slot], -1, sizes.num_local_experts());
        TORCH_CHECK_VALUE(
            experts[slot] == -1 || std::find(experts, experts + slot, experts[slot]) == experts + slot,
            op,
            ": expected different experts in one row of in_flight, got expert ",
            experts[slot],
            " twice");
      }
    }
  }
}

LowLatencyRows place(const Arrived& arrived, const Record& record, const Sizes& sizes) {
  const auto& records = arrived.records;
  const int64_t num_topk = sizes.num_topk, num_experts = sizes.num_local_experts(), room = sizes.room();
  const auto numbers = record.topk(records);
  const auto placement = local_kernels(records).place(
      numbers.narrow(1, 1, num_topk).contiguous(),
      arrived.counts,
      {.expert_major = true, .num_local_experts = num_experts, .alignment = 1, .index_dtype = at::kInt});

  // For each row that an expert gets, in the order of the experts: whose it is, and where it goes.
  const auto ints = numbers.options(), longs = ints.dtype(at::kLong);
  const auto from = placement.recv_map.to(at::kLong);  // record * num_topk + slot
  const auto from_record = from.div(num_topk, "floor");
  const auto counts = placement.tokens_per_expert.to(at::kLong);
  const auto expert = index_by_count(counts, from.size(0));
  const auto begin = placement.offsets.to(at::kLong) - counts;
  const auto row = at::arange(from.size(0), longs) - begin.index_select(0, expert) + expert * room;
  const auto source = index_by_count(to_device(arrived.counts, records), records.size(0));
  const auto home = source * sizes.max_tokens_per_rank + numbers.select(1, 0);
  const auto pair = home.index_select(0, from_record) * num_topk + from.remainder(num_topk);

  const auto recv_pair = at::full({num_experts * room}, -1, ints).index_copy_(0, row, pair.to(at::kInt));
  const auto recv_row = at::full({room * num_topk}, -1, ints).index_copy_(0, pair, row.to(at::kInt));
  const auto weights = record.part(records, record.weights_at, record.weight_bytes, at::kFloat).view(-1);
  const auto row_weights =
      at::zeros({num_experts * room}, weights.options()).index_copy_(0, row, weights.index_select(0, from));
  const auto visits = expert * sizes.world_size + source.index_select(0, from_record);
  const auto source_offsets =
      visits.bincount({}, num_experts * sizes.world_size).view({num_experts, sizes.world_size}).cumsum(1).to(at::kInt);
  const auto spread = [&](const at::Tensor& values) {  // [records, n] to [num_experts, room, n]
    return at::zeros({num_experts * room, values.size(1)}, values.options())
        .index_copy_(0, row, values.index_select(0, from_record))
        .view({num_experts, room, values.size(1)});
  };
  const auto rows = spread(record.part(records, 0, record.row_bytes, at::kByte)).view(record.row_type);
  std::optional<at::Tensor> scales;
  if (record.row_type == at::kFloat8_e4m3fn) {
    const auto values = spread(record.part(records, record.scales_at, 4 * record.scales, record.scale_type));
    const int64_t padded = ceil_div(room, kScaleRows) * kScaleRows;
    scales = at::zeros({num_experts, record.scales, padded}, values.options()).transpose(1, 2).narrow(1, 0, room);
    scales->copy_(values);
  }
  return {
      rows,
      scales,
      placement.tokens_per_expert,
      source_offsets,
      recv_pair.view({num_experts, room}),
      recv_row.view({room, num_topk}),
      row_weights.view({num_experts, room}),
      to_device(arrived.wait_ns, records)};
}

}  // namespace ep
