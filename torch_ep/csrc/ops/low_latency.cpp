// ep::low_latency_dispatch and ep::low_latency_combine: for decoding, with no plan before them.
//   dispatch   quantize -> one record a (token, rank) -> exchange | place by expert
//   combine    fold by token                          -> exchange | sum
// The _send half of each ends at the bar, the _recv half begins there.
#include "c10d/low_latency_wire.h"
#include "core/backend.h"
#include "core/checks.h"
#include "core/host_copy.h"
#include "local/permute.h"
#include "ops/ops.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>

namespace ep {
namespace {

constexpr auto kDispatch = OpKind::low_latency_dispatch;
constexpr auto kCombine = OpKind::low_latency_combine;

Quantize quantize_of(const char* op, std::string_view name) {
  constexpr std::array<std::string_view, 4> names{"", "fp8", "fp8_pow2", "fp8_ue8m0"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(
      found != names.end(), op, ": expected quantize '', 'fp8', 'fp8_pow2' or 'fp8_ue8m0', got '", name, "'");
  return static_cast<Quantize>(found - names.begin());
}

void check_sizes(const char* op, const Sizes& sizes) {
  check_topk(op, sizes.num_topk);
  check_experts(op, sizes.num_experts, sizes.world_size);
  TORCH_CHECK_VALUE(
      sizes.max_tokens_per_rank > 0, op, ": expected a positive max_tokens_per_rank, got ", sizes.max_tokens_per_rank);
  // What recv_pair and recv_row count.
  const int64_t factor = std::max(sizes.num_topk, sizes.num_local_experts());
  TORCH_CHECK_VALUE(
      sizes.max_tokens_per_rank <= kMaxSize / (sizes.world_size * factor),
      op,
      ": expected max_tokens_per_rank of at most ",
      kMaxSize / (sizes.world_size * factor),
      " with world_size ",
      sizes.world_size,
      " and ",
      factor,
      " slots a token or local experts, got ",
      sizes.max_tokens_per_rank);
}

void check_topk_idx(
    const char* op,
    const at::Tensor& topk_idx,
    at::ArrayRef<Dim> shape,
    const at::Tensor& device_of,
    const ShapeOf& of) {
  check_tensor(op, "topk_idx", topk_idx, shape, device_of, of);
  check_index_type(op, "topk_idx", topk_idx);
}

void check_float(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, op, ": expected ", name, " of dtype Float, got ", t.scalar_type());
}

void check_hidden(const char* op, int64_t hidden) {
  TORCH_CHECK_VALUE(hidden > 0, op, ": expected a positive hidden, got ", hidden);
  check_at_most(op, "hidden", hidden, kMaxSize);
}

void check_in_flight(
    const char* op,
    const at::Tensor& ticket,
    const at::Tensor& in_flight,
    int64_t record_bytes,
    int64_t world_size) {
  check_tensor(op, "ticket", ticket, {2, world_size}, ticket, kInFlight);
  TORCH_CHECK_TYPE(
      ticket.scalar_type() == at::kLong, op, ": expected ticket of dtype Long, got ", ticket.scalar_type());
  check_tensor(op, "in_flight", in_flight, {"rows", record_bytes}, ticket, kInFlight);
  TORCH_CHECK_TYPE(
      in_flight.scalar_type() == at::kByte, op, ": expected in_flight of dtype Byte, got ", in_flight.scalar_type());
}

// One exchange of rows of bytes; with one rank they are there already.
class Crossing {
 public:
  // `recv_rows`: empty if only the other ranks know.
  Crossing(
      std::shared_ptr<Communicator> comm,
      OpKind op,
      const std::vector<int64_t>& send_rows,
      const std::vector<int64_t>& recv_rows,
      const std::vector<Agreed>& agreed)
      : counts_(send_rows) {
    if (comm) {
      exchange_.emplace(std::move(comm), op, send_rows, recv_rows, agreed);
    }
  }

  // `pack`: returns the wire rows. An error in it is told to the other ranks.
  template <class F>
  Arrived move(const F& pack) {
    if (!exchange_) {
      return {pack(), counts_, {0}};
    }
    return exchange_->run([&]() -> Arrived {
      const at::Tensor wire = pack();
      const auto counts = exchange_->confirm();
      auto records = at::empty({sum(counts), wire.size(1)}, wire.options());
      exchange_->start(records, wire, counts);
      exchange_->finish();
      return {records, counts, exchange_->wait_ns()};
    });
  }

