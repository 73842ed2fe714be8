// The low-latency pair of a composed backend: for decoding, with no plan before it.
//   dispatch   quantize, pack one wire row per (token, rank) -> exchange | sort rows by expert
//   combine    reduce rows per token                         -> exchange | sum
// The _send half ends at the bar; the _recv half begins there.
#include "core/integer_math.h"
#include "core/integer_tensors.h"
#include "core/low_latency_wire_row.h"
#include "local/composed_backend.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

namespace ep {
namespace {

constexpr auto kDispatch = OpKind::low_latency_dispatch;
constexpr auto kCombine = OpKind::low_latency_combine;

// Rows of an expert are padded to a multiple of this in the layout of scales.
constexpr int64_t kScaleRows = 4;

// Repeats each index counts[index] times. `total`: the sum of the counts.
at::Tensor index_by_count(const at::Tensor& counts, int64_t total) {
  return at::repeat_interleave(counts, std::optional<int64_t>(total));
}

struct Quantized {
  at::Tensor rows;                   // [num_tokens, hidden]
  std::optional<at::Tensor> scales;  // [num_tokens, num_scales]
};

// By the formulas in the docstring of torch_ep.low_latency_dispatch.
Quantized quantize_rows(const at::Tensor& x, Quantize quantize) {
  if (quantize == Quantize::none) {
    return {x, std::nullopt};
  }
  const int64_t num_tokens = x.size(0), hidden = x.size(1), groups = ceil_div(hidden, kScaleGroup);
  const auto wide =
      at::constant_pad_nd(x.to(at::kFloat), {0, groups * kScaleGroup - hidden}).view({num_tokens, groups, kScaleGroup});
  const auto amax = wide.abs().amax(2).clamp_min(kMinAmax);
  // A tensor, since division by a scalar may become multiplication by its reciprocal.
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
      scales = at::constant_pad_nd(exponent.to(at::kByte), {0, round_up(groups, 4) - groups}).view(at::kInt);
    }
  }
  const auto rows = wide.mul(factor.unsqueeze(2)).clamp(-kMaxFp8, kMaxFp8).to(at::kFloat8_e4m3fn);
  return {rows.view({num_tokens, groups * kScaleGroup}).narrow(1, 0, hidden).contiguous(), scales};
}

