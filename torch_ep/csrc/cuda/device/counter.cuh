// Where a row of ep::low_latency_dispatch belongs among those of its source and expert.
#pragma once

#include "low_latency_receive.cuh"

namespace ep::cuda {

// Of the last kWarps of a block: counts, for the slots of a token, the rows of the tokens before it that go to the same
// expert. The last warp leads.
template <int kWarps>
class RowCounter {
 public:
  // `slots`: of shared memory, a byte of each expert.
  __device__
  RowCounter(const LowLatencyDispatchArgs& args, const LowLatencyShape& shape, const Entries& entries, uint8_t* slots)
      : a_(args), shape_(shape), entries_(entries), slots_(slots) {
    if (leads()) {
#pragma unroll 1
      for (int i = lane_id() * 4; i < a_.num_experts; i += kWarp * 4) {
        *reinterpret_cast<uint32_t*>(slots_ + i) = 0;
      }
    }
  }

  __device__ static bool leads() { return warp_id() == kDispatchWarps - 1; }
  __device__ static bool counts() { return warp_id() >= kDispatchWarps - kWarps; }

  // Asks for the first entries of those before a token's.
  __device__ void load(int token, int begin = 0) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = begin + j * kCounters + static_cast<int>(threadIdx.x) % kCounters;
      ahead_[j] = i < token * a_.num_topk ? entries_[i] : -1;
    }
  }

  // Of the leader. `expert`: of the lane's slot, negative if none.
  __device__ void begin(int expert) {
    counted()[lane_id()] = 0;
    if (expert >= 0) {
      slots_[expert] = static_cast<uint8_t>(1 + lane_id());
    }
  }

  __device__ static void sync() {
    if constexpr (kWarps == kDispatchWarps) {
      __syncthreads();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(1), "n"(kCounters) : "memory");
    }
  }

  // After `load`, and a `sync` after `begin`; a `sync` comes next.
  __device__ void count(int token) {
#pragma unroll 1
    for (int begin = 0; begin < token * a_.num_topk; begin += kAhead * kCounters) {
      if (begin != 0) {
        load(token, begin);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const bool is_expert = ahead_[j] >= 0 && ahead_[j] < a_.num_experts;
        const int slot = is_expert ? slots_[ahead_[j]] : 0;
        if (__any_sync(kFullWarp, slot != 0)) {
          const int i = begin + j * kCounters + static_cast<int>(threadIdx.x) % kCounters;
          if (!repeats(i, ahead_[j]) && slot != 0) {
            atomicAdd(&counted()[slot - 1], 1);
          }
        }
      }
    }
  }

  // Of the leader: of the lane's slot.
  __device__ int end(int expert) const {
    if (expert >= 0) {
      slots_[expert] = 0;
    }
    return counted()[lane_id()];
  }

 private:
  static constexpr int kCounters = kWarps * kWarp;
  static constexpr int kAhead = 4;

  // Of a whole warp, whose lanes have consecutive entries: whether the i-th is that of an earlier slot of its token
  // too, which is an error, and counts as none. Looked for among what is at hand: loads would take as long as all the
  // rest.
  __device__ bool repeats(int i, int entry) const {
    const int lane = lane_id(), slot = i - shape_.by_topk.quotient(i) * a_.num_topk;
    bool found = false;
#pragma unroll 1
    for (int back = 1; back < a_.num_topk; ++back) {
      const int earlier = __shfl_up_sync(kFullWarp, entry, back);
      found = found || (back <= slot && back <= lane && earlier == entry);
    }
#pragma unroll 1
    for (int back = lane + 1; back <= slot; ++back) {  // what the warp before has
      found = found || entries_[i - back] == entry;
    }
    return found;
  }

  __device__ static int* counted() {
    __shared__ int of_slots[kMaxTopk];
    return of_slots;
  }

  const LowLatencyDispatchArgs& a_;
  const LowLatencyShape& shape_;
  const Entries& entries_;
  uint8_t* slots_;
  int ahead_[kAhead];
};

}  // namespace ep::cuda
