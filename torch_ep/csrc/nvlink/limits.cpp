// What the limits of torch_ep.init mean for the nvlink backend. Part of every build: init explains its choice without
// CUDA as well.
#include "nvlink/limits.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <utility>

namespace ep::nvlink {
namespace {

// Bytes of symmetric memory per rank.
int64_t symmetric_bytes(
    int64_t world_size,
    int64_t max_tokens_per_rank,
    int64_t hidden,
    int64_t num_topk,
    int64_t num_experts,
    int64_t low_latency_tokens,
    int64_t num_sms) {
  // Within these bounds the number of bytes does not overflow.
  constexpr int64_t kMost = int64_t{1} << 24;
  const std::array<std::pair<const char*, int64_t>, 5> limits{
      {{"max_tokens_per_rank", max_tokens_per_rank},
       {"hidden", hidden},
       {"num_topk", num_topk},
       {"num_experts", num_experts},
       {"low_latency_tokens", low_latency_tokens}}};
  for (const auto& [name, limit] : limits) {
    TORCH_CHECK_VALUE(
        limit <= kMost, "torch_ep.init: expected ", name, " of at most ", kMost, " on backend nvlink, got ", limit);
  }
  const Limits all{max_tokens_per_rank, hidden, num_topk, num_experts, low_latency_tokens};
  const auto layout = layout_of(world_size, all, num_sms);
  return layout.bytes() + low_latency_layout_of(layout, all).bytes();
}

int64_t max_experts(int64_t world_size) {
  return most_experts(world_size);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ep, m) {
  m.def("_nvlink_most_experts(int world_size) -> int", &max_experts);
  m.def(
      "_nvlink_bytes(int world_size, *, int max_tokens_per_rank, int hidden, int num_topk, int num_experts, "
      "int low_latency_tokens, int num_sms) -> int",
      &symmetric_bytes);
}

}  // namespace ep::nvlink
