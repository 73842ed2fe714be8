// Permutes (dispatch) and unpermutes (combine) the rows of one rank, each in one pass over the rows, on all SMs.
//
// Each warp handles a piece of one item's row, kBatch vectors per lane. Permute reads the piece once and writes it to
// every row of the item; unpermute reads the piece of every row and writes the sum.
//
// Note [Inverse of recv_pair]
// recv_pair maps rows to (wire row, slot) pairs; these kernels need the inverse. A kernel before them writes
// row_of[recv_pair[row]] = row into uninitialized memory, so an entry is valid only if recv_pair confirms it:
// recv_pair[row_of[pair]] == pair. (P. Briggs and L. Torczon, "An Efficient Representation for Sparse Sets", 1993.)
// This test also makes every plan safe: no entry points outside the rows. If an edited plan names a pair in several
// rows, one of them is used.
#include "local/permute_kernels.h"

#include "core/device/launch.cuh"
#include "core/device/numbers.cuh"
#include "core/integer_math.h"

#include <algorithm>

namespace ep {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kInvertThreads = 256;
// Minimum blocks of unpermute per SM. Without this number, the compiler spills registers to fit one block more.
constexpr int kUnpermuteBlocks = 6;

// One thread.
__device__ void report_bad_plan(const RowMap& map, PermuteReport::PlanTensor tensor, int64_t bound, int value) {
  if (atomicCAS(map.reporter.claimed, 0U, 1U) == 0) {
    PermuteReport& report = *map.reporter.report;
    report.is_combine = map.is_combine;
    report.tensor = tensor;
    report.bound = bound;
    report.value = value;
    __threadfence_system();
    *const_cast<volatile int64_t*>(&report.kind) = PermuteReport::bad_plan;
  }
}

__device__ __forceinline__ int wire_rows_by(const RowMap& map, const int32_t* count) {
  return count != nullptr ? min(max(*count, 0), map.wire_rows) : map.wire_rows;
}

__global__ void __launch_bounds__(kInvertThreads) fill_row_of(const __grid_constant__ RowMap map) {
  await_kernels_before();
  const int64_t pairs = int64_t{wire_rows_by(map, map.recv_count)} * map.num_topk;
  for (int64_t row = int64_t{blockIdx.x} * kInvertThreads + threadIdx.x; row < map.rows;
       row += int64_t{gridDim.x} * kInvertThreads) {
    const int pair = map.recv_pair[row];
    if (pair >= 0 && pair < pairs) {
      map.row_of[pair] = static_cast<int>(row);
    } else if (pair != -1) {
      report_bad_plan(map, PermuteReport::recv_pair, pairs, pair);
    }
  }
}

// --- the rows of an item ---

// The rows of the result that belong to the item of a warp.
class ItemRows {
 public:
  // Warp-collective. Does not read row_of.
  __device__ ItemRows(const RowMap& map, int item) : map_(map), item_(item), wire_(item) {
    if (map.send_row != nullptr) {
      wire_rows_ = wire_rows_by(map, map.send_count);
      wire_ = map.recv_pair != nullptr ? first_wire_row() : -1;
    }
  }

  // One thread. The entry of row_of for slot k: a row or -1. Without recv_pair, the slots of one wire row share a row.
  __device__ int candidate(int k) const {
    int row = -1;
    if (map_.recv_pair == nullptr) {
      row = k < map_.num_topk ? checked_wire_row(k) : -1;
    } else if (wire_ >= 0 && k < map_.num_topk) {
      row = map_.row_of[pair_of(k)];
    }
    return row < map_.rows ? row : -1;
  }

  // One thread. The candidate of slot k if recv_pair confirms it, or -1.
  __device__ int confirmed(int row, int k) const {
    // fault: permute: unconfirmed pair
    return row >= 0 && (map_.recv_pair == nullptr || map_.recv_pair[row] == pair_of(k)) ? row : -1;
  }

  // One thread. The row of slot k, or -1.
  __device__ int row_of(int k) const { return confirmed(candidate(k), k); }

