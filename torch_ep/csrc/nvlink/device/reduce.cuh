// Sums rows: in float32 (float64 for float64), in the order of the token's slots, without contraction.
#pragma once

#include "core/device/numbers.cuh"
#include "nvlink/device/exchange.cuh"

namespace ep::nvlink {

// Rows are read in pieces of kBatch vectors per lane through a ring in shared memory. The loads in flight there hide
// the latency of device memory. So few warps do not have enough registers for that.
constexpr int kBatch = 4;
constexpr int kPieceVectors = kBatch * kWarp;
constexpr int kPieceBytes = kPieceVectors * 16;

// The terms of a sum, as masks of lanes with one row each. Terms are added in the order of their lanes. One term may be
// the sum of rows of this rank, which are added first, in the order of their lanes, and rounded.
struct Terms {
  uint32_t all;
  uint32_t own;       // the term of this rank: one lane of `all`, or none
  uint32_t own_rows;  // the rows of that term
};

// The rows of `Terms` in the order in which they are loaded; lane i has the i-th. This rank's rows come first, so that
// only their rounded sum is kept while the other terms are added.
template <class Wide>
struct RowList {
  uint64_t row = 0;
  Wide weight{};
  int count = 0;
  int own = 0;     // rows of this rank
  int before = 0;  // terms before this rank's term

  __device__ RowList(const Terms& terms, const char* row_of_lane, Wide weight_of_lane) {
    const auto take = [&](uint32_t lanes) {
      for (; lanes != 0; lanes &= lanes - 1) {
        const int lane = __ffs(static_cast<int>(lanes)) - 1;
        const uint64_t next = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(row_of_lane), lane);
        const Wide next_weight = shuffle(weight_of_lane, lane);
        if (lane_id() == count) {
          row = next;
          weight = next_weight;
        }
        ++count;
      }
    };
    if (terms.own != 0) {
      // fault: combine: rows of the own rank
      take(terms.own_rows);
      own = count;
      before = __popc(terms.all & (terms.own - 1));
    }
    take(terms.all & ~terms.own);
  }
};

// Warp-collective. Adds `terms`, whose rows are at the lanes' addresses `row`. This rank's rows are multiplied by the
// lanes' `weight`. Calls sink(piece, vectors) with this lane's part of each piece of the result.
template <class T, bool weighted, int kDepth, class Sink>
__device__ __forceinline__ void reduce_rows(
    const Terms& terms,
    const char* row,
    typename Vector<T>::Wide weight,
    int vectors,
    char* ring,
    const Sink& sink) {
  using Wide = typename Vector<T>::Wide;
  using Part = uint4[kBatch];
  const RowList<Wide> list(terms, row, weight);
  const int bytes = (vectors - lane_id()) * 16;  // from this lane's first vector of a row on
  const int end = list.count > 0 ? vectors * 16 : 0;
  char* own_ring = ring + lane_id() * 16;  // each lane reads what it copied: no barrier
  int load_row = 0, load_at = 0, loaded = 0, taken = 0;
  const auto after = [](int stage) { return stage + kPieceBytes == kDepth * kPieceBytes ? 0 : stage + kPieceBytes; };
  const auto load_next = [&] {
    if (load_at < end) {
      const char* from =
          reinterpret_cast<const char*>(__shfl_sync(kFullWarp, list.row, load_row)) + lane_id() * 16 + load_at;
      char* to = own_ring + loaded;
      const int left = bytes - load_at;
      static_assert(kBatch == 4);
      copy_async_if<0 * kWarp * 16>(left > 0 * kWarp * 16, to, from);
      copy_async_if<1 * kWarp * 16>(left > 1 * kWarp * 16, to, from);
      copy_async_if<2 * kWarp * 16>(left > 2 * kWarp * 16, to, from);
      copy_async_if<3 * kWarp * 16>(left > 3 * kWarp * 16, to, from);
      loaded = after(loaded);
      if (++load_row == list.count) {
        load_row = 0;
        load_at += kPieceBytes;
      }
    }
    copy_commit();
  };
  const auto take = [&](Part& part) {
    // fault: combine: rows read before they arrive
    copy_wait<kDepth - 1>();
    const char* stage = own_ring + taken;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      part[b] = *reinterpret_cast<const uint4*>(stage + b * kWarp * 16);
    }
    taken = after(taken);
    load_next();
  };
  const auto add_rows = [&](Sum<T>(&sum)[kBatch], int rows) {
    for (int i = 0; i < rows; ++i) {
      Part part;
      take(part);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        sum[b].template add_term<false>(part[b], 1);
      }
    }
  };
  const auto sum_own = [&](Part& result) {
    Sum<T> own[kBatch];
    for (int i = 0; i < list.own; ++i) {
      const Wide w = weighted ? shuffle(list.weight, i) : Wide{1};
      Part part;
      take(part);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        own[b].template add_term<weighted>(part[b], w);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      result[b] = own[b].rounded();
    }
  };

  __syncwarp();
  for (int i = 0; i < kDepth; ++i) {
    load_next();
  }
  const int others = list.count - list.own;
  // A single row is copied unchanged.
  const bool is_single_row = list.count == 1 && __popc(terms.all) == 1 && !(weighted && list.own != 0);
  for (int piece = 0; piece * kPieceVectors < vectors; ++piece) {
    Part part = {};
    if (is_single_row) {
      take(part);
    } else {
      if (list.own != 0) {
        sum_own(part);
      }
      if (others != 0) {
        Sum<T> total[kBatch];
        add_rows(total, list.before);
        if (terms.own != 0) {  // zero if it has no row
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            total[b].template add_term<false>(part[b], 1);
          }
        }
        add_rows(total, others - list.before);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          part[b] = total[b].rounded();
        }
      }
    }
    sink(piece, part);
  }
  copy_wait<0>();
}

}  // namespace ep::nvlink
