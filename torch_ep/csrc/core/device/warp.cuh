// Indices of a thread's warp and lane.
#pragma once

#include <cstdint>

namespace ep {

constexpr uint32_t kFullWarp = 0xffffffff;
constexpr int kWarp = 32;

__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

__device__ __forceinline__ int warp_id() {
  return static_cast<int>(threadIdx.x) / kWarp;
}

}  // namespace ep
