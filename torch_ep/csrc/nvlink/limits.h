// The limits of torch_ep.init that size the symmetric buffer of the nvlink backend.
#pragma once

#include "nvlink/layout.h"

namespace ep::nvlink {

struct Limits {
  int64_t max_tokens_per_rank, hidden, num_topk, num_experts;
  int64_t low_latency_tokens;  // 0: no low-latency pair
};

inline Layout layout_of(int64_t world_size, const Limits& limits, int64_t num_sms) {
  return {
      static_cast<int>(world_size),
      static_cast<int>(num_sms),
      static_cast<int>(limits.num_topk),
      static_cast<int>(limits.num_experts),
      limits.max_tokens_per_rank,
      // A row of two-byte numbers, and weights of any type. Wider rows are sent by columns. A row that does not begin
      // at a line of 128 bytes costs one more packet.
      round_up(round_up(2 * limits.hidden, 16) + 8 * limits.num_topk, 128)};
}

inline LowLatencyLayout low_latency_layout_of(const Layout& layout, const Limits& limits) {
  return {
      round_up(layout.bytes(), 128),
      layout.world_size,
      static_cast<int>(limits.low_latency_tokens),
      layout.num_topk,
      layout.num_local_experts(),
      round_up(round_up(2 * limits.hidden, 16) + kSlotRouteBytes * limits.num_topk, 128)};
}

}  // namespace ep::nvlink
