// The permute kernels on the CPU. Threads work on chunks of tokens or rows. Counting passes take two rounds (count,
// then write at the prefix sums), so the order of the result does not depend on the number of threads.
#include "local/permute.h"

#include "core/integer_math.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

namespace ep {
namespace {

// Columns summed at a time: the float32 accumulators of one tile stay in the L1 cache.
constexpr int64_t kTile = 512;
// Minimum bytes to copy per thread.
constexpr int64_t kGrainBytes = 64 * 1024;

int64_t row_bytes(const at::Tensor& t) {
  return c10::multiply_integers(t.sizes().slice(1)) * static_cast<int64_t>(t.element_size());
}

int64_t grain_for(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_item));
}

std::vector<int64_t> sizes_with(const at::Tensor& like, int64_t rows) {
  auto sizes = like.sizes().vec();
  sizes[0] = rows;
  return sizes;
}

at::Tensor empty_rows(const at::Tensor& like, int64_t rows) {
  return at::empty(sizes_with(like, rows), like.options());
}

// [begin, end) of one chunk of n items.
std::pair<int64_t, int64_t> chunk_bounds(int64_t n, int64_t chunks, int64_t chunk) {
  return {n * chunk / chunks, n * (chunk + 1) / chunks};
}

int64_t num_chunks(int64_t items) {
  constexpr int64_t kMinItems = 256;
  return std::clamp<int64_t>(items / kMinItems, 1, at::get_num_threads());
}

template <typename F>
void for_each_chunk(int64_t chunks, const F& f) {
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      f(chunk);
    }
  });
}

template <typename T>
void check_indices(const char* op, const T* idx, int64_t num_tokens, int64_t num_topk, int64_t num_experts) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    const T* row = idx + token * num_topk;
    for (int64_t slot = 0; slot < num_topk; ++slot) {
      TORCH_CHECK_VALUE(
          row[slot] >= -1 && row[slot] < num_experts,
          op,
          ": expected topk_idx in [-1, ",
          num_experts,
          "), got ",
          static_cast<int64_t>(row[slot]),
          " at token ",
          token,
          ", slot ",
          slot);
      for (int64_t other = 0; other < slot; ++other) {
        TORCH_CHECK_VALUE(
            row[slot] == -1 || row[slot] != row[other],
            op,
            ": expected different experts in one token, got expert ",
            static_cast<int64_t>(row[slot]),
            " at token ",
            token,
            ", slots ",
            other,
            " and ",
            slot);
      }
    }
  }
}

template <typename T>
SendPlan plan_send_impl(const char* op, const at::Tensor& topk_idx, int64_t num_experts, int64_t world_size) {
  const int64_t num_tokens = topk_idx.size(0), num_topk = topk_idx.size(1);
  const int64_t num_local_experts = num_experts / world_size;
  const T* idx = topk_idx.const_data_ptr<T>();
  check_indices(op, idx, num_tokens, num_topk, num_experts);

  SendPlan plan;
  const auto options = topk_idx.options().dtype(at::kInt);
  plan.send_row = at::empty({num_tokens, num_topk}, options);
  plan.send_counts = at::empty({world_size}, options);
  auto* send_row = plan.send_row.mutable_data_ptr<int32_t>();
  auto* send_counts = plan.send_counts.mutable_data_ptr<int32_t>();

  const int64_t chunks = num_chunks(num_tokens);
  std::vector<int64_t> next(chunks * world_size, 0);  // [chunk][rank]: first rows counted, then the next row to use
  // Calls f(token, rank) once for every rank that a token of the chunk visits.
  const auto for_each_visit = [&](int64_t chunk, const auto& f) {
    const auto [begin, end] = chunk_bounds(num_tokens, chunks, chunk);
    std::vector<int64_t> seen(world_size, -1);
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t slot = 0; slot < num_topk; ++slot) {
        const T expert = idx[token * num_topk + slot];
        if (expert >= 0 && seen[expert / num_local_experts] != token) {
          seen[expert / num_local_experts] = token;
          f(token, expert / num_local_experts);
        }
      }
    }
  };
  for_each_chunk(chunks, [&](int64_t chunk) {
    for_each_visit(chunk, [&](int64_t, int64_t rank) { ++next[chunk * world_size + rank]; });
  });
  int64_t wire_rows = 0;
  for (int64_t rank = 0; rank < world_size; ++rank) {
    const int64_t first = wire_rows;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      wire_rows += std::exchange(next[chunk * world_size + rank], wire_rows);
    }
    send_counts[rank] = static_cast<int32_t>(wire_rows - first);
  }
  plan.wire_topk = at::full({wire_rows, num_topk}, -1, options);
  auto* wire_topk = plan.wire_topk.mutable_data_ptr<int32_t>();
  for_each_chunk(chunks, [&](int64_t chunk) {
    for_each_visit(chunk, [&](int64_t token, int64_t rank) {
      const int64_t row = next[chunk * world_size + rank]++;
      for (int64_t slot = 0; slot < num_topk; ++slot) {
        const T expert = idx[token * num_topk + slot];
        if (expert >= 0 && expert / num_local_experts == rank) {
          send_row[token * num_topk + slot] = static_cast<int32_t>(row);
          wire_topk[row * num_topk + slot] = static_cast<int32_t>(expert % num_local_experts);
        }
      }
    });
    const auto [begin, end] = chunk_bounds(num_tokens, chunks, chunk);
    for (int64_t i = begin * num_topk; i < end * num_topk; ++i) {
      if (idx[i] < 0) {
        send_row[i] = -1;
      }
    }
  });
  return plan;
}

