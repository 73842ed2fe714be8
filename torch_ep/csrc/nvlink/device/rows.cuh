// How ep::dispatch and ep::combine find, stage and copy wire rows.
#pragma once

#include "nvlink/device/exchange.cuh"

namespace ep::nvlink {

// Note [Blocks that send]
// A thread block either sends or receives. While the links are full, an SM's copies to peers delay all later copies of
// that SM. With senders and receivers in one block, the receivers fell behind, and more so the more was sent.

// One thread. Reports an index of the plan that is not in [-1, bound), or out of order.
__device__ inline void publish_bad_index(const Exchange& x, Failure kind, int64_t bound, int64_t index) {
  FailureCause cause{kind, Phase::rows, x.comm.rank};
  cause.ours = bound;
  cause.theirs = index;
  publish_failure(x, cause);
}

// How ep::dispatch divides its thread blocks, and their shared memory among warps.
struct DispatchShape {
  int send_blocks;
  int warps;   // per block
  int stages;  // per warp
  int stage_bytes;
  int chunk_tokens;
};

// Shared memory of a thread block on sm_90 (CUDA C++ Programming Guide, table of compute capabilities: 227 KB), less
// the barriers.
constexpr int kStageMemory = 227 * 1024 - 1024;

// The stages of one warp, used one after another. Each has a barrier for its loads.
class Ring {
 public:
  __device__ Ring(char* stages, uint64_t* barriers, int count, int stage_bytes)
      : stages_(stages), barriers_(barriers), count_(count), bytes_(stage_bytes) {}

  __device__ static Ring of_warp(const DispatchShape& shape) {
    const int warp = warp_id(), warps = shape.warps;
    extern __shared__ __align__(128) char shared[];
    char* stages = shared + static_cast<int64_t>(warp) * shape.stages * shape.stage_bytes;
    auto* barriers =
        reinterpret_cast<uint64_t*>(shared + static_cast<int64_t>(warps) * shape.stages * shape.stage_bytes);
    return {stages, barriers + warp * shape.stages, shape.stages, shape.stage_bytes};
  }

  __device__ void init() const {
    if (lane_id() == 0) {
      // Not unrolled: the unrolled loop was predicated, and compute-sanitizer reported barriers initialized by other
      // lanes too.
#pragma unroll 1
      for (int i = 0; i < count_; ++i) {
        barrier_init(&barriers_[i]);
      }
      fence_barrier_init();
    }
    __syncwarp();
  }

  __device__ int depth() const { return count_; }
  // The stage of the n-th wire row.
  __device__ char* stage(int n) const { return stages_ + n % count_ * bytes_; }
  __device__ uint64_t* barrier(int n) const { return &barriers_[n % count_]; }
  __device__ void wait(int n) const { barrier_wait(barrier(n), n / count_ % 2); }

 private:
  char* stages_;
  uint64_t* barriers_;
  int count_, bytes_;
};

// The wire rows of a token, in the registers of a warp.
struct TokenRows {
  // Lane k, of slot k: the wire row that carries it, its rank, and whether it is the first slot of that row.
  int row;  // counted within the rows of that rank; -1: none
  int rank;
  bool first;
  // Per rank: the row to it, or -1.
  PerRank<int> row_to;
};

// Warp-collective. Lane k has the token's entry k of send_row. A bad entry is reported, and ignored.
__device__ inline TokenRows find_rows(const Exchange& x, int entry, const WireRows& out) {
  const int lane = lane_id();
  TokenRows token{-1, 0, false, {}};
  uint32_t of_slot = 0;       // slots of the same rank as this lane's
  PerRank<uint32_t> of_rank;  // slots of each rank
#pragma unroll 2
  for (int r = 0; r < x.world_size(); ++r) {
    const int begin = out.begin.of(r), end = out.end.of(r);
    const bool is_here = entry >= begin && entry < end;
    const uint32_t slots = __ballot_sync(kFullWarp, is_here);
    if (is_here) {
      token.row = entry - begin;
      token.rank = r;
      of_slot = slots;
    }
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      of_rank[step] = rank_at(step) == r ? slots : of_rank[step];
    }
  }
  token.first = __ffs(static_cast<int>(of_slot)) - 1 == lane;
#pragma unroll
  for (int step = 0; step < kRankSteps; ++step) {
    const uint32_t slots = of_rank[step];
    const int row = __shfl_sync(kFullWarp, token.row, slots != 0 ? __ffs(static_cast<int>(slots)) - 1 : 0);
    token.row_to[step] = slots != 0 ? row : -1;
  }
  const int total = out.end.of(x.world_size() - 1);
  if (entry != -1 && token.row < 0) {
    publish_bad_index(x, Failure::bad_send_row, total, entry);
  }
  return token;
}

