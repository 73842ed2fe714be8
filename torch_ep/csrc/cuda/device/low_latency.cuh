// What both low-latency exchanges have in common: numbers, credits, waits, ends.
//
// Note [Two on their way]
// Exchanges of one kind are numbered, on the device, and every rank numbers the same. The n-th uses half n % 2 of the
// buffers. A rank sends once its peers are done with what that half held before; so the n-th may leave while the one
// before it is still to be received, and no third. What a rank sends is complete without anything from its peers, so
// that it may be a kernel of its own, and the wait for theirs another one, later. Nothing is cleaned: flags hold the
// number, and only a flag that equals it counts. docs/design.md has the table of signals.
#pragma once

#include "exchange.cuh"

namespace ep::cuda {

// Note [Masked ranks]
// A masked rank is neither written nor awaited; it counts as one that sends nothing. Every rank has a mask of its own.
// Within one exchange all blocks of a rank have to be of one mind about who takes part, since the places of rows follow
// from it: so where a time-out may mask, the first block that has heard a rank, or has waited too long for it, decides
// for all (`decide`). A rank that is masked later, between its announcement and its rows, leaves holes.

constexpr int kDispatchKind = 0, kCombineKind = 1;

enum class Outcome : int { there, absent, failed };

// One exchange, from the point of view of one rank.
class Flight {
 public:
  // `ticket`: of the half that receives alone.
  __device__ Flight(const Comm& comm, int kind, Part part, const int64_t* ticket)
      : state_(comm.state->low_latency[kind]),
        kind_(kind),
        x_(comm,
           kind == kDispatchKind ? Op::low_latency_dispatch : Op::low_latency_combine,
           part == Part::receive ? static_cast<uint64_t>(*ticket) : fresh(state_.sent) + 1) {}

  __device__ const LowLatencyLayout& layout() const { return x_.comm.low_latency; }
  __device__ uint64_t number() const { return x_.epoch; }
  __device__ int half() const { return static_cast<int>(x_.epoch % 2); }
  __device__ int me() const { return x_.comm.rank; }
  __device__ int world_size() const { return layout().world_size; }
  __device__ char* own(int64_t offset) const { return x_.own(offset); }
  __device__ char* peer(int rank, int64_t offset) const { return x_.peer(rank, offset); }

  __device__ bool is_active(int rank) const {
    const State& state = *x_.comm.state;
    return ((fresh(state.masked_by_host) | fresh(state.masked_by_timeout)) >> rank & 1) == 0;
  }

  __device__ void record(const Trouble& trouble) const { ::ep::cuda::record(x_, trouble, &state_.recorded); }

  // Of one thread, until `ready()`.
  template <class Ready>
  __device__ Outcome wait(Phase phase, int peer, Ready ready) const {
    int64_t since = 0;
    for (int looks = 0; !ready(); ++looks) {
      if (looks % kLooksPerGlance != 0) {
        continue;
      }
      const auto now = static_cast<int64_t>(global_timer_ns());
      if (since == 0) {
        since = now;
      }
      if (fresh(x_.comm.state->failed) != 0) {
        return Outcome::failed;
      }
      if (!is_active(peer)) {
        return Outcome::absent;
      }
      if (now - since > x_.comm.timeout_ns) {
        if (x_.comm.masks && peer != me()) {
          atomicOr(&x_.comm.state->masked_by_timeout, 1U << peer);
          return Outcome::absent;
        }
        record({Failure::timeout, phase, peer, 0, 0, 0, 0});
        stop(x_);
        return Outcome::failed;
      }
    }
    if (since != 0 && phase != Phase::credit && peer != me()) {
      const uint64_t waited = global_timer_ns() - static_cast<uint64_t>(since);
      atomicMax(reinterpret_cast<unsigned long long*>(&state_.wait_ns[peer]), waited);
    }
    return Outcome::there;
  }

  // Of a whole warp: lane p for peer p. False: failed; else `is_there` says of each lane whether it may go on.
  template <class Ready>
  __device__ bool wait_lanes(Phase phase, bool waits, Ready ready, bool& is_there) const {
    const auto outcome = waits ? wait(phase, lane_id(), ready) : Outcome::absent;
    is_there = outcome == Outcome::there;
    const bool going = __all_sync(kFullWarp, outcome != Outcome::failed) != 0;
    __syncwarp();  // what one lane acquired is there for all
    return going;
  }