RecvPlan plan_recv_rank_major(
    const at::Tensor& wire_topk,
    const std::vector<int64_t>& recv_rows,
    const RecvPlanOptions& options) {
  const int64_t wire_rows = wire_topk.size(0), num_topk = wire_topk.size(1);
  const int64_t rows = options.capacity.value_or(wire_rows);
  check_num_rows(rows, wire_rows);
  const int64_t kept = std::min(rows, wire_rows);
  const auto int_options = wire_topk.options();
  RecvPlan plan;
  plan.recv_map = at::full({rows, num_topk}, -1, int_options.dtype(options.index_dtype));
  plan.recv_map.narrow(0, 0, kept).copy_(wire_topk.narrow(0, 0, kept));
  plan.offsets = at::empty({static_cast<int64_t>(recv_rows.size())}, int_options);
  auto* offsets = plan.offsets.mutable_data_ptr<int32_t>();
  int64_t end = 0;
  for (size_t rank = 0; rank < recv_rows.size(); ++rank) {
    end += recv_rows[rank];
    offsets[rank] = static_cast<int32_t>(std::min(end, rows));
  }
  plan.tokens_per_expert = at::zeros({options.num_local_experts}, int_options);
  auto* counts = plan.tokens_per_expert.mutable_data_ptr<int32_t>();
  const auto* topk = wire_topk.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < kept * num_topk; ++i) {
    if (topk[i] >= 0) {
      ++counts[topk[i]];
    }
  }
  plan.num_dropped = at::full({}, wire_rows - kept, int_options);
  return plan;
}