  // Warp-collective. For the slots from `group` on: the lanes to process, one per row. Each lane has the row of its
  // slot.
  __device__ uint32_t lanes_of(int row, int group) const {
    if (map_.recv_pair != nullptr) {
      return __ballot_sync(kFullWarp, row >= 0);
    }
    const auto same = static_cast<int>(__match_any_sync(kFullWarp, row));
    bool is_first = row >= 0 && __ffs(same) - 1 == lane_id();
    // fault: permute: row with slots in two groups
    for (int k = 0; k < group && is_first; ++k) {
      is_first = checked_wire_row(k) != row;
    }
    return __ballot_sync(kFullWarp, is_first);
  }

 private:
  __device__ int64_t pair_of(int k) const { return int64_t{wire_} * map_.num_topk + k; }

  // One thread.
  __device__ int checked_wire_row(int k) const {
    if (map_.send_row == nullptr) {
      return item_;
    }
    const int row = map_.send_row[int64_t{item_} * map_.num_topk + k];
    if (row >= 0 && row < wire_rows_) {
      return row;
    }
    if (row != -1) {
      report_bad_plan(map_, PermuteReport::send_row, wire_rows_, row);
    }
    return -1;
  }

  // Warp-collective. With one rank, all slots of a token have the same wire row.
  __device__ int first_wire_row() const {
    int found = -1;
    for (int k = 0; k < map_.num_topk; k += kWarp) {
      const int row = k + lane_id() < map_.num_topk ? checked_wire_row(k + lane_id()) : -1;
      const uint32_t lanes = __ballot_sync(kFullWarp, row >= 0);
      if (lanes != 0 && found < 0) {
        found = __shfl_sync(kFullWarp, row, __ffs(static_cast<int>(lanes)) - 1);
      }
    }
    return found;
  }