// Warp-collective. Writes this warp's share of rows_of, the inverse of recv_pair.
__device__ inline void
invert_recv_pair(const Exchange& x, const PlanView& plan, int64_t received, int warp, int warps) {
  const int64_t pairs = received * plan.num_topk;
  for (int64_t row = int64_t{warp} * kWarp + lane_id(); row < plan.rows; row += int64_t{warps} * kWarp) {
    const int pair = plan.recv_pair[row];
    if (pair >= 0 && pair < pairs) {
      x.comm.rows_of[pair] = x.tag() | static_cast<uint64_t>(row);
    } else if (pair != -1) {
      publish_bad_index(x, Failure::bad_recv_pair, pairs, pair);
    }
  }
  __syncwarp();
  if (lane_id() == 0) {
    __threadfence();
    add_release_device(&x.comm.state->gate, 1);
  }
}

// One thread. expert_major: the row of this lane's slot of a received wire row, or -1.
__device__ inline int64_t row_of_slot(const Exchange& x, const PlanView& plan, int64_t wire_row) {
  const int k = lane_id();
  if (k >= plan.num_topk) {
    return -1;
  }
  const uint64_t entry = as_volatile(x.comm.rows_of[wire_row * plan.num_topk + k]);
  return x.is_tagged(entry) ? static_cast<int64_t>(entry & 0xffffffff) : -1;
}

// Warp-collective. Copies a few bytes of any alignment. Not inlined, since there are many calls.
__device__ __noinline__ inline void copy_bytes(char* to, const char* from, int bytes) {
  const auto alignment =
      reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes);
  if (alignment % 4 == 0) {
    for (int i = lane_id() * 4; i < bytes; i += kWarp * 4) {
      *reinterpret_cast<uint32_t*>(to + i) = *reinterpret_cast<const uint32_t*>(from + i);
    }
  } else {
#pragma unroll 1
    for (int i = lane_id(); i < bytes; i += kWarp) {
      to[i] = from[i];
    }
  }
}

// Warp-collective. Zeros bytes of any alignment.
__device__ __noinline__ inline void zero_bytes(char* to, int64_t bytes) {
  const auto alignment = reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes);
  if (alignment % 16 == 0) {
    for (int64_t i = lane_id() * 16; i < bytes; i += kWarp * 16) {
      *reinterpret_cast<uint4*>(to + i) = {0, 0, 0, 0};
    }
  } else {
#pragma unroll 1
    for (int64_t i = lane_id(); i < bytes; i += kWarp) {
      to[i] = 0;
    }
  }
}

// One thread. Copies one weight of 2, 4 or 8 bytes.
__device__ inline void copy_weight(char* to, const char* from, int bytes) {
  if (bytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  } else if (bytes == 8) {
    *reinterpret_cast<uint64_t*>(to) = *reinterpret_cast<const uint64_t*>(from);
  } else {
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  }
}

// One thread.
__device__ inline void zero_weight(char* to, int bytes) {
  const uint64_t zero = 0;
  copy_weight(to, reinterpret_cast<const char*>(&zero), bytes);
}

}  // namespace ep::nvlink