RecvPlan plan_recv_expert_major(const at::Tensor& wire_topk, const RecvPlanOptions& options) {
  const int64_t wire_rows = wire_topk.size(0), num_topk = wire_topk.size(1);
  const int64_t num_experts = options.num_local_experts, alignment = options.alignment;
  const auto* topk = wire_topk.const_data_ptr<int32_t>();
  const int64_t chunks = num_chunks(wire_rows);
  std::vector<int64_t> next(chunks * num_experts, 0);  // [chunk][expert]
  for_each_chunk(chunks, [&](int64_t chunk) {
    const auto [begin, end] = chunk_bounds(wire_rows, chunks, chunk);
    for (int64_t i = begin * num_topk; i < end * num_topk; ++i) {
      if (topk[i] >= 0) {
        ++next[chunk * num_experts + topk[i]];
      }
    }
  });
  const auto int_options = wire_topk.options();
  std::vector<int64_t> counts(num_experts), ends(num_experts);
  int64_t needed = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    int64_t row = needed;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      row += std::exchange(next[chunk * num_experts + expert], row);
    }
    counts[expert] = row - needed;
    ends[expert] = needed += round_up(counts[expert], alignment);
  }
  const int64_t rows = options.capacity.value_or(needed);
  check_num_rows(rows, wire_rows * num_topk);

  RecvPlan plan;
  plan.recv_map = at::full({rows}, -1, int_options);
  auto* recv_pair = plan.recv_map.mutable_data_ptr<int32_t>();
  for_each_chunk(chunks, [&](int64_t chunk) {
    const auto [begin, end] = chunk_bounds(wire_rows, chunks, chunk);
    for (int64_t i = begin * num_topk; i < end * num_topk; ++i) {
      if (topk[i] >= 0) {
        const int64_t row = next[chunk * num_experts + topk[i]]++;
        if (row < rows) {
          recv_pair[row] = static_cast<int32_t>(i);
        }
      }
    }
  });
  plan.offsets = at::empty({num_experts}, int_options);
  plan.tokens_per_expert = at::empty({num_experts}, int_options);
  int64_t dropped = 0, begin = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t kept = std::clamp<int64_t>(rows - begin, 0, counts[expert]);
    dropped += counts[expert] - kept;
    begin = ends[expert];
    plan.offsets.mutable_data_ptr<int32_t>()[expert] = static_cast<int32_t>(std::min(ends[expert], rows));
    plan.tokens_per_expert.mutable_data_ptr<int32_t>()[expert] = static_cast<int32_t>(kept);
  }
  plan.num_dropped = at::full({}, dropped, int_options);
  return plan;
}

void check_index(const char* op, const char* name, int64_t index, int64_t most) {
  TORCH_CHECK_VALUE(
      index >= -1 && index < most, op, ": expected ", name, " of this plan in [-1, ", most, "), got ", index);
}

// Collects the different wire rows of one token, in the order of its slots. Returns their number.
int distinct(const int32_t* row_of_slot, int64_t num_topk, std::vector<int32_t>& rows) {
  int n = 0;
  for (int64_t slot = 0; slot < num_topk; ++slot) {
    const int32_t row = row_of_slot[slot];
    if (row >= 0 && std::find(rows.begin(), rows.begin() + n, row) == rows.begin() + n) {
      rows[n++] = row;
    }
  }
  return n;
}

// out[:] = sum of weights[i] * rows[i], accumulated in order in float32 (float64 for float64), rounded once.
template <typename T>
void sum_into(T* out, const T* const* rows, const double* weights, int n, int64_t hidden) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  if (n == 0) {
    std::fill(out, out + hidden, T(0));
    return;
  }
  if (n == 1 && !weights) {
    std::copy_n(rows[0], hidden, out);
    return;
  }
  [[maybe_unused]] Acc tile[kTile];
  for (int64_t begin = 0; begin < hidden; begin += kTile) {
    const int64_t width = std::min(kTile, hidden - begin);
    Acc* acc;
    if constexpr (std::is_same_v<T, Acc>) {
      acc = out + begin;
    } else {
      acc = tile;
    }
    for (int i = 0; i < n; ++i) {
      const T* row = rows[i] + begin;
      const Acc weight = weights ? static_cast<Acc>(weights[i]) : Acc(1);  // times 1 is exact
      if (i == 0) {  // starting from zero would lose the sign of -0
        for (int64_t c = 0; c < width; ++c) {
          acc[c] = weight * static_cast<Acc>(row[c]);
        }
      } else {
        for (int64_t c = 0; c < width; ++c) {
          acc[c] += weight * static_cast<Acc>(row[c]);
        }
      }
    }
    if constexpr (!std::is_same_v<T, Acc>) {
      for (int64_t c = 0; c < width; ++c) {
        out[begin + c] = static_cast<T>(acc[c]);
      }
    }
  }
}

// Calls f with an unsigned integer as wide as an element of t: copies do not interpret elements.
template <typename F>
void with_width(const at::Tensor& t, const F& f) {
  switch (t.element_size()) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    default:
      return f(uint64_t{});
  }
}