  const RowMap& map_;
  int item_, wire_rows_ = 0, wire_;
};

// --- weights ---

// One thread.
__device__ void copy_number(char* to, int64_t to_index, const char* from, int64_t from_index, int bytes) {
  if (bytes == 4) {
    reinterpret_cast<uint32_t*>(to)[to_index] = reinterpret_cast<const uint32_t*>(from)[from_index];
  } else if (bytes == 8) {
    reinterpret_cast<uint64_t*>(to)[to_index] = reinterpret_cast<const uint64_t*>(from)[from_index];
  } else if (bytes == 2) {
    reinterpret_cast<uint16_t*>(to)[to_index] = reinterpret_cast<const uint16_t*>(from)[from_index];
  } else {
    to[to_index] = from[from_index];
  }
}

// One thread.
__device__ void zero_number(char* to, int64_t index, int bytes) {
  const uint64_t zero = 0;
  copy_number(to, index, reinterpret_cast<const char*>(&zero), 0, bytes);
}

// Warp-collective. Writes row `row` of out_weights [rows, num_topk]. Only without recv_pair.
__device__ void permute_weights_of_row(const PermuteArgs& a, const ItemRows& rows, int item, int row) {
  const int num_topk = a.map.num_topk;
  for (int k = lane_id(); k < num_topk; k += kWarp) {
    const int64_t to = int64_t{row} * num_topk + k;
    if (rows.row_of(k) == row) {
      copy_number(a.out_weights, to, a.weights, int64_t{item} * num_topk + k, a.weight_bytes);
    } else {
      zero_number(a.out_weights, to, a.weight_bytes);
    }
  }
}

// --- permute ---

// Warp-collective. Zeros this warp's share of the rows without a wire row.
template <class V>
__device__ void zero_padding(const PermuteArgs& a, int vectors, int64_t warp, int64_t warps) {
  const RowMap& map = a.map;
  const int wire_rows = wire_rows_by(map, map.recv_count);
  const int64_t pairs = int64_t{wire_rows} * map.num_topk;
  const int weights = a.out_weights == nullptr ? 0 : map.recv_pair != nullptr ? 1 : map.num_topk;
  // The rows of a warp are far apart, since padding comes in runs.
  for (int64_t first = warp; first < map.rows; first += kWarp * warps) {
    const int64_t own = first + lane_id() * warps;
    bool is_padding = false;
    if (own < map.rows) {
      const int64_t from = map.recv_pair != nullptr ? map.recv_pair[own] : own;
      // fault: permute: padding row
      is_padding = from < 0 || from >= (map.recv_pair != nullptr ? pairs : wire_rows);
    }
    for (uint32_t lanes = __ballot_sync(kFullWarp, is_padding); lanes != 0; lanes &= lanes - 1) {
      const int64_t row = first + (__ffs(static_cast<int>(lanes)) - 1) * warps;
      V* to = reinterpret_cast<V*>(a.out) + row * vectors;
      for (int i = lane_id(); i < vectors; i += kWarp) {
        to[i] = V{};
      }
      for (int k = lane_id(); k < weights; k += kWarp) {
        zero_number(a.out_weights, row * weights + k, a.weight_bytes);
      }
    }
  }
}

// The first blocks zero the padding, for which they do not read row_of.
template <class V, int kBatch>
__global__ void __launch_bounds__(kThreads)
    permute_rows(const __grid_constant__ PermuteArgs a, int vectors, unsigned pieces, unsigned padding_blocks) {
  if (blockIdx.x < padding_blocks) {
    zero_padding<V>(a, vectors, int64_t{blockIdx.x} * kWarps + warp_id(), int64_t{padding_blocks} * kWarps);
    await_kernels_before();
    return;
  }
  const unsigned warp = (blockIdx.x - padding_blocks) * kWarps + static_cast<unsigned>(warp_id());
  const unsigned item = warp / pieces;
  const int first = static_cast<int>(warp - item * pieces) * (kBatch * kWarp) + lane_id();
  if (item >= static_cast<unsigned>(a.map.items)) {
    await_kernels_before();
    return;
  }
  // x and send_row were complete before the kernel that fills row_of began.
  const V* from = reinterpret_cast<const V*>(a.x) + int64_t{item} * vectors + first;
  V piece[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    if (first + b * kWarp < vectors) {
      piece[b] = from[b * kWarp];
    }
  }
  const ItemRows rows(a.map, static_cast<int>(item));
  await_kernels_before();
  const bool has_weights = a.out_weights != nullptr && first == lane_id();
  for (int group = 0; group < a.map.num_topk; group += kWarp) {
    const int k = group + lane_id();
    const int own = rows.row_of(k);
    if (has_weights && a.map.recv_pair != nullptr && own >= 0) {
      copy_number(a.out_weights, own, a.weights, int64_t{item} * a.map.num_topk + k, a.weight_bytes);
    }
    for (uint32_t lanes = rows.lanes_of(own, group); lanes != 0; lanes &= lanes - 1) {
      const int row = __shfl_sync(kFullWarp, own, __ffs(static_cast<int>(lanes)) - 1);
      V* to = reinterpret_cast<V*>(a.out) + int64_t{row} * vectors + first;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * kWarp < vectors) {
          to[b * kWarp] = piece[b];
        }
      }
      if (has_weights && a.map.recv_pair == nullptr) {
        permute_weights_of_row(a, rows, static_cast<int>(item), row);
      }
    }
  }
}

// --- unpermute ---

// The unit in which lanes load rows: 16 bytes, or one number if rows are not aligned to 16 bytes.
template <class T, bool kVectors>
struct Share {
  using Raw = uint4;
  using Accumulator = Sum<T>;
  static constexpr int kNumbers = Vector<T>::kSize;
};

template <class T>
struct ScalarSum {
  using Wide = typename Vector<T>::Wide;
  Wide value = -Wide{0};

  template <bool kWeighted>
  __device__ __forceinline__ void add_term(T number, Wide weight) {
    value = add(value, kWeighted ? multiply(weight, widen(number)) : widen(number));
  }
  __device__ __forceinline__ T rounded() const { return narrow<T>(value); }
};

template <class T>
struct Share<T, false> {
  using Raw = T;
  using Accumulator = ScalarSum<T>;
  static constexpr int kNumbers = 1;
};

