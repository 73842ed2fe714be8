// What every exchange has in common: waits that end, headers, credits, the end of an exchange.
//
// Note [Signals]
// A word in symmetric memory has one writer and one reader and holds an epoch, which only grows: exchanges are counted,
// on the device, and every rank counts the same. Nothing is cleaned between exchanges. A rank that enters exchange e
//   - writes its header into every peer, and checks theirs: same exchange, same operator, same sizes;
//   - waits, before it writes into the buffer of a peer, until that peer is done with the exchange that used it last
//     (the credit; in steady state it came long ago);
//   - writes rows in chunks, and after each, released at system scope, the chunk's flag with e in its upper half;
//   - when all of its blocks have read what came for it, tells every peer that it is done with e.
#pragma once

#include "core/device/warp.cuh"
#include "nvlink/device/memory.cuh"
#include "nvlink/params.h"

namespace ep::nvlink {

template <class T>
__device__ __forceinline__ volatile T& fresh(T& value) {
  return value;
}

// Asks for the arguments of the launch, each warp for some: one after the other they would be missed one at a time.
template <class Args>
__device__ __forceinline__ void prefetch_arguments(const Args& args) {
  constexpr int kLineWords = 16;
  if (const int word = warp_id() * kLineWords; word * 4 < static_cast<int>(sizeof(Args))) {
    const int value = reinterpret_cast<const int*>(&args)[word];
    asm volatile("" ::"r"(value));
  }
}

// Of a whole block, whose threads are of one mind: another block may fail meanwhile.
__device__ inline bool has_failed(const Comm& comm) {
  return __syncthreads_or(static_cast<int>(fresh(comm.state->failed))) != 0;
}

// One exchange of this rank, as its kernel knows it.
struct Exchange {
  const Comm& comm;
  Op op;
  uint64_t epoch;

