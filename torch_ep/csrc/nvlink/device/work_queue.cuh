// A queue from which warps take work as they become free.
#pragma once

#include "core/device/warp.cuh"
#include "nvlink/params.h"

namespace ep::nvlink {

// Warps take items in the order in which they are needed, so no warp is late because of a fixed share.
class WorkQueue {
 public:
  // `queue`: which of State::work_queues.
  __device__ WorkQueue(const Comm& comm, int queue) : counter_(&comm.state->work_queues[queue]) {}

  // Warp-collective. Takes the item that the next call of `next` returns, early enough to hide the latency. This warp
  // then has to process it.
  __device__ void prefetch() {
    if (lane_id() == 0) {
      prefetched_ = atomicAdd(counter_, 1);
    }
    has_prefetched_ = true;
  }
  // Warp-collective. Returns the next item.
  __device__ int64_t next() {
    if (!has_prefetched_) {
      prefetch();
    }
    has_prefetched_ = false;
    return static_cast<int64_t>(__shfl_sync(kFullWarp, prefetched_, 0));
  }

 private:
  uint32_t* counter_;
  uint32_t prefetched_ = 0;
  bool has_prefetched_ = false;
};

}  // namespace ep::nvlink