// Throws ValueError unless `to_expert_rows` can take the wire rows: each names a token of its source, in ascending
// order, and different experts.
void check_wire(
    const char* op,
    const LowLatencyArrival& arrived,
    const LowLatencyWireRow& format,
    const LowLatencyOptions& options) {
  const auto host = format.topk(arrived.wire).cpu();  // waits for the device once
  const int64_t num_local_experts = options.num_experts / static_cast<int64_t>(arrived.counts.size());
  const auto* number = host.const_data_ptr<int32_t>();
  const auto check_range = [op](const char* name, int64_t value, int64_t low, int64_t high) {
    TORCH_CHECK_VALUE(
        value >= low && value < high, op, ": expected ", name, " of in_flight in [", low, ", ", high, "), got ", value);
  };
  for (const int64_t count : arrived.counts) {
    int64_t last_token = -1;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t token = *number++;
      check_range("tokens", token, 0, options.max_tokens_per_rank);
      TORCH_CHECK_VALUE(
          token > last_token,
          op,
          ": expected tokens of in_flight that grow from row to row of a source rank, got ",
          token,
          " after ",
          last_token);
      last_token = token;
      const auto* experts = std::exchange(number, number + options.num_topk);
      for (int64_t slot = 0; slot < options.num_topk; ++slot) {
        check_range("experts", experts[slot], -1, num_local_experts);
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

// Rows sorted by expert, and the plan by which combine returns them.
LowLatencyRows
to_expert_rows(const LowLatencyArrival& arrived, const LowLatencyWireRow& format, const LowLatencyOptions& options) {
  const auto& wire = arrived.wire;
  const auto world_size = static_cast<int64_t>(arrived.counts.size());
  const int64_t num_topk = options.num_topk, num_experts = options.num_experts / world_size;
  const int64_t rows_per_expert = world_size * options.max_tokens_per_rank;
  const auto numbers = format.topk(wire);
  const auto recv_plan = permute_kernels(wire).plan_recv(
      numbers.narrow(1, 1, num_topk).contiguous(),
      arrived.counts,
      {.expert_major = true, .num_local_experts = num_experts, .alignment = 1, .index_dtype = at::kInt});

  // For each row of an expert, in the order of the experts: its source and its row of the result.
  const auto ints = numbers.options(), longs = ints.dtype(at::kLong);
  const auto from = recv_plan.recv_map.to(at::kLong);  // wire row * num_topk + slot
  const auto from_wire = from.div(num_topk, "floor");
  const auto counts = recv_plan.tokens_per_expert.to(at::kLong);
  const auto expert = index_by_count(counts, from.size(0));
  const auto begin = recv_plan.offsets.to(at::kLong) - counts;
  const auto row = at::arange(from.size(0), longs) - begin.index_select(0, expert) + expert * rows_per_expert;
  const auto source = index_by_count(to_device(arrived.counts, wire), wire.size(0));
  const auto source_token = source * options.max_tokens_per_rank + numbers.select(1, 0);
  const auto pair = source_token.index_select(0, from_wire) * num_topk + from.remainder(num_topk);

  const auto recv_pair = at::full({num_experts * rows_per_expert}, -1, ints).index_copy_(0, row, pair.to(at::kInt));
  const auto recv_row = at::full({rows_per_expert * num_topk}, -1, ints).index_copy_(0, pair, row.to(at::kInt));
  const auto weights = format.part(wire, format.weights_at, format.weight_bytes, at::kFloat).view(-1);
  const auto row_weights =
      at::zeros({num_experts * rows_per_expert}, weights.options()).index_copy_(0, row, weights.index_select(0, from));
  const auto expert_and_source = expert * world_size + source.index_select(0, from_wire);
  const auto source_offsets =
      expert_and_source.bincount({}, num_experts * world_size).view({num_experts, world_size}).cumsum(1).to(at::kInt);
  const auto spread = [&](const at::Tensor& values) {  // [wire, n] to [num_experts, rows_per_expert, n]
    return at::zeros({num_experts * rows_per_expert, values.size(1)}, values.options())
        .index_copy_(0, row, values.index_select(0, from_wire))
        .view({num_experts, rows_per_expert, values.size(1)});
  };
  const auto rows = spread(format.part(wire, 0, format.row_bytes, at::kByte)).view(format.row_type);
  std::optional<at::Tensor> scales;
  if (format.row_type == at::kFloat8_e4m3fn) {
    const auto values = spread(format.part(wire, format.scales_at, 4 * format.num_scales, format.scale_type));
    const int64_t padded = round_up(rows_per_expert, kScaleRows);
    scales = at::zeros({num_experts, format.num_scales, padded}, values.options())
                 .transpose(1, 2)
                 .narrow(1, 0, rows_per_expert);
    scales->copy_(values);
  }
  return {
      rows,
      scales,
      recv_plan.tokens_per_expert,
      source_offsets,
      recv_pair.view({num_experts, rows_per_expert}),
      recv_row.view({rows_per_expert, num_topk}),
      row_weights.view({num_experts, rows_per_expert}),
      to_device(arrived.wait_ns, wire)};
}

at::Tensor pack(
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const LowLatencyOptions& options,
    const SendPlan& plan) {
  const auto& kernels = permute_kernels(x);
  const LowLatencyWireRow format(options);
  const int64_t wire_rows = plan.wire_topk.size(0);
  auto wire = at::zeros({wire_rows, format.bytes}, x.options().dtype(at::kByte));
  const auto allocate = [](at::IntArrayRef sizes, const at::TensorOptions& on) { return at::empty(sizes, on); };
  const auto pack_rows = [&](const at::Tensor& t) { return kernels.pack_rows(t, plan.send_row, wire_rows, allocate); };
  const auto put = [&](int64_t at, const at::Tensor& part) {
    const auto bytes = part.view(at::kByte);
    wire.narrow(1, at, bytes.size(1)).copy_(bytes);
  };
  const auto [rows, scales] = quantize_rows(x, options.quantize);
  put(0, pack_rows(rows.view(at::kByte)));
  if (scales) {
    put(format.scales_at, pack_rows(*scales));
  }
  const auto token = at::arange(x.size(0), plan.send_row.options()).unsqueeze(1);
  put(format.topk_at, at::cat({pack_rows(token), plan.wire_topk}, 1));
  const auto weights = topk_weights.value_or(at::ones({x.size(0), options.num_topk}, x.options().dtype(at::kFloat)));
  put(format.weights_at, kernels.pack_slots(weights, plan.send_row, wire_rows));
  return wire;
}

// The result of `_send`. Its size does not depend on the number of wire rows: it holds up to `rows` of them.
InFlight in_flight_of(const LowLatencyArrival& arrived, int64_t rows) {
  const auto& wire = arrived.wire;
  auto data = at::zeros({rows, wire.size(1)}, wire.options());
  data.narrow(0, 0, wire.size(0)).copy_(wire);
  return {at::stack({to_device(arrived.counts, data), to_device(arrived.wait_ns, data)}), data};
}

// The reverse of in_flight_of.
LowLatencyArrival arrival_of(const char* op, const InFlight& sent) {
  const auto& [status, in_flight] = sent;
  const auto both = to_host(status);
  const auto middle = both.begin() + status.size(1);
  const std::vector<int64_t> counts(both.begin(), middle);
  int64_t rows = 0;
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(
        count >= 0 && count <= in_flight.size(0) - rows,
        op,
        ": expected status and in_flight of one send, got ",
        at::IntArrayRef(counts),
        " rows by the status and ",
        in_flight.size(0),
        " in flight");
    rows += count;
  }
  return {in_flight.narrow(0, 0, rows), counts, {middle, both.end()}};
}

// Throws unless each entry is -1 or a row of y: the kernels do not check recv_row.
void check_recv_row(const at::Tensor& recv_row, int64_t rows) {
  const auto ends = to_host(ends_of(recv_row));
  const int64_t bad = ends[0] < -1 ? ends[0] : ends[1];
  TORCH_CHECK_VALUE(bad >= -1 && bad < rows, name_of(kCombine), ": expected recv_row in [-1, ", rows, "), got ", bad);
}

at::Tensor sum_up(const LowLatencyArrival& arrived, const SendPlan& plan, at::ScalarType dtype) {
  return permute_kernels(arrived.wire).sum_rows(arrived.wire.view(dtype), plan.send_row);
}

}  // namespace

// Sizes that all ranks share.
struct ComposedBackend::LowLatencySizes {
  int64_t num_experts, num_topk, max_tokens_per_rank, world_size;

  int64_t num_local_experts() const { return num_experts / world_size; }
  std::vector<Agreed> agreed(int64_t hidden, at::ScalarType dtype) const {
    return {
        {"num_experts", num_experts},
        {"num_topk", num_topk},
        {"max_tokens_per_rank", max_tokens_per_rank},
        {"hidden", hidden},
        {"dtype", static_cast<int64_t>(dtype), true}};
  }
};

// Returned sums, one per (token, rank), and the plan by which the tokens were sent.
struct ComposedBackend::LowLatencyReturn {
  LowLatencyArrival arrived;
  SendPlan plan;
};

// Throws ValueError, in the name of `op`, on too many tokens or a bad index.
SendPlan
ComposedBackend::low_latency_send_plan(const char* op, const at::Tensor& topk_idx, const LowLatencySizes& sizes) const {
  check_num_tokens(op, topk_idx.size(0), sizes.max_tokens_per_rank);
  return permute_kernels(topk_idx).plan_send(op, topk_idx, sizes.num_experts, sizes.world_size);
}

void ComposedBackend::check_low_latency_limits(OpKind op, const LowLatencySizes& sizes, int64_t hidden) const {
  check_limit(op, "hidden", limits_.hidden, hidden);
  check_limit(op, "num_topk", limits_.num_topk, sizes.num_topk);
  check_limit(op, "num_experts", limits_.num_experts, sizes.num_experts);
}

// `pack`: makes the wire rows, uint8 [rows, bytes per wire row]. An error in it is sent to the other ranks.
LowLatencyArrival ComposedBackend::exchange_wire(
    OpKind op,
    const std::vector<int64_t>& send_rows,
    const std::vector<int64_t>& recv_rows,
    const std::vector<Agreed>& agreed,
    const std::function<at::Tensor()>& pack) {
  const auto exchange = begin_exchange(op, send_rows, recv_rows, agreed);
  if (!exchange) {
    return {pack(), send_rows, {0}};
  }
  return exchange->run([&]() -> LowLatencyArrival {
    const at::Tensor sent = pack();
    const auto counts = exchange->confirm();
    auto received = at::empty({sum(counts), sent.size(1)}, sent.options());
    exchange->start(received, sent, counts);
    exchange->finish();
    return {received, counts, exchange->wait_ns()};
  });
}

LowLatencyArrival ComposedBackend::send_tokens(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    const LowLatencyOptions& options) {
  const LowLatencySizes sizes{options.num_experts, options.num_topk, options.max_tokens_per_rank, world_size_};
  const auto plan = reported(kDispatch, [&] {
    check_low_latency_limits(kDispatch, sizes, options.hidden);
    return low_latency_send_plan(name_of(kDispatch), topk_idx, sizes);
  });
  auto agreed = sizes.agreed(options.hidden, options.dtype);
  agreed.push_back({"quantize (0: none, 1: fp8, 2: fp8_pow2, 3: fp8_ue8m0)", static_cast<int64_t>(options.quantize)});
  return exchange_wire(
      kDispatch, to_host(plan.send_counts), {}, agreed, [&] { return pack(x, topk_weights, options, plan); });
}

ComposedBackend::LowLatencyReturn ComposedBackend::send_sums(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts) {
  const LowLatencySizes sizes{num_experts, recv_row.size(1), recv_row.size(0) / world_size_, world_size_};
  const int64_t hidden = y.size(2), num_rows = sizes.num_local_experts() * recv_row.size(0);
  const auto has_row = recv_row.ge(0).any(1);  // whether that source token has an expert here
  SendPlan plan;
  std::vector<int64_t> send_rows, recv_rows;
  reported(kCombine, [&] {
    check_low_latency_limits(kCombine, sizes, hidden);
    plan = low_latency_send_plan(name_of(kCombine), topk_idx, sizes);
    recv_rows = to_host(plan.send_counts);
    check_recv_row(recv_row, num_rows);
    send_rows = to_host(has_row.view({world_size_, sizes.max_tokens_per_rank}).sum(1));
  });
  const auto reduce = [&] {
    // The inverse of recv_row, for tokens with a row: the (wire row, slot) pair of each row of y.
    const int64_t wire_rows = sum(send_rows);
    const auto y_row = recv_row.index_select(0, has_row.nonzero().squeeze(1)).to(at::kLong).view(-1);
    auto pair_of = at::full({num_rows + 1}, -1, recv_row.options());  // the last entry collects the empty slots
    pair_of.scatter_(
        0, at::where(y_row.ge(0), y_row, num_rows), at::arange(wire_rows * sizes.num_topk, pair_of.options()));
    const auto wire = permute_kernels(y).reduce_rows(
        y.view({num_rows, hidden}),
        row_weights.view(-1),
        pair_of.narrow(0, 0, num_rows),
        wire_rows,
        sizes.num_topk,
        [](at::IntArrayRef shape, const at::TensorOptions& on) { return at::empty(shape, on); });
    return wire.view(at::kByte);
  };
  TORCH_CHECK_VALUE(
      world_size_ > 1 || send_rows == recv_rows,
      name_of(kCombine),
      ": expected topk_idx and recv_row of one dispatch, got ",
      recv_rows,
      " tokens with experts and ",
      send_rows,
      " with rows");
  return {exchange_wire(kCombine, send_rows, recv_rows, sizes.agreed(hidden, y.scalar_type()), reduce), plan};
}

LowLatencyRows ComposedBackend::low_latency_dispatch(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    const LowLatencyOptions& options) {
  return to_expert_rows(send_tokens(x, topk_idx, topk_weights, options), LowLatencyWireRow(options), options);
}

InFlight ComposedBackend::low_latency_dispatch_send(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    const LowLatencyOptions& options) {
  return in_flight_of(send_tokens(x, topk_idx, topk_weights, options), world_size_ * options.max_tokens_per_rank);
}

LowLatencyRows ComposedBackend::low_latency_dispatch_recv(const InFlight& sent, const LowLatencyOptions& options) {
  constexpr const char* op = "ep::low_latency_dispatch_recv";
  const auto arrived = arrival_of(op, sent);
  const LowLatencyWireRow format(options);
  check_wire(op, arrived, format, options);
  return to_expert_rows(arrived, format, options);
}

LowLatencySums ComposedBackend::low_latency_combine(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts) {
  const auto returned = send_sums(y, topk_idx, row_weights, recv_row, num_experts);
  return {sum_up(returned.arrived, returned.plan, y.scalar_type()), to_device(returned.arrived.wait_ns, y)};
}

InFlight ComposedBackend::low_latency_combine_send(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts) {
  return in_flight_of(send_sums(y, topk_idx, row_weights, recv_row, num_experts).arrived, recv_row.size(0));
}

LowLatencySums ComposedBackend::low_latency_combine_recv(
    const InFlight& sent,
    const at::Tensor& topk_idx,
    int64_t /*hidden*/,
    at::ScalarType dtype,
    int64_t num_experts) {
  constexpr const char* op = "ep::low_latency_combine_recv";
  const auto& in_flight = std::get<1>(sent);
  const LowLatencySizes sizes{num_experts, topk_idx.size(1), in_flight.size(0) / world_size_, world_size_};
  const auto arrived = arrival_of(op, sent);
  const auto plan = low_latency_send_plan(op, topk_idx, sizes);
  const auto counts = to_host(plan.send_counts);
  for (int64_t rank = 0; rank < world_size_; ++rank) {
    TORCH_CHECK_VALUE(
        counts[rank] == arrived.counts[rank],
        op,
        ": expected the topk_idx of the send, by which as many rows come from each rank, got one by which ",
        counts[rank],
        " come from rank ",
        rank,
        ", where ",
        arrived.counts[rank],
        " came");
  }
  return {sum_up(arrived, plan, dtype), to_device(arrived.wait_ns, in_flight)};
}

}  // namespace ep