 private:
  std::vector<int64_t> counts_;
  std::optional<Exchange> exchange_;
};

// Throws ValueError, in the name of `op`, on too many tokens or a bad index.
Route route(const char* op, const at::Tensor& topk_idx, const Sizes& sizes) {
  TORCH_CHECK_VALUE(
      topk_idx.size(0) <= sizes.max_tokens_per_rank,
      op,
      ": expected at most max_tokens_per_rank = ",
      sizes.max_tokens_per_rank,
      " tokens, got ",
      topk_idx.size(0));
  return local_kernels(topk_idx).route(op, topk_idx, sizes.num_experts, sizes.world_size);
}

void check_limits(OpKind op, const Communicator& comm, const Sizes& sizes, int64_t hidden) {
  check_limit(op, "hidden", comm.max_hidden, hidden);
  check_limit(op, "num_topk", comm.max_topk, sizes.num_topk);
  check_limit(op, "num_experts", comm.max_experts, sizes.num_experts);
}

std::vector<Agreed> agreed_of(const Sizes& sizes, int64_t hidden, at::ScalarType dtype) {
  return {
      {"num_experts", sizes.num_experts},
      {"num_topk", sizes.num_topk},
      {"max_tokens_per_rank", sizes.max_tokens_per_rank},
      {"hidden", hidden},
      {"dtype", static_cast<int64_t>(dtype), true}};
}

void check_in_flight_rows(OpKind op, int64_t rows, int64_t wanted, const char* backend) {
  TORCH_CHECK_VALUE(
      rows == wanted, name_of(op), ": expected in_flight_rows = ", wanted, " on backend ", backend, ", got ", rows);
}

// What `_send` returns where a backend keeps the data itself.
InFlight elsewhere(const at::Tensor& ticket, int64_t record_bytes) {
  return {ticket, at::empty({0, record_bytes}, ticket.options().dtype(at::kByte))};
}

// What `_send` returns of what arrived: the same sizes on every call.
InFlight in_flight_of(const Arrived& arrived, int64_t rows) {
  const auto& records = arrived.records;
  auto data = at::zeros({rows, records.size(1)}, records.options());
  data.narrow(0, 0, records.size(0)).copy_(records);
  return {at::stack({to_device(arrived.counts, data), to_device(arrived.wait_ns, data)}), data};
}

// The reverse.
Arrived arrived_of(const char* op, const at::Tensor& ticket, const at::Tensor& in_flight) {
  const auto both = to_host(ticket);
  const auto middle = both.begin() + ticket.size(1);
  const std::vector<int64_t> counts(both.begin(), middle);
  int64_t rows = 0;
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(
        count >= 0 && count <= in_flight.size(0) - rows,
        op,
        ": expected ticket and in_flight of one send, got ",
        at::IntArrayRef(counts),
        " rows by the ticket and ",
        in_flight.size(0),
        " in flight");
    rows += count;
  }
  return {in_flight.narrow(0, 0, rows), counts, {middle, both.end()}};
}

// The arguments of low_latency_dispatch and its _send half, checked.
struct Tokens {
  Tokens(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      c10::string_view quantize,
      int64_t num_experts,
      int64_t max_tokens_per_rank,
      int64_t world_size)
      : x(x),
        topk_idx(topk_idx),
        topk_weights(topk_weights),
        quantize(quantize_of(name_of(kDispatch), quantize)),
        sizes{num_experts, 0, max_tokens_per_rank, world_size} {
    const char* op = name_of(kDispatch);
    check_tensor(op, "x", x, {"num_tokens", "hidden"}, x);
    check_low_latency_type(op, "x", x.scalar_type());
    check_hidden(op, x.size(1));
    check_topk_idx(op, topk_idx, {x.size(0), "num_topk"}, x, kTokensOfX);
    if (topk_weights) {
      check_tensor(op, "topk_weights", *topk_weights, {topk_idx.size(0), topk_idx.size(1)}, x, kEntries);
      check_float(op, "topk_weights", *topk_weights);
    }
    sizes.num_topk = topk_idx.size(1);
    check_sizes(op, sizes);
  }