template <class T, bool kVectors, bool kWeighted, int kBatch, int kAhead>
__global__ void __launch_bounds__(kThreads, kUnpermuteBlocks)
    unpermute_rows(const __grid_constant__ UnpermuteArgs a, int vectors, unsigned pieces) {
  using Raw = typename Share<T, kVectors>::Raw;
  using Wide = typename Vector<T>::Wide;
  const unsigned warp = blockIdx.x * kWarps + static_cast<unsigned>(warp_id());
  const unsigned item = warp / pieces;
  if (item >= static_cast<unsigned>(a.map.items)) {
    await_kernels_before();
    return;
  }
  const int num_topk = a.map.num_topk;
  const int first = static_cast<int>(warp - item * pieces) * (kBatch * kWarp) + lane_id();
  const ItemRows rows(a.map, static_cast<int>(item));  // send_row was complete before fill_row_of began
  const Raw* const y = reinterpret_cast<const Raw*>(a.y) + first;
  await_kernels_before();

  typename Share<T, kVectors>::Accumulator sum[kBatch];
  int terms = 0, last_row = 0;
  for (int group = 0; group < num_topk; group += kWarp) {
    const int k = group + lane_id();
    const int candidate = rows.candidate(k);
    // This load overlaps the load of recv_pair.
    const Wide own_weight = kWeighted && candidate >= 0 ? static_cast<const Wide*>(a.row_weights)[candidate] : Wide{0};
    const int own = rows.confirmed(candidate, k);
    if (a.out_weights != nullptr && first == lane_id() && k < num_topk) {
      const int64_t to = int64_t{item} * num_topk + k;
      if (own >= 0) {
        const int64_t from = a.map.recv_pair != nullptr ? own : int64_t{own} * num_topk + k;
        copy_number(a.out_weights, to, a.weights, from, a.weight_bytes);
      } else {
        zero_number(a.out_weights, to, a.weight_bytes);
      }
    }
    uint32_t lanes = rows.lanes_of(own, group);
    terms += __popc(lanes);
    while (lanes != 0) {
      Raw raw[kAhead][kBatch];
      uint32_t left = lanes;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (left != 0) {
          last_row = __shfl_sync(kFullWarp, own, __ffs(static_cast<int>(left)) - 1);
          const Raw* from = y + int64_t{last_row} * vectors;
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            raw[j][b] = first + b * kWarp < vectors ? from[b * kWarp] : Raw{};
          }
          left &= left - 1;
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (lanes != 0) {
          const Wide weight = kWeighted ? shuffle(own_weight, __ffs(static_cast<int>(lanes)) - 1) : Wide{1};
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            sum[b].template add_term<kWeighted>(raw[j][b], weight);
          }
          lanes &= lanes - 1;
        }
      }
    }
  }

  Raw* const out = reinterpret_cast<Raw*>(a.out) + int64_t{item} * vectors + first;
  const Raw* const single_row = y + int64_t{last_row} * vectors;
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    if (first + b * kWarp < vectors) {
      // A single row is copied unchanged, NaN included.
      // fault: unpermute: zero of an empty sum
      out[b * kWarp] = terms == 0 ? Raw{} : !kWeighted && terms == 1 ? single_row[b * kWarp] : sum[b].rounded();
    }
  }
}

// --- launches ---

// The largest power of two up to 16 that divides all of these.
int common_alignment(const void* a, const void* b, int64_t bytes) {
  const auto bits =
      reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | static_cast<uintptr_t>(bytes) | 16;
  return static_cast<int>(bits & -bits);
}

// Kernels after fill_row_of start while it still runs.
Launch launch_of(const RowMap& map) {
  return map.recv_pair != nullptr ? Launch::overlapped : Launch::plain;
}

