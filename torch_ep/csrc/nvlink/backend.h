// The nvlink backend's host entry.
#pragma once

#include "core/backend.h"
#include "nvlink/layout.h"

namespace ep::nvlink {

inline Layout layout_of(int64_t world_size, at::IntArrayRef limits, int64_t num_sms) {
  TORCH_INTERNAL_ASSERT(limits.size() == 5);
  const int64_t hidden = limits[1], num_topk = limits[2];
  return {
      static_cast<int>(world_size),
      static_cast<int>(num_sms),
      static_cast<int>(num_topk),
      static_cast<int>(limits[3]),
      limits[0],
      // A row of two-byte numbers, and weights of any type; wider rows go by columns. Rows that begin within a line of
      // 128 bytes cost a packet more each.
      round_up(round_up(2 * hidden, 16) + 8 * num_topk, 128)};
}

inline LowLatencyLayout low_latency_layout_of(const Layout& layout, at::IntArrayRef limits) {
  const int64_t hidden = limits[1], num_topk = limits[2];
  return {
      round_up(layout.bytes(), 128),
      layout.world_size,
      static_cast<int>(limits[4]),
      layout.num_topk,
      layout.num_local_experts(),
      round_up(round_up(2 * hidden, 16) + kSlotRouteBytes * num_topk, 128)};
}

// Whether the kernels were built for the current device.
bool kernels_run();
std::shared_ptr<Backend> make_nvlink(const NvlinkOptions& options);

}  // namespace ep::nvlink