  LowLatencyOptions options() const {
    return {quantize, sizes.num_experts, sizes.num_topk, sizes.max_tokens_per_rank, x.size(1), x.scalar_type()};
  }
  Record record() const { return {x.size(1), x.scalar_type(), quantize, sizes.num_topk}; }

  const at::Tensor& x;
  const at::Tensor& topk_idx;
  const std::optional<at::Tensor>& topk_weights;
  Quantize quantize;
  Sizes sizes;
};

// uint8 [wire rows, bytes of a record].
at::Tensor pack(const Tokens& tokens, const Route& routed) {
  const auto& x = tokens.x;
  const auto& local = local_kernels(x);
  const auto record = tokens.record();
  const int64_t num_topk = routed.send_row.size(1), wire_rows = routed.wire_topk.size(0);
  auto wire = at::zeros({wire_rows, record.bytes}, x.options().dtype(at::kByte));
  const auto put = [&](int64_t at, const at::Tensor& part) {
    const auto bytes = part.view(at::kByte);
    wire.narrow(1, at, bytes.size(1)).copy_(bytes);
  };
  const auto [rows, scales] = quantized(x, tokens.quantize);
  put(0, local.pack_rows(rows.view(at::kByte), routed.send_row, wire_rows));
  if (scales) {
    put(record.scales_at, local.pack_rows(*scales, routed.send_row, wire_rows));
  }
  const auto token = at::arange(x.size(0), routed.send_row.options()).unsqueeze(1);
  put(record.topk_at, at::cat({local.pack_rows(token, routed.send_row, wire_rows), routed.wire_topk}, 1));
  const auto weights = tokens.topk_weights.value_or(at::ones({x.size(0), num_topk}, x.options().dtype(at::kFloat)));
  put(record.weights_at, local.pack_slots(weights, routed.send_row, wire_rows));
  return wire;
}

Arrived send_tokens(const Tokens& tokens, const std::string& group) {
  const char* op = name_of(kDispatch);
  const auto& sizes = tokens.sizes;
  const auto comm = find_communicator(group, sizes.world_size, kDispatch);
  const auto routed = or_tell(kDispatch, comm, [&] {
    if (comm) {
      check_limits(kDispatch, *comm, sizes, tokens.x.size(1));
    }
    return route(op, tokens.topk_idx, sizes);
  });
  auto agreed = agreed_of(sizes, tokens.x.size(1), tokens.x.scalar_type());
  agreed.push_back({"quantize (0: none, 1: fp8, 2: fp8_pow2, 3: fp8_ue8m0)", static_cast<int64_t>(tokens.quantize)});
  Crossing crossing(comm, kDispatch, to_host(routed.send_counts), {}, agreed);
  return crossing.move([&] { return pack(tokens, routed); });
}

// The arguments of low_latency_combine and its _send half, checked.
struct Results {
  Results(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts,
      int64_t world_size)
      : y(y), topk_idx(topk_idx), row_weights(row_weights), recv_row(recv_row) {
    const char* op = name_of(kCombine);
    check_tensor(op, "recv_row", recv_row, {"rows", "num_topk"}, recv_row, kLowLatencyPlanField);
    check_int32(op, "recv_row", recv_row);
    check_topk(op, recv_row.size(1));
    check_experts(op, num_experts, world_size);
    const int64_t room = recv_row.size(0);
    TORCH_CHECK_VALUE(
        room % world_size == 0,
        op,
        ": expected recv_row to have the same number of rows for each of ",
        world_size,
        " ranks, got ",
        room);
    sizes = {num_experts, recv_row.size(1), room / world_size, world_size};
    check_sizes(op, sizes);
    check_tensor(op, "y", y, {sizes.num_local_experts(), room, "hidden"}, recv_row, kLowLatencyRows);
    check_low_latency_type(op, "y", y.scalar_type());
    check_hidden(op, y.size(2));
    check_tensor(op, "row_weights", row_weights, {sizes.num_local_experts(), room}, recv_row, kLowLatencyPlanField);
    check_float(op, "row_weights", row_weights);
    check_topk_idx(op, topk_idx, {"num_tokens", sizes.num_topk}, recv_row, kLowLatencyPlanField);
  }

