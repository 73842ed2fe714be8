// Values that a warp keeps per rank, and sets of ranks.
//
// Note [Ranks and lanes]
// Lane l of a warp holds the values of ranks l, l + 32, and so on: rank r is in lane r % 32, at step r / 32. Loops over
// steps are unrolled. Up to 32 ranks there is one step, which takes one register per lane and value.
#pragma once

#include "core/device/warp.cuh"
#include "nvlink/layout.h"

namespace ep::nvlink {

// The rank of this lane at a step. A value >= world_size is no rank.
__device__ __forceinline__ int rank_at(int step) {
  return step * kWarp + lane_id();
}

// Note [Peers in turn]
// If all ranks send to one rank at once, they share that rank's links while the other links idle. So no two ranks begin
// with the same peer, and neither do all warps of one rank. A warp's bulk copies are issued in the order of its lanes:
// the first lane has rank `turn`, the next one rank `turn` + 1, and so on. Lanes beyond the last rank have none.
__device__ __forceinline__ int rank_in_turn(int step, int turn, int world_size) {
  const int rank = rank_at(step);
  return rank < world_size ? (rank + turn) % world_size : rank;
}

template <class T>
struct PerRank {
  T values[kRankSteps] = {};

  __device__ __forceinline__ T& operator[](int step) { return values[step]; }
  __device__ __forceinline__ const T& operator[](int step) const { return values[step]; }

  // Warp-collective. The value of a rank, which may differ from lane to lane.
  __device__ __forceinline__ T of(int rank) const {
    T value = __shfl_sync(kFullWarp, values[0], rank % kWarp);
#pragma unroll
    for (int step = 1; step < kRankSteps; ++step) {
      const T other = __shfl_sync(kFullWarp, values[step], rank % kWarp);
      value = rank / kWarp == step ? other : value;
    }
    return value;
  }
};

// Warp-collective. The sum of the values of this lane and all lower lanes.
__device__ __forceinline__ int sum_up_to_lane(int value) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, lanes);
    value += lane_id() >= lanes ? below : 0;
  }
  return value;
}

// Warp-collective. Per rank, the sum of the values of this rank and all lower ranks.
__device__ __forceinline__ PerRank<int> sum_up_to_rank(const PerRank<int>& values, int world_size) {
  PerRank<int> sums;
  int before = 0;
#pragma unroll
  for (int step = 0; step < kRankSteps; ++step) {
    int sum = values[step];
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      if (lanes >= world_size) {
        break;
      }
      const int below = __shfl_up_sync(kFullWarp, sum, lanes);
      sum += lane_id() >= lanes ? below : 0;
    }
    sums[step] = before + sum;
    if (step + 1 < kRankSteps) {
      before = __shfl_sync(kFullWarp, sums[step], kWarp - 1);
    }
  }
  return sums;
}

// A bit per rank.
struct RankSet {
  uint32_t words[kRankSteps] = {};

  __device__ __forceinline__ bool has(int rank) const {
    uint32_t word = words[0];
#pragma unroll
    for (int step = 1; step < kRankSteps; ++step) {
      word = rank / kWarp == step ? words[step] : word;
    }
    return (word >> rank % kWarp & 1) != 0;
  }
  __device__ __forceinline__ bool any() const {
    uint32_t all = words[0];
#pragma unroll
    for (int step = 1; step < kRankSteps; ++step) {
      all |= words[step];
    }
    return all != 0;
  }
  // The first rank from `begin` on, or else from 0 on. There has to be one.
  __device__ __forceinline__ int first_from(int begin) const {
    uint32_t word = words[0] & (begin < kWarp ? kFullWarp << begin : 0);
    int base = 0;
#pragma unroll
    for (int step = 1; step < kRankSteps; ++step) {
      const int skipped = max(begin - step * kWarp, 0);
      const uint32_t next = skipped < kWarp ? words[step] & kFullWarp << skipped : 0;
      base = word == 0 ? step * kWarp : base;
      word = word == 0 ? next : word;
    }
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      base = word == 0 ? step * kWarp : base;
      word = word == 0 ? words[step] : word;
    }
    return base + __ffs(static_cast<int>(word)) - 1;
  }
};

}  // namespace ep::nvlink