template <typename T>
const T* read(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* write(at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Where the rows of a RowsOut are.
template <typename T>
class RowWriter {
 public:
  explicit RowWriter(const RowsOut& out)
      : rows_(static_cast<T*>(out.rows.mutable_data_ptr())),
        stride_(out.rows.stride(0) * bytes_per_element(out)),
        own_begin_(out.own_begin),
        own_end_(out.own_begin + (out.own.defined() ? out.own.size(0) : 0)) {
    if (out.own.defined()) {
      own_ = static_cast<T*>(out.own.mutable_data_ptr());
      own_stride_ = out.own.stride(0) * bytes_per_element(out);
    }
  }

  T* operator()(int64_t row) const {
    return row >= own_begin_ && row < own_end_ ? own_ + (row - own_begin_) * own_stride_ : rows_ + row * stride_;
  }

 private:
  // In units of T, which is char for copies.
  static int64_t bytes_per_element(const RowsOut& out) {
    return static_cast<int64_t>(out.rows.element_size() / sizeof(T));
  }

  T* rows_;
  int64_t stride_;
  int64_t own_begin_, own_end_;
  T* own_ = nullptr;
  int64_t own_stride_ = 0;
};

SendPlan plan_send(const char* op, const at::Tensor& topk_idx, int64_t num_experts, int64_t world_size) {
  return topk_idx.scalar_type() == at::kInt ? plan_send_impl<int32_t>(op, topk_idx, num_experts, world_size)
                                            : plan_send_impl<int64_t>(op, topk_idx, num_experts, world_size);
}

RecvPlan plan_recv(const at::Tensor& wire_topk, const std::vector<int64_t>& recv_rows, const RecvPlanOptions& options) {
  return options.expert_major ? plan_recv_expert_major(wire_topk, options)
                              : plan_recv_rank_major(wire_topk, recv_rows, options);
}

void check_send_row(const char* op, const at::Tensor& send_row, int64_t wire_rows) {
  const auto* row_of_slot = read<int32_t>(send_row);
  const int64_t num_tokens = send_row.size(0), num_topk = send_row.size(1);
  TORCH_CHECK_VALUE(
      wire_rows <= send_row.numel(),
      op,
      ": expected send_row of this plan to name each of the ",
      wire_rows,
      " rows of send_counts, got ",
      send_row.numel(),
      " slots");
  std::vector<int64_t> token_of(wire_rows, -1);
  int64_t named = 0;
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int64_t slot = 0; slot < num_topk; ++slot) {
      const int32_t row = row_of_slot[token * num_topk + slot];
      if (row == -1) {
        continue;
      }
      check_index(op, "send_row", row, wire_rows);
      if (token_of[row] < 0) {
        token_of[row] = token;
        ++named;
      }
      TORCH_CHECK_VALUE(
          token_of[row] == token,
          op,
          ": expected send_row of this plan to name each row for one token, got tokens ",
          token_of[row],
          " and ",
          token,
          " for row ",
          row);
    }
  }
  TORCH_CHECK_VALUE(
      named == wire_rows,
      op,
      ": expected send_row of this plan to name each of the ",
      wire_rows,
      " rows of send_counts, got no token for row ",
      std::find(token_of.begin(), token_of.end(), -1) - token_of.begin());
}

void check_recv_pair(const char* op, const at::Tensor& recv_pair, int64_t pairs) {
  const auto* pair_of_row = read<int32_t>(recv_pair);
  int32_t least = -1, most = -1;
  for (int64_t row = 0; row < recv_pair.size(0); ++row) {
    least = std::min(least, pair_of_row[row]);
    most = std::max(most, pair_of_row[row]);
  }
  check_index(op, "recv_pair", least, pairs);
  check_index(op, "recv_pair", most, pairs);
}

at::Tensor pack_rows(const at::Tensor& x, const at::Tensor& send_row, int64_t wire_rows, const Allocate& allocate) {
  auto wire = allocate(sizes_with(x, wire_rows), x.options());
  pack_columns({wire}, x, send_row);
  return wire;
}