template <class V>
cudaError_t launch_permute(const PermuteArgs& args, cudaStream_t stream) {
  // One H200, bfloat16, 1, 2, 4, 8 vectors per lane: 144.8, 144.2, 146.7, 145.0 us for 4096 x 7168, top-8; 168.2,
  // 168.0, 170.9, 169.7 for 16384 x 2048, top-8; 36.3, 35.0, 34.7, 36.0 for 4096 x 2048, top-6.
  constexpr int kBatch = 2;
  const auto vectors = static_cast<int>(args.row_bytes / static_cast<int64_t>(sizeof(V)));
  const int64_t pieces = std::max<int64_t>(1, ceil_div(vectors, kBatch * kWarp));
  // The fewest blocks that write at full speed: without padding, they only cost time.
  constexpr int64_t kMaxPaddingBlocks = 528;
  const int64_t padding_blocks = std::min(ceil_div(args.map.rows, kThreads), kMaxPaddingBlocks);
  const int64_t blocks = padding_blocks + ceil_div(args.map.items * pieces, kWarps);
  if (blocks == 0) {
    return cudaSuccess;
  }
  return launch_kernel(
      launch_of(args.map),
      permute_rows<V, kBatch>,
      static_cast<int>(blocks),
      kThreads,
      0,
      stream,
      args,
      vectors,
      static_cast<unsigned>(pieces),
      static_cast<unsigned>(padding_blocks));
}

template <class T, bool kVectors, bool kWeighted>
cudaError_t launch_unpermute_of(const UnpermuteArgs& args, cudaStream_t stream) {
  // One H200, bfloat16, weighted, kBatch and kAhead of (1, 8), (2, 2), (2, 4), (2, 8), (4, 4): 146, 134, 133, 143, 134
  // us for 4096 x 7168, top-8; 167, 152, 150, 162, 151 for 16384 x 2048, top-8.
  constexpr int kBatch = 2, kAhead = 4;
  const auto vectors = static_cast<int>(args.hidden / Share<T, kVectors>::kNumbers);
  const int64_t pieces = std::max<int64_t>(1, ceil_div(vectors, kBatch * kWarp));
  return launch_kernel(
      launch_of(args.map),
      unpermute_rows<T, kVectors, kWeighted, kBatch, kAhead>,
      static_cast<int>(ceil_div(args.map.items * pieces, kWarps)),
      kThreads,
      0,
      stream,
      args,
      vectors,
      static_cast<unsigned>(pieces));
}

template <class T>
cudaError_t launch_unpermute(const UnpermuteArgs& args, cudaStream_t stream) {
  const bool vectors = common_alignment(args.y, args.out, args.hidden * static_cast<int64_t>(sizeof(T))) == 16;
  if (args.row_weights != nullptr) {
    return vectors ? launch_unpermute_of<T, true, true>(args, stream)
                   : launch_unpermute_of<T, false, true>(args, stream);
  }
  return vectors ? launch_unpermute_of<T, true, false>(args, stream)
                 : launch_unpermute_of<T, false, false>(args, stream);
}

}  // namespace

cudaError_t launch_invert_recv_pair(const RowMap& map, cudaStream_t stream) {
  const auto blocks = static_cast<int>(std::max<int64_t>(1, ceil_div(map.rows, kInvertThreads)));
  return launch_kernel(Launch::plain, fill_row_of, blocks, kInvertThreads, 0, stream, map);
}

cudaError_t launch_permute_rows(const PermuteArgs& args, cudaStream_t stream) {
  switch (common_alignment(args.x, args.out, args.row_bytes)) {
    case 16:
      return launch_permute<uint4>(args, stream);
    case 8:
      return launch_permute<uint2>(args, stream);
    case 4:
      return launch_permute<uint32_t>(args, stream);
    case 2:
      return launch_permute<uint16_t>(args, stream);
    default:
      return launch_permute<uint8_t>(args, stream);
  }
}

cudaError_t launch_unpermute_rows(const UnpermuteArgs& args, cudaStream_t stream) {
  if (args.map.items == 0) {
    return cudaSuccess;
  }
  switch (args.element) {
    case Element::f64:
      return launch_unpermute<double>(args, stream);
    case Element::f32:
      return launch_unpermute<float>(args, stream);
    case Element::bf16:
      return launch_unpermute<__nv_bfloat16>(args, stream);
    default:
      return launch_unpermute<__half>(args, stream);
  }
}

}  // namespace ep