  // Of a whole warp: lane p until this half of rank p may be written, if it is to be. The own half first: who has not
  // received what it sent itself is not to blame others.
  __device__ bool wait_for_credits(bool& may_write) const {
    const uint64_t last = fresh(state_.last_use[half()]);
    const int p = lane_id();
    const auto has_read = [&] { return load_acquire_system(own(layout().done(kind_, p))) >= last; };
    const bool is_wanted = p < world_size() && is_active(p);
    may_write = is_wanted && has_read();
    bool going = true;
    if (!__all_sync(kFullWarp, may_write == is_wanted)) {
      bool is_there = false, own_is_there = false;
      going = wait_lanes(Phase::credit, p == me(), has_read, own_is_there);
      going = going && wait_lanes(Phase::credit, is_wanted && p != me(), has_read, is_there);
      may_write = is_there || own_is_there;
    }
    fence_async_global();  // between the credit and the bulk copies that it allows
    return going;
  }

  // Of every thread, before it receives. False: exchanges are received in the order in which they were sent, each once.
  __device__ bool is_next() const {
    const uint64_t next = fresh(state_.received) + 1;
    if (next == number()) {
      return true;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      const auto expected = static_cast<int64_t>(next), got = static_cast<int64_t>(number());
      record({Failure::bad_order, Phase::header, me(), 0, expected, got, 0});
      stop(x_);
    }
    return false;
  }

  // Whether a rank takes part, of which this thread thinks `is_there`: as the first block thought that knew.
  __device__ bool decide(int rank, bool is_there) const {
    if (!x_.comm.masks) {
      return is_there;
    }
    auto* verdict = reinterpret_cast<unsigned long long*>(&state_.verdict[half()][rank]);
    unsigned long long seen = fresh(*verdict);
    while (seen >> 1 != number()) {
      const unsigned long long mine = number() << 1 | (is_there ? 1 : 0);
      const unsigned long long found = atomicCAS(verdict, seen, mine);
      seen = found == seen ? mine : found;
    }
    return (seen & 1) != 0;
  }

  // Of a whole block, when it has sent everything. The last one counts the exchange.
  __device__ void end_send(Part part, int64_t* ticket) const {
    if (is_last_block(&state_.blocks_sent)) {
      state_.last_use[half()] = number();
      state_.sent = number();
      if (part == Part::send) {
        *ticket = static_cast<int64_t>(number());
      }
    }
  }

  // Of a whole block, when it has read everything. The last one returns the credit.
  __device__ void end_receive(int64_t* wait_ns) const {
    if (!is_last_block(&state_.blocks_received)) {
      return;
    }
    for (int p = 0; p < world_size(); ++p) {
      wait_ns[p] = static_cast<int64_t>(fresh(state_.wait_ns[p]));
      state_.wait_ns[p] = 0;
    }
    state_.received = number();
    fence_system();
    for (int p = 0; p < world_size(); ++p) {
      if (is_active(p)) {
        store_relaxed_system(peer(p, layout().done(kind_, me())), number());
      }
    }
  }

 private:
  static constexpr int kLooksPerGlance = 64;

  // Of a whole block: one thread of the last one to come here, unless the exchange failed: a reset has to put things in
  // order then.
  __device__ bool is_last_block(uint32_t* blocks) const {
    __syncthreads();
    if (threadIdx.x != 0 || fetch_add_acq_rel_device(blocks, 1) != gridDim.x - 1) {
      return false;
    }
    *blocks = 0;
    return fresh(x_.comm.state->failed) == 0;
  }

  LowLatencyState& state_;
  const int kind_;
  const Exchange x_;
};

// Entries of topk_idx.
struct Entries {
  const void* topk_idx;
  bool wide;
  int num_topk, num_experts;

  // A bad value stays bad.
  __device__ int operator[](int64_t i) const {
    if (!wide) {
      return static_cast<const int32_t*>(topk_idx)[i];
    }
    const int64_t entry = static_cast<const int64_t*>(topk_idx)[i];
    return static_cast<int>(min(max(entry, int64_t{INT32_MIN}), int64_t{INT32_MAX}));
  }

  static constexpr int kGood = -1, kOutside = -2;
  // Of a slot of a token whose entries those are: kGood, kOutside, or the earlier slot that names the same expert.
  __device__ int fault(const int* token, int slot) const {
    const int entry = token[slot];
    if (entry < -1 || entry >= num_experts) {
      return kOutside;
    }
    for (int k = 0; entry >= 0 && k < slot; ++k) {
      if (token[k] == entry) {
        return k;
      }
    }
    return kGood;
  }
};

}  // namespace ep::cuda