  __device__ Exchange(const Comm& c, Op o) : Exchange(c, o, fresh(c.state->epoch) + 1) {}
  __device__ Exchange(const Comm& c, Op o, uint64_t e) : comm(c), op(o), epoch(e) {}
  __device__ const Layout& layout() const { return comm.layout; }
  __device__ int world_size() const { return comm.layout.world_size; }
  __device__ char* own(int64_t offset) const { return comm.buffers[comm.rank] + offset; }
  __device__ char* peer(int rank, int64_t offset) const { return comm.buffers[rank] + offset; }
  __device__ bool is_peer(int rank) const { return rank < world_size() && rank != comm.rank; }
  // The upper half of words that also count.
  __device__ uint64_t tag() const { return epoch << 32; }
  __device__ bool is_tagged(uint64_t word) const { return word >> 32 == (epoch & 0xffffffff); }
};

// Note [Peers in turn]
// What all ranks send to one of them at once shares that one's links, while those of the others are idle. So no two
// ranks begin with the same peer, nor all warps of one. Bulk copies of a warp leave in the order of its lanes: these
// stand for the ranks from the `turn`-th on. Lanes beyond the last rank stand for none.
__device__ inline int rank_of_lane(int turn, int world_size) {
  const int lane = lane_id();
  return lane < world_size ? (lane + turn) % world_size : lane;
}

// What `record` is told, as in Mailbox.
struct FailureCause {
  Failure kind;
  Phase phase;
  int64_t peer, detail, ours, theirs, theirs_epoch;
};

// The first failure of an exchange goes to the host; it is what the next call raises. `recorded`: the epoch of the last
// one of exchanges that are counted as this one is.
__device__ inline void publish_failure(const Exchange& x, const FailureCause& r, uint64_t* recorded) {
  HostReport& host_report = *x.comm.host_report;
  const uint64_t last = atomicMax(reinterpret_cast<unsigned long long*>(recorded), x.epoch);
  if (last < x.epoch && fresh(host_report.kind) == 0) {
    fresh(host_report.op) = static_cast<int64_t>(x.op);
    fresh(host_report.phase) = static_cast<int64_t>(r.phase);
    fresh(host_report.epoch) = static_cast<int64_t>(x.epoch);
    fresh(host_report.peer) = r.peer;
    fresh(host_report.detail) = r.detail;
    fresh(host_report.ours) = r.ours;
    fresh(host_report.theirs) = r.theirs;
    fresh(host_report.theirs_epoch) = r.theirs_epoch;
    __threadfence_system();
    fresh(host_report.kind) = static_cast<int64_t>(r.kind);
  }
}

// What hardly ever happens is out of the way: code that does not run costs the code beside it time, as all of it does
// not fit into the memory for instructions. Arguments are copies, so that what calls it keeps its variables in
// registers.

__device__ __noinline__ inline void publish_failure(Exchange x, FailureCause r) {
  publish_failure(x, r, &x.comm.state->recorded);
}

// Makes every wait of this exchange end.
__device__ inline void abort_exchange(const Exchange& x) {
  fresh(x.comm.state->aborted) = x.epoch;
}

__device__ inline bool is_aborted(const Exchange& x) {
  return fresh(x.comm.state->aborted) == x.epoch;
}

// What `left` holds beside the epoch: that it was left for a mismatch; or 1 + the rank that did not come.
constexpr uint64_t kAbortForMismatch = uint64_t{1} << 63;
constexpr int kAbortMissingShift = 56;
constexpr uint64_t kAbortMissingRank = uint64_t{0x7f} << kAbortMissingShift;

__device__ __noinline__ inline void publish_abort(Exchange x, uint64_t cause) {
  abort_exchange(x);
#pragma unroll 1
  for (int p = 0; p < x.world_size(); ++p) {
    if (p != x.comm.rank) {
      store_release_system(x.peer(p, x.layout().abort_signal(x.comm.rank)), x.epoch | cause);
    }
  }
}

// Every later exchange ends at once, until a reset. The mailbox may still have an earlier failure: the host is told
// that this one came after it.
__device__ inline void stop(const Exchange& x) {
  fresh(x.comm.host_report->stopped) = static_cast<int64_t>(x.epoch);
  __threadfence_system();
  fresh(x.comm.state->failed) = 1;
}

// `missing`: the rank without which this exchange cannot end.
__device__ inline void give_up(const Exchange& x, const FailureCause& r, int missing) {
  publish_failure(x, r);
  stop(x);
  publish_abort(x, static_cast<uint64_t>(missing + 1) << kAbortMissingShift);
}

// A wait that ends: by timeout, because a peer gave up, or because this exchange was aborted.
class Wait {
 public:
  __device__ Wait(const Exchange& x, Phase phase) : x_(x), phase_(phase) {}

  // After a look that found nothing. False: there is no point in looking again.
  __device__ bool keep_waiting(int peer, uint64_t seen) {
    ++polls_;
    if (polls_ % kPollsPerCheck == 0) {
      since_ = check_slowly(x_, phase_, peer, seen, since_);
    }
    return since_ >= 0;
  }

 private:
  static constexpr int kPollsPerCheck = 64;

  // When the first glance was, if `since` is 0; or -1: there is no point in looking again.
  __device__ __noinline__ static int64_t check_slowly(Exchange x, Phase phase, int peer, uint64_t seen, int64_t since) {
    // Headers, and the credits before them, are awaited whatever else is known of the exchange: no rank leaves it
    // before it met all, so every mismatch is found by both of its sides.
    const bool in_handshake = phase == Phase::header || phase == Phase::credit;
    if (is_aborted(x) && !(in_handshake && fresh(x.comm.state->failed) == 0)) {
      return -1;
    }
    const auto now = static_cast<int64_t>(global_timer_ns());
    if (since == 0) {
      since = now;
    }
    if (now - since > x.comm.timeout_ns) {
      give_up(x, {Failure::timeout, phase, peer, 0, 0, static_cast<int64_t>(seen), 0}, peer);
      return -1;
    }
#pragma unroll 1
    for (int p = 0; p < x.world_size(); ++p) {
      const uint64_t signal = p == x.comm.rank ? 0 : load_relaxed_system(x.own(x.layout().abort_signal(p)));
      if ((signal & ~kAbortMissingRank) == x.epoch) {
        const auto missing = static_cast<int>((signal & kAbortMissingRank) >> kAbortMissingShift) - 1;
        give_up(x, {Failure::peer_aborted, phase, p, missing, 0, 0, 0}, missing);
        return -1;
      }
      if (signal == (x.epoch | kAbortForMismatch) && !in_handshake) {
        fresh(x.comm.state->mismatched_peer) = p + 1;
        abort_exchange(x);
        return -1;
      }
    }
    return since;
  }

