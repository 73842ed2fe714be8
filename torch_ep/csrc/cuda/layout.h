// Where everything is in a rank's symmetric buffer, on the host and on the device: sizes and addresses from one place.
// Every rank has the same layout, so an offset is valid in every peer's buffer. docs/design.md has the table of
// signals.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EP_HOST_DEVICE __host__ __device__
#else
#define EP_HOST_DEVICE
#endif

namespace ep::cuda {

constexpr int kMaxRanks = 8;  // one NVLink host
constexpr int kMaxTopk = 32;  // one lane a slot
// Rows of one rank that can be numbered beside a count in the lower half of a flag.
constexpr int64_t kMaxTokens = int64_t{1} << 24;

EP_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// What a rank tells a peer when it enters an exchange. Two of them, used in turn: a peer may be one exchange ahead, and
// never two, since none ends an exchange before every peer has entered it.
struct alignas(128) Header {
  uint64_t epoch;  // written last
  int64_t op;
  // Everything that has to be the same on both sides, compared word by word.
  int64_t agreed[4];
  int64_t rows_to_you;    // -1: not known when the exchange starts
  int64_t rows_from_you;  // likewise
  int64_t chunks;         // of ep::dispatch: flags that you will get
};
constexpr int kNumAgreed = 4;

struct Layout {
  int world_size;
  int num_blocks;
  int num_topk;
  int num_experts;
  int64_t max_tokens;
  int64_t slot_bytes;  // room of one row on its way, with what travels along; a multiple of 128

  EP_HOST_DEVICE int num_local_experts() const { return num_experts / world_size; }
  // Counts of each local expert, the number of rows, the number of tokens of the whole rank.
  EP_HOST_DEVICE int64_t counts_bytes() const { return round_up((num_local_experts() + 2) * int64_t{4}, 16); }
  EP_HOST_DEVICE int64_t topk_bytes() const { return round_up(max_tokens, 4) * num_topk * 4; }

  EP_HOST_DEVICE int64_t header(int parity, int source) const {
    return (int64_t{parity} * world_size + source) * static_cast<int64_t>(sizeof(Header));
  }
  EP_HOST_DEVICE int64_t done(int source) const { return header(2, 0) + source * int64_t{8}; }
  EP_HOST_DEVICE int64_t left(int source) const { return done(world_size) + source * int64_t{8}; }
  EP_HOST_DEVICE int64_t plan_flag(int source, int block) const {
    return left(world_size) + (int64_t{source} * num_blocks + block) * 8;
  }
  // Rows travel in chunks, each with a flag of its own: written once an exchange, when the chunk is complete.
  EP_HOST_DEVICE int64_t dispatch_flag(int source, int64_t chunk) const {
    return plan_flag(world_size, 0) + (source * max_tokens + chunk) * 8;
  }
  EP_HOST_DEVICE int64_t combine_flag(int source, int64_t chunk) const {
    return dispatch_flag(world_size, 0) + (source * max_tokens + chunk) * 8;
  }
  EP_HOST_DEVICE int64_t signal_bytes() const { return round_up(combine_flag(world_size, 0), 128); }

  EP_HOST_DEVICE int64_t plan_counts(int source, int block) const {
    return signal_bytes() + (int64_t{source} * num_blocks + block) * counts_bytes();
  }
  EP_HOST_DEVICE int64_t plan_topk(int source) const { return plan_counts(world_size, 0) + source * topk_bytes(); }

  // A rank sends itself nothing, so its buffer has rows of the others only.
  EP_HOST_DEVICE int64_t rows_begin() const { return round_up(plan_topk(world_size), 128); }
  EP_HOST_DEVICE int64_t rows_bytes() const { return (world_size - 1) * max_tokens * slot_bytes; }
  EP_HOST_DEVICE int64_t dispatch_rows(int source, int reader) const {
    return rows_begin() + (source - (source > reader)) * max_tokens * slot_bytes;
  }
  EP_HOST_DEVICE int64_t combine_rows(int source, int reader) const {
    return rows_bytes() + dispatch_rows(source, reader);
  }
  EP_HOST_DEVICE int64_t bytes() const { return rows_begin() + 2 * rows_bytes(); }
};

}  // namespace ep::cuda