  const at::Tensor& y;
  const at::Tensor& topk_idx;
  const at::Tensor& row_weights;
  const at::Tensor& recv_row;
  Sizes sizes;
};

// Throws unless every row that it names is one of y: the kernels follow them unseen.
void check_recv_row(const at::Tensor& recv_row, int64_t rows) {
  const auto ends = to_host(ends_of(recv_row));
  const int64_t bad = ends[0] < -1 ? ends[0] : ends[1];
  TORCH_CHECK_VALUE(bad >= -1 && bad < rows, name_of(kCombine), ": expected recv_row in [-1, ", rows, "), got ", bad);
}

struct Home {
  Arrived arrived;  // sums, one a (token, rank)
  Route routed;     // of the tokens here
};

Home send_sums(const Results& results, const std::string& group) {
  const char* op = name_of(kCombine);
  const auto& sizes = results.sizes;
  const auto comm = find_communicator(group, sizes.world_size, kCombine);
  const int64_t hidden = results.y.size(2), num_rows = sizes.num_local_experts() * sizes.room();
  const auto comes = results.recv_row.ge(0).any(1);  // whether the token of that row has an expert here
  Route routed;
  std::vector<int64_t> send_rows, recv_rows;
  or_tell(kCombine, comm, [&] {
    if (comm) {
      check_limits(kCombine, *comm, sizes, hidden);
    }
    routed = route(op, results.topk_idx, sizes);
    recv_rows = to_host(routed.send_counts);
    check_recv_row(results.recv_row, num_rows);
    send_rows = to_host(comes.view({sizes.world_size, sizes.max_tokens_per_rank}).sum(1));
  });
  Crossing crossing(comm, kCombine, send_rows, recv_rows, agreed_of(sizes, hidden, results.y.scalar_type()));
  TORCH_CHECK_VALUE(
      comm || send_rows == recv_rows,
      op,
      ": expected topk_idx and recv_row of one dispatch, got ",
      recv_rows,
      " tokens with experts and ",
      send_rows,
      " with rows");

  const auto fold = [&] {
    // The inverse, for those tokens alone: for each row of y its (wire row, slot) pair.
    const int64_t wire_rows = sum(send_rows);
    const auto y_row = results.recv_row.index_select(0, comes.nonzero().squeeze(1)).to(at::kLong).view(-1);
    auto pair_of = at::full({num_rows + 1}, -1, results.recv_row.options());  // the last is for nothing
    pair_of.scatter_(
        0, at::where(y_row.ge(0), y_row, num_rows), at::arange(wire_rows * sizes.num_topk, pair_of.options()));
    const auto wire = local_kernels(results.y).fold_rows(
        results.y.view({num_rows, hidden}),
        results.row_weights.view(-1),
        pair_of.narrow(0, 0, num_rows),
        wire_rows,
        sizes.num_topk);
    return wire.view(at::kByte);
  };
  return {crossing.move(fold), routed};
}

at::Tensor sum_up(const Home& home, at::ScalarType dtype) {
  return local_kernels(home.arrived.records).sum_rows(home.arrived.records.view(dtype), home.routed.send_row);
}

}  // namespace

LowLatencyRows low_latency_dispatch(
    const at::Tensor& x,
    const at::Tensor& topk_idx,
    const std::optional<at::Tensor>& topk_weights,
    c10::string_view quantize,
    int64_t num_experts,
    int64_t max_tokens_per_rank,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  const auto tokens = or_tell(kDispatch, group_name, [&] {
    return Tokens(x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank, world_size);
  });
  const std::string group(group_name);
  if (const auto backend = find_backend(group, world_size, x, kDispatch)) {
    return backend->low_latency_dispatch(x, topk_idx, topk_weights, tokens.options());
  }
  return place(send_tokens(tokens, group), tokens.record(), tokens.sizes);
}

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
    const std::optional<at::Tensor>& /*after*/) {
  const auto tokens = or_tell(kDispatch, group_name, [&] {
    return Tokens(x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank, world_size);
  });
  const std::string group(group_name);
  if (const auto backend = find_backend(group, world_size, x, kDispatch)) {
    check_in_flight_rows(kDispatch, in_flight_rows, 0, "nvlink");
    const auto ticket = backend->low_latency_dispatch_send(x, topk_idx, topk_weights, tokens.options());
    return elsewhere(ticket, tokens.record().bytes);
  }
  check_in_flight_rows(kDispatch, in_flight_rows, tokens.sizes.room(), "c10d");
  return in_flight_of(send_tokens(tokens, group), in_flight_rows);
}

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
    c10::string_view group_name) {
  constexpr const char* op = "ep::low_latency_dispatch_recv";
  const auto how = quantize_of(op, quantize);
  const Sizes sizes{num_experts, num_topk, max_tokens_per_rank, world_size};
  check_sizes(op, sizes);
  check_low_latency_type(op, "rows", dtype);
  check_hidden(op, hidden);
  const Record record(hidden, dtype, how, num_topk);
  check_in_flight(op, ticket, in_flight, record.bytes, world_size);
  if (const auto backend = find_backend(std::string(group_name), world_size, ticket, kDispatch)) {
    return backend->low_latency_dispatch_recv(ticket, {how, num_experts, num_topk, max_tokens_per_rank, hidden, dtype});
  }
  const auto arrived = arrived_of(op, ticket, in_flight);
  check_records(op, arrived, record, sizes);
  return place(arrived, record, sizes);
}