  const Exchange& x_;
  const Phase phase_;
  int64_t since_ = 0;
  uint32_t polls_ = 0;
};

// Of a whole warp: until `ready()` holds on every lane that has `waits` set. False: given up.
template <class Ready>
__device__ bool wait_lanes(const Exchange& x, Phase phase, bool waits, int peer, Ready ready) {
  Wait wait(x, phase);
  bool going = true;
  while (waits && going) {
    if (ready()) {
      break;
    }
    going = wait.keep_waiting(peer, 0);
  }
  going = __all_sync(kFullWarp, going);
  __syncwarp();  // what one lane acquired is there for all
  return going;
}

// Of a whole warp: lane p until peer p is done with the exchange `last`, in which its buffer was written before.
__device__ inline bool wait_for_credits(const Exchange& x, uint64_t last) {
  const int p = lane_id();
  const auto has_credit = [&] {
    // fault: rows written without a credit
    return load_acquire_system(x.own(x.layout().done(p))) >= last;
  };
  const bool may = wait_lanes(x, Phase::credit, x.is_peer(p), p, has_credit);
  fence_async_global();  // between the credit and the bulk copies that it allows
  return may;
}

__device__ inline bool wait_for_gate(const Exchange& x, uint32_t arrivals) {
  return wait_lanes(
      x, Phase::gate, true, x.comm.rank, [&] { return load_acquire_device(&x.comm.state->gate) >= arrivals; });
}

__device__ inline const Header* header_of_lane(const Exchange& x) {
  const Layout& layout = x.layout();
  return reinterpret_cast<const Header*>(
      x.own(layout.header(static_cast<int>(x.epoch % 2), lane_id() % layout.world_size)));
}

__device__ inline bool wait_for_headers(const Exchange& x) {
  const int p = lane_id();
  const Header* header = header_of_lane(x);
  return wait_lanes(x, Phase::header, x.is_peer(p), p, [&] { return load_acquire_system(&header->epoch) >= x.epoch; });
}

// Of one whole warp: lane p tells peer p that this rank has entered the exchange.
__device__ inline void publish_handshake(
    const Exchange& x,
    const int64_t* agreed,
    int64_t rows_to_lane,
    int64_t rows_from_lane,
    int64_t chunks = 0) {
  const int p = lane_id();
  if (x.is_peer(p)) {
    auto* theirs = reinterpret_cast<Header*>(x.peer(p, x.layout().header(static_cast<int>(x.epoch % 2), x.comm.rank)));
    store_relaxed_system(&theirs->op, static_cast<uint64_t>(x.op));
    for (int i = 0; i < kNumAgreed; ++i) {
      store_relaxed_system(&theirs->agreed[i], static_cast<uint64_t>(agreed[i]));
    }
    store_relaxed_system(&theirs->rows_to_you, static_cast<uint64_t>(rows_to_lane));
    store_relaxed_system(&theirs->rows_from_you, static_cast<uint64_t>(rows_from_lane));
    store_relaxed_system(&theirs->chunks, static_cast<uint64_t>(chunks));
    store_release_system(&theirs->epoch, x.epoch);
  }
}

// Of one whole warp: lane p checks that peer p entered the same.
__device__ inline bool
check_handshake(const Exchange& x, const int64_t* agreed, int64_t rows_to_lane, int64_t rows_from_lane) {
  const int p = lane_id();
  const bool is_peer = x.is_peer(p);
  const Header* header = header_of_lane(x);
  if (!wait_for_headers(x)) {
    return false;
  }
  bool same = true;
  if (is_peer) {
    // The first word that differs. Rows are compared only where both sides know them: within one operator, all or none
    // do.
    int64_t detail = 0, ours = 0, theirs = 0;
    const auto compare = [&](int64_t n, int64_t own, const int64_t* word) {
      const auto other = static_cast<int64_t>(load_relaxed_system(word));
      if (same && own != other) {
        same = false;
        detail = n;
        ours = own;
        theirs = other;
      }
    };
    compare(0, static_cast<int64_t>(x.op), &header->op);
    for (int i = 0; i < kNumAgreed; ++i) {
      compare(1 + i, agreed[i], &header->agreed[i]);
    }
    compare(1 + kNumAgreed, rows_to_lane, &header->rows_from_you);
    compare(2 + kNumAgreed, rows_from_lane, &header->rows_to_you);
    if (!same) {
      publish_failure(
          x, {Failure::mismatch, Phase::header, p, detail, ours, theirs, static_cast<int64_t>(header->epoch)});
    }
  }
  if (!__all_sync(kFullWarp, same)) {
    if (p == 0) {
      publish_abort(x, kAbortForMismatch);  // also those that agree with this rank may wait for what does not come
    }
    __syncwarp();
    return false;
  }
  return true;
}

__device__ inline bool
handshake(const Exchange& x, const int64_t* agreed, int64_t rows_to_lane, int64_t rows_from_lane, int64_t chunks = 0) {
  publish_handshake(x, agreed, rows_to_lane, rows_from_lane, chunks);
  return check_handshake(x, agreed, rows_to_lane, rows_from_lane);
}

// Of a whole block, at the end: the last block ends the exchange. `last_use`: of the peers' buffer that was written.
__device__ inline void end_exchange(const Exchange& x, uint64_t* last_use) {
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  State& state = *x.comm.state;
  if (fetch_add_acq_rel_device(&state.blocks_done, 1) != gridDim.x - 1) {
    return;
  }
  if (fresh(state.failed) != 0) {
    return;  // a reset has to put things in order
  }
  if (const uint32_t peer = fresh(state.mismatched_peer); peer != 0) {
    state.mismatched_peer = 0;
    publish_failure(
        x, {Failure::mismatch_of_peer, Phase::rows, peer - 1, 0, 0, 0, 0});  // unless it is between us and a peer
  }
  state.blocks_done = 0;
  state.gate = 0;
  state.work_queues[0] = state.work_queues[1] = 0;
#pragma unroll
  for (uint32_t& chunks : state.chunks) {
    chunks = 0;
  }
  *last_use = x.epoch;
  // fault: skipped epoch
  state.epoch = x.epoch;
  fence_system();
#pragma unroll 1
  for (int p = 0; p < x.world_size(); ++p) {
    if (p != x.comm.rank) {
      store_relaxed_system(x.peer(p, x.layout().done(x.comm.rank)), x.epoch);
    }
  }
}

// Work that warps take as they get to it, in the order in which it is to be done: so none is late because of its share.
class WorkQueue {
 public:
  __device__ WorkQueue(const Exchange& x, int kind) : counter_(&x.comm.state->work_queues[kind]) {}
  // Draws the ticket that the next `next` returns: early, so that its latency passes meanwhile. What it stands for is
  // then this warp's to do.
  __device__ void prefetch() {
    if (lane_id() == 0) {
      prefetched_ = atomicAdd(counter_, 1);
    }
    has_prefetched_ = true;
  }
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

// Of a whole warp: the sum of what this lane and those below it have, for each of the first kLanes lanes.
template <int kLanes>
__device__ __forceinline__ int sum_up_to_lane(int n) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int below = __shfl_up_sync(kFullWarp, n, step);
    n += lane_id() >= step ? below : 0;
  }
  return n;
}

// Rows that go to, or come from, each rank: lane r has those of rank r, counted from the first row of rank 0.
struct WireRows {
  int begin, end;
  __device__ int count() const { return end - begin; }
};

__device__ inline WireRows wire_rows(const Exchange& x, const int32_t* counts) {
  const int lane = lane_id();
  const auto most = static_cast<int>(x.layout().max_tokens);
  const int count = lane < x.world_size() ? min(max(counts[lane], 0), most) : 0;
  const int end = sum_up_to_lane<kMaxRanks>(count);
  return {end - count, end};
}

}  // namespace ep::nvlink