at::Tensor pack_slots(const at::Tensor& w, const at::Tensor& send_row, int64_t wire_rows) {
  const int64_t num_topk = send_row.size(1);
  auto wire = at::zeros({wire_rows, num_topk}, w.options());
  const auto* row_of_slot = read<int32_t>(send_row);
  with_width(w, [&](auto unit) {
    using U = decltype(unit);
    const auto* in = read<U>(w);
    auto* out = write<U>(wire);
    for (int64_t i = 0; i < send_row.numel(); ++i) {
      if (row_of_slot[i] >= 0) {
        out[row_of_slot[i] * num_topk + i % num_topk] = in[i];
      }
    }
  });
  return wire;
}

at::Tensor expand_rows(const at::Tensor& wire, const at::Tensor& recv_pair, int64_t num_topk) {
  auto rows = empty_rows(wire, recv_pair.size(0));
  expand_columns({rows}, wire, recv_pair, num_topk);
  return rows;
}

at::Tensor expand_slots(const at::Tensor& wire, const at::Tensor& recv_pair) {
  auto rows = at::zeros({recv_pair.size(0)}, wire.options());
  const auto* pair_of_row = read<int32_t>(recv_pair);
  with_width(wire, [&](auto unit) {
    using U = decltype(unit);
    const auto* in = read<U>(wire);
    auto* out = write<U>(rows);
    for (int64_t row = 0; row < rows.size(0); ++row) {
      if (pair_of_row[row] >= 0) {
        out[row] = in[pair_of_row[row]];
      }
    }
  });
  return rows;
}

at::Tensor reduce_rows(
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const at::Tensor& recv_pair,
    int64_t wire_rows,
    int64_t num_topk,
    const Allocate& allocate) {
  auto wire = allocate({wire_rows, y.size(1)}, y.options());
  reduce_columns({wire}, y, row_weights, recv_pair, num_topk);
  return wire;
}

at::Tensor return_slots(const at::Tensor& w, const at::Tensor& recv_pair, int64_t wire_rows, int64_t num_topk) {
  auto wire = at::zeros({wire_rows, num_topk}, w.options());
  const auto* pair_of_row = read<int32_t>(recv_pair);
  with_width(w, [&](auto unit) {
    using U = decltype(unit);
    const auto* in = read<U>(w);
    auto* out = write<U>(wire);
    for (int64_t row = 0; row < recv_pair.size(0); ++row) {
      if (pair_of_row[row] >= 0) {
        out[pair_of_row[row]] = in[row];
      }
    }
  });
  return wire;
}

at::Tensor sum_rows(const at::Tensor& wire, const at::Tensor& send_row) {
  auto tokens = empty_rows(wire, send_row.size(0));
  sum_columns({tokens}, wire, send_row);
  return tokens;
}

at::Tensor gather_slots(const at::Tensor& wire, const at::Tensor& send_row) {
  auto tokens = at::zeros(send_row.sizes(), wire.options());
  const int64_t num_topk = send_row.size(1);
  const auto* row_of_slot = read<int32_t>(send_row);
  with_width(wire, [&](auto unit) {
    using U = decltype(unit);
    const auto* in = read<U>(wire);
    auto* out = write<U>(tokens);
    for (int64_t i = 0; i < send_row.numel(); ++i) {
      if (row_of_slot[i] >= 0) {
        out[i] = in[row_of_slot[i] * num_topk + i % num_topk];
      }
    }
  });
  return tokens;
}

}  // namespace

void pack_columns(const RowsOut& wire, const at::Tensor& x, const at::Tensor& send_row) {
  const int64_t bytes = row_bytes(x), num_topk = send_row.size(1);
  if (bytes == 0 || x.size(0) == 0) {
    return;  // memcpy takes no null pointers, not even for no bytes
  }
  const int64_t stride = x.stride(0) * static_cast<int64_t>(x.element_size());
  const auto* row_of_slot = read<int32_t>(send_row);
  const auto* in = read<char>(x);
  const RowWriter<char> out(wire);
  at::parallel_for(0, send_row.size(0), grain_for(bytes), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> rows(num_topk);
    for (int64_t token = begin; token < end; ++token) {
      const int n = distinct(row_of_slot + token * num_topk, num_topk, rows);
      for (int i = 0; i < n; ++i) {
        std::memcpy(out(rows[i]), in + token * stride, bytes);
      }
    }
  });
}