std::tuple<at::Tensor, at::Tensor> low_latency_combine(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name,
    const std::optional<at::Tensor>& /*after*/) {
  const auto results = or_tell(
      kCombine, group_name, [&] { return Results(y, topk_idx, row_weights, recv_row, num_experts, world_size); });
  const std::string group(group_name);
  if (const auto backend = find_backend(group, world_size, y, kCombine)) {
    return backend->low_latency_combine(y, topk_idx, row_weights, recv_row, num_experts);
  }
  const auto home = send_sums(results, group);
  return {sum_up(home, y.scalar_type()), to_device(home.arrived.wait_ns, y)};
}

InFlight low_latency_combine_send(
    const at::Tensor& y,
    const at::Tensor& topk_idx,
    const at::Tensor& row_weights,
    const at::Tensor& recv_row,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name,
    int64_t in_flight_rows,
    const std::optional<at::Tensor>& /*after*/) {
  const auto results = or_tell(
      kCombine, group_name, [&] { return Results(y, topk_idx, row_weights, recv_row, num_experts, world_size); });
  const std::string group(group_name);
  if (const auto backend = find_backend(group, world_size, y, kCombine)) {
    check_in_flight_rows(kCombine, in_flight_rows, 0, "nvlink");
    const auto ticket = backend->low_latency_combine_send(y, topk_idx, row_weights, recv_row, num_experts);
    return elsewhere(ticket, y.size(2) * y.element_size());
  }
  check_in_flight_rows(kCombine, in_flight_rows, results.sizes.room(), "c10d");
  return in_flight_of(send_sums(results, group).arrived, in_flight_rows);
}

std::tuple<at::Tensor, at::Tensor> low_latency_combine_recv(
    const at::Tensor& ticket,
    const at::Tensor& in_flight,
    const at::Tensor& topk_idx,
    int64_t hidden,
    at::ScalarType dtype,
    int64_t num_experts,
    int64_t world_size,
    c10::string_view group_name) {
  constexpr const char* op = "ep::low_latency_combine_recv";
  check_topk_idx(op, topk_idx, {"num_tokens", "num_topk"}, ticket, kInFlight);
  check_topk(op, topk_idx.size(1));
  check_experts(op, num_experts, world_size);
  check_low_latency_type(op, "rows", dtype);
  check_hidden(op, hidden);
  check_in_flight(op, ticket, in_flight, hidden * static_cast<int64_t>(c10::elementSize(dtype)), world_size);
  if (const auto backend = find_backend(std::string(group_name), world_size, ticket, kCombine)) {
    return backend->low_latency_combine_recv(ticket, topk_idx, hidden, dtype, num_experts);
  }
  const Sizes sizes{num_experts, topk_idx.size(1), in_flight.size(0) / world_size, world_size};
  const Home home{arrived_of(op, ticket, in_flight), route(op, topk_idx, sizes)};
  const auto counts = to_host(home.routed.send_counts);
  for (int64_t rank = 0; rank < world_size; ++rank) {
    TORCH_CHECK_VALUE(
        counts[rank] == home.arrived.counts[rank],
        op,
        ": expected the topk_idx of the send, by which as many rows come from each rank, got one by which ",
        counts[rank],
        " come from rank ",
        rank,
        ", where ",
        home.arrived.counts[rank],
        " came");
  }
  return {sum_up(home, dtype), to_device(home.arrived.wait_ns, in_flight)};
}

}  // namespace ep
