// Work that warps take when they are ready for it.
#pragma once

#include "core/device/warp.cuh"
#include "nvlink/params.h"

namespace ep::nvlink {

// Items are taken in the order in which they are wanted, so no warp is late because of a fixed share.
class WorkQueue {
 public:
  // `queue`: which of State::work_queues.
  __device__ WorkQueue(const Comm& comm, int queue) : counter_(&comm.state->work_queues[queue]) {}

  // Warp-collective. Takes the item that the next `next` returns: early, to hide the latency. This warp then has to do
  // it.
  __device__ void prefetch() {
    if (lane_id() == 0) {
      prefetched_ = atomicAdd(counter_, 1);
    }
    has_prefetched_ = true;
  }
  // Warp-collective.
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
