// Counts the index of a row of ep::low_latency_dispatch among the rows that its source sends to its expert.
#pragma once

#include "nvlink/device/low_latency_receive.cuh"

namespace ep::nvlink {

// The last kWarps warps of a block count, for each slot of a token, the earlier tokens that go to the same expert. The
// last warp leads. Lane k has slot k.
template <int kWarps>
class RowCounter {
 public:
  // Warp-collective. `slots`: shared memory, a byte per expert.
  __device__ RowCounter(const LowLatencyDispatchArgs& args, const Entries& entries, uint8_t* slots)
      : a_(args), entries_(entries), slots_(slots) {
    if (leads()) {
#pragma unroll 1
      for (int i = lane_id() * 4; i < a_.num_experts; i += kWarp * 4) {
        *reinterpret_cast<uint32_t*>(slots_ + i) = 0;
      }
      __syncwarp();
    }
  }

  __device__ static bool leads() { return warp_id() == kDispatchWarps - 1; }

  // Warp-collective. Loads the first entries of the tokens before `token`.
  __device__ void load(int token) { load(token, 0, 0); }

  // One thread of the leading warp. `expert`: of this lane's slot, negative if none.
  __device__ void begin(int expert) {
    if (kWarps > 1) {
      counted()[lane_id()] = 0;
    }
    if (expert >= 0) {
      slots_[expert] = static_cast<uint8_t>(1 + lane_id());
    }
  }

  // Block-collective if several warps count, else warp-collective.
  __device__ static void sync() {
    if (kWarps > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Warp-collective, in all counting warps. Requires `load`, and a `sync` after `begin`. A `sync` has to follow.
  __device__ void count(int token) {
    const int lane = lane_id();
    count_ = 0;
#pragma unroll 1
    for (int first = 0; first + first_of_warp() < token; first += kWarps * kWarp) {
      uint32_t visited = 0;  // a bit per slot; a single bit for an expert that a token has twice
#pragma unroll 1
      for (int slot = 0; slot < a_.num_topk; slot += kAhead) {
        if (first != 0 || slot != 0) {
          load(token, first, slot);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int expert = ahead_[j].value();
          const int same = expert >= 0 && expert < a_.num_experts ? slots_[expert] : 0;
          // fault: low latency: doubled expert
          visited |= same != 0 ? 1U << (same - 1) : 0;
        }
      }
#pragma unroll 1
      for (uint32_t any = __reduce_or_sync(kFullWarp, visited); any != 0; any &= any - 1) {
        const int slot = __ffs(static_cast<int>(any)) - 1;
        const int tokens = __popc(__ballot_sync(kFullWarp, (visited >> slot & 1) != 0));
        count_ += slot == lane ? tokens : 0;
      }
    }
    if (kWarps > 1 && count_ != 0) {
      atomicAdd(&counted()[lane], count_);
    }
  }

  // One thread of the leading warp. The index for this lane's slot.
  __device__ int end(int expert) const {
    if (expert >= 0) {
      slots_[expert] = 0;
    }
    return kWarps > 1 ? counted()[lane_id()] : count_;
  }

 private:
  static constexpr int kAhead = 8;

  __device__ static int first_of_warp() { return (warp_id() + kWarps - kDispatchWarps) * kWarp; }

  __device__ void load(int token, int first, int slot) {
    const int t = first + first_of_warp() + lane_id();
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool has = t < token && slot + j < a_.num_topk;
      ahead_[j] = has ? entries_[int64_t{t} * a_.num_topk + slot + j] : Entry{};
    }
  }

  __device__ static int* counted() {
    __shared__ int of_slots[kMaxTopk];
    return of_slots;
  }

  const LowLatencyDispatchArgs& a_;
  const Entries& entries_;
  uint8_t* slots_;
  Entry ahead_[kAhead];
  int count_ = 0;
};

}  // namespace ep::nvlink