void expand_columns(const RowsOut& rows, const at::Tensor& wire, const at::Tensor& recv_pair, int64_t num_topk) {
  const int64_t bytes = row_bytes(wire);
  if (bytes == 0 || recv_pair.size(0) == 0) {
    return;
  }
  const int64_t stride = wire.stride(0) * static_cast<int64_t>(wire.element_size());
  const auto* pair_of_row = read<int32_t>(recv_pair);
  const auto* in = read<char>(wire);
  const RowWriter<char> out(rows);
  at::parallel_for(0, recv_pair.size(0), grain_for(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (pair_of_row[row] >= 0) {
        std::memcpy(out(row), in + pair_of_row[row] / num_topk * stride, bytes);
      } else {
        std::memset(out(row), 0, bytes);
      }
    }
  });
}

void reduce_columns(
    const RowsOut& wire,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const at::Tensor& recv_pair,
    int64_t num_topk) {
  const int64_t hidden = y.size(1), stride = y.stride(0), wire_rows = wire.rows.size(0);
  const auto* pair_of_row = read<int32_t>(recv_pair);
  std::vector<int32_t> row_of(wire_rows * num_topk, -1);  // the inverse of recv_pair
  for (int64_t row = 0; row < recv_pair.size(0); ++row) {
    if (pair_of_row[row] >= 0) {
      row_of[pair_of_row[row]] = static_cast<int32_t>(row);
    }
  }
  const auto weights = row_weights ? row_weights->to(at::kDouble) : at::Tensor();
  const auto* weight = row_weights ? read<double>(weights) : nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, y.scalar_type(), "ep::combine", [&] {
    const auto* in = read<scalar_t>(y);
    const RowWriter<scalar_t> out(wire);
    at::parallel_for(0, wire_rows, grain_for(row_bytes(y)), [&](int64_t begin, int64_t end) {
      std::vector<const scalar_t*> rows(num_topk);
      std::vector<double> row_weight(num_topk);
      for (int64_t wire_row = begin; wire_row < end; ++wire_row) {
        int n = 0;
        for (int64_t slot = 0; slot < num_topk; ++slot) {
          const int32_t row = row_of[wire_row * num_topk + slot];
          if (row >= 0) {
            row_weight[n] = weight ? weight[row] : 1.0;
            rows[n++] = in + row * stride;
          }
        }
        sum_into(out(wire_row), rows.data(), weight ? row_weight.data() : nullptr, n, hidden);
      }
    });
  });
}

void sum_columns(const RowsOut& tokens, const at::Tensor& wire, const at::Tensor& send_row) {
  const int64_t num_topk = send_row.size(1), hidden = wire.size(1), stride = wire.stride(0);
  const auto* row_of_slot = read<int32_t>(send_row);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, wire.scalar_type(), "ep::combine", [&] {
    const auto* in = read<scalar_t>(wire);
    const RowWriter<scalar_t> out(tokens);
    at::parallel_for(0, send_row.size(0), grain_for(row_bytes(wire)), [&](int64_t begin, int64_t end) {
      std::vector<int32_t> index(num_topk);
      std::vector<const scalar_t*> rows(num_topk);
      for (int64_t token = begin; token < end; ++token) {
        const int n = distinct(row_of_slot + token * num_topk, num_topk, index);
        for (int i = 0; i < n; ++i) {
          rows[i] = in + index[i] * stride;
        }
        sum_into<scalar_t>(out(token), rows.data(), nullptr, n, hidden);
      }
    });
  });
}

const PermuteKernels cpu_kernels{
    .plan_send = plan_send,
    .plan_recv = plan_recv,
    .check_send_row = check_send_row,
    .check_recv_pair = check_recv_pair,
    .pack_rows = pack_rows,
    .pack_slots = pack_slots,
    .expand_rows = expand_rows,
    .expand_slots = expand_slots,
    .reduce_rows = reduce_rows,
    .return_slots = return_slots,
    .sum_rows = sum_rows,
    .gather_slots = gather_slots,
};

}  // namespace ep
