// The common parts of ep::plan, ep::dispatch and ep::combine: waits with a timeout, the handshake, credits, the end of
// an exchange.
//
// Note [Signals]
// A word in symmetric memory has one writer and one reader. It holds an epoch, which only grows: exchanges are counted
// on the device, and every rank counts the same. Nothing is cleared between exchanges. A rank that enters exchange e
//   - publishes its handshake to every peer and checks theirs: same exchange, same operator, same sizes;
//   - waits for a peer's credit before it writes into the peer's buffer: the peer has finished the exchange that used
//     the buffer last. In steady state the credit is already there;
//   - writes rows in chunks. It then writes each chunk's flag, released at system scope, with e in its upper half;
//   - publishes to every peer that it has finished e, once all of its blocks have read the received data.
#pragma once

#include "core/device/warp.cuh"
#include "nvlink/device/memory.cuh"
#include "nvlink/device/peer.cuh"
#include "nvlink/device/ranks.cuh"
#include "nvlink/device/work_queue.cuh"
#include "nvlink/params.h"

namespace ep::nvlink {

// One thread. For a load or store that the compiler neither drops nor repeats.
template <class T>
__device__ __forceinline__ volatile T& as_volatile(T& value) {
  return value;
}

// Block-collective. Loads the kernel's arguments into the cache, some lines per warp: the cache misses overlap.
template <class Args>
__device__ __forceinline__ void prefetch_arguments(const Args& args) {
  constexpr int kLineWords = 16;
  if (const int word = warp_id() * kLineWords; word * 4 < static_cast<int>(sizeof(Args))) {
    const int value = reinterpret_cast<const int*>(&args)[word];
    asm volatile("" ::"r"(value));
  }
}

// Block-collective. Returns the same answer in every thread, although another block may fail meanwhile.
__device__ inline bool has_failed(const Comm& comm) {
  return __syncthreads_or(static_cast<int>(as_volatile(comm.state->failed))) != 0;
}

// One exchange of this rank.
struct Exchange {
  const Comm& comm;
  OpKind op;
  uint64_t epoch;

  __device__ Exchange(const Comm& c, OpKind o) : Exchange(c, o, as_volatile(c.state->epoch) + 1) {}
  __device__ Exchange(const Comm& c, OpKind o, uint64_t e) : comm(c), op(o), epoch(e) {}
  __device__ const Layout& layout() const { return comm.layout; }
  __device__ int world_size() const { return comm.layout.world_size; }
  __device__ Peer peer(int rank) const { return Peer(comm.buffers[rank]); }
  __device__ Inbox inbox() const { return Inbox(comm.buffers[comm.rank]); }
  __device__ bool is_peer(int rank) const { return rank < world_size() && rank != comm.rank; }
  // The upper half of a word whose lower half holds a value.
  __device__ uint64_t tag() const { return epoch << 32; }
  __device__ bool is_tagged(uint64_t word) const { return word >> 32 == (epoch & 0xffffffff); }
};

// A failure for a report: the fields of FailureReport (params.h) that the exchange does not determine.
struct FailureCause {
  Failure kind;
  Phase phase;
  int peer;
  int missing_rank = 0;
  HandshakeField field{};
  int token = 0, slot = 0, earlier_slot = 0;
  int64_t ours = 0, theirs = 0, their_epoch = 0;
};

// One thread. Reports the first failure of an exchange to the host, whose next call raises it. `reported`: the epoch of
// the last reported failure among exchanges with one counter.
__device__ inline void publish_failure(const Exchange& x, const FailureCause& cause, uint64_t* reported) {
  FailureReport& report = x.comm.host_report->failure;
  const uint64_t last = atomicMax(reinterpret_cast<unsigned long long*>(reported), x.epoch);
  if (last < x.epoch && as_volatile(report.kind) == Failure::none) {
    as_volatile(report.op) = x.op;
    as_volatile(report.phase) = cause.phase;
    as_volatile(report.epoch) = static_cast<int64_t>(x.epoch);
    as_volatile(report.peer) = cause.peer;
    as_volatile(report.missing_rank) = cause.missing_rank;
    as_volatile(report.field) = cause.field;
    as_volatile(report.token) = cause.token;
    as_volatile(report.slot) = cause.slot;
    as_volatile(report.earlier_slot) = cause.earlier_slot;
    as_volatile(report.ours) = cause.ours;
    as_volatile(report.theirs) = cause.theirs;
    as_volatile(report.their_epoch) = cause.their_epoch;
    __threadfence_system();
    as_volatile(report.kind) = cause.kind;
  }
}

// Note [Cold paths]
// Functions that rarely run are not inlined: the instruction cache does not hold a whole kernel, and unused code
// between used code costs time. Their arguments are copies, so that the caller keeps its variables in registers.

// One thread. Cold path.
__device__ __noinline__ inline void publish_failure(Exchange x, FailureCause cause) {
  publish_failure(x, cause, &x.comm.state->reported);
}

// One thread. Ends every wait of this exchange on this rank.
__device__ inline void abort_exchange(const Exchange& x) {
  as_volatile(x.comm.state->aborted) = x.epoch;
}

// One thread.
__device__ inline bool is_aborted(const Exchange& x) {
  return as_volatile(x.comm.state->aborted) == x.epoch;
}

// An abort signal: the epoch, and why the exchange was aborted: a mismatch, or 1 + the rank that did not come.
constexpr uint64_t kAbortForMismatch = uint64_t{1} << 63;
constexpr int kAbortMissingShift = 56;
constexpr uint64_t kAbortMissingRank = uint64_t{0x7f} << kAbortMissingShift;
static_assert(kMaxRanks + 1 <= 0x7f);

// One thread. Cold path.
__device__ __noinline__ inline void publish_abort(Exchange x, uint64_t cause) {
  abort_exchange(x);
#pragma unroll 1
  for (int p = 0; p < x.world_size(); ++p) {
    if (p != x.comm.rank) {
      x.peer(p).signal(x.layout().abort_signal(x.comm.rank), x.epoch | cause);
    }
  }
}

// One thread. Makes every later exchange end at once, until a reset. The report may still hold an earlier failure:
// `stopped` shows the host that a fatal one followed.
__device__ inline void stop(const Exchange& x) {
  as_volatile(x.comm.host_report->stopped) = static_cast<int64_t>(x.epoch);
  __threadfence_system();
  as_volatile(x.comm.state->failed) = 1;
}

// One thread. Reports a fatal failure and aborts the exchange. `missing`: the rank without which it cannot end.
__device__ inline void give_up(const Exchange& x, const FailureCause& cause, int missing) {
  publish_failure(x, cause);
  stop(x);
  publish_abort(x, static_cast<uint64_t>(missing + 1) << kAbortMissingShift);
}

// One thread. A wait that ends by timeout, because a peer aborted the exchange, or because this rank did.
class Wait {
 public:
  __device__ Wait(const Exchange& x, Phase phase) : x_(x), phase_(phase) {}

  // Call after a poll without success. False: stop polling.
  __device__ bool keep_waiting(int peer, uint64_t seen) {
    ++polls_;
    if (polls_ % kPollsPerCheck == 0) {
      since_ = check_slowly(x_, phase_, peer, seen, since_);
    }
    return since_ >= 0;
  }

 private:
  static constexpr int kPollsPerCheck = 64;

  // Cold path. Returns the time of the first check, or -1: stop polling. `since`: 0 in the first check.
  __device__ __noinline__ static int64_t check_slowly(Exchange x, Phase phase, int peer, uint64_t seen, int64_t since) {
    // A mismatch ends neither the wait for handshakes nor the wait for credits before it: no rank ends an exchange
    // before it has all handshakes, so both sides find every mismatch.
    const bool in_handshake = phase == Phase::handshake || phase == Phase::credit;
    if (is_aborted(x) && !(in_handshake && as_volatile(x.comm.state->failed) == 0)) {
      return -1;
    }
    const auto now = static_cast<int64_t>(global_timer_ns());
    if (since == 0) {
      since = now;
    }
    if (now - since > x.comm.timeout_ns) {
      FailureCause cause{Failure::timeout, phase, peer};
      cause.theirs = static_cast<int64_t>(seen);
      give_up(x, cause, peer);
      return -1;
    }
#pragma unroll 1
    for (int p = 0; p < x.world_size(); ++p) {
      const uint64_t signal = p == x.comm.rank ? 0 : x.inbox().poll_word(x.layout().abort_signal(p));
      if ((signal & ~kAbortMissingRank) == x.epoch) {
        const auto missing = static_cast<int>((signal & kAbortMissingRank) >> kAbortMissingShift) - 1;
        give_up(x, {Failure::peer_aborted, phase, p, missing}, missing);
        return -1;
      }
      if (signal == (x.epoch | kAbortForMismatch) && !in_handshake) {
        as_volatile(x.comm.state->mismatched_peer) = p + 1;
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

// Warp-collective. Waits until `ready()` holds on every lane that has `waits` set. False: the exchange was aborted.
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
  __syncwarp();  // data that one lane acquired becomes visible to all lanes
  return going;
}

// Warp-collective. Waits until `ready(rank)` holds for every peer. False: the exchange was aborted.
template <class Ready>
__device__ bool wait_peers(const Exchange& x, Phase phase, Ready ready) {
  bool going = true;
#pragma unroll
  for (int step = 0; step < kRankSteps; ++step) {
    const int p = rank_at(step);
    going = going && wait_lanes(x, phase, x.is_peer(p), p, [&] { return ready(p); });
  }
  return going;
}

// Warp-collective. Waits until every peer has finished the exchange `last`, in which this rank last wrote its buffer.
__device__ inline bool wait_for_credits(const Exchange& x, uint64_t last) {
  const auto has_credit = [&](int p) {
    // fault: rows written without a credit
    return x.inbox().poll_signal(x.layout().done(p)) >= last;
  };
  const bool may = wait_peers(x, Phase::credit, has_credit);
  fence_async_global();  // between the credit and the bulk copies that it permits
  return may;
}

// Warp-collective. Waits until `arrivals` warps of this rank have built their part of rows_of.
__device__ inline bool wait_for_gate(const Exchange& x, uint32_t arrivals) {
  return wait_lanes(
      x, Phase::gate, true, x.comm.rank, [&] { return load_acquire_device(&x.comm.state->gate) >= arrivals; });
}

// --- the handshake ---

// The offset of a word of the header of `source`.
__device__ inline int64_t header_at(const Exchange& x, int source, int word) {
  return x.layout().header(static_cast<int>(x.epoch % 2), source) + word * int64_t{8};
}

// Warp-collective. Waits until every peer has entered the exchange.
__device__ inline bool wait_for_handshakes(const Exchange& x) {
  return wait_peers(
      x, Phase::handshake, [&](int p) { return x.inbox().poll_signal(header_at(x, p, Header::kEpoch)) >= x.epoch; });
}

// One thread. Number of chunks that a peer will send. Requires its handshake.
__device__ inline int64_t announced_chunks(const Exchange& x, int peer) {
  return static_cast<int64_t>(x.inbox().poll_word(header_at(x, peer, Header::kChunks)));
}

// Rows to and from each rank; -1: not known when the exchange begins.
struct RowCounts {
  PerRank<int> to, from;

  __device__ static RowCounts unknown() {
    RowCounts counts;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      counts.to[step] = counts.from[step] = -1;
    }
    return counts;
  }
};

// Warp-collective. Publishes to every peer that this rank has entered the exchange.
__device__ inline void
publish_handshake(const Exchange& x, const Handshake& handshake, const RowCounts& rows, int64_t chunks = 0) {
#pragma unroll
  for (int step = 0; step < kRankSteps; ++step) {
    if (const int p = rank_at(step); x.is_peer(p)) {
      const Peer peer = x.peer(p);
      const auto put = [&](int word, uint64_t value) { peer.put_word(header_at(x, x.comm.rank, word), value); };
      put(Header::kOp, static_cast<uint64_t>(x.op));
#pragma unroll
      for (int i = 0; i < Handshake::kWords; ++i) {
        put(Header::kHandshake + i, handshake.word(i));
      }
      put(Header::kRows, Header::rows_word(rows.to[step], rows.from[step]));
      put(Header::kChunks, static_cast<uint64_t>(chunks));
      peer.signal(header_at(x, x.comm.rank, Header::kEpoch), x.epoch);
    }
  }
}

// One thread. Cold path. Reports the first field in which a peer's header differs.
__device__ __noinline__ inline void
publish_mismatch(Exchange x, const Handshake& ours, int peer, int rows_to_peer, int rows_from_peer) {
  const auto word = [&](int i) { return x.inbox().poll_word(header_at(x, peer, i)); };
  FailureCause cause{Failure::mismatch, Phase::handshake, peer};
  cause.their_epoch = static_cast<int64_t>(word(Header::kEpoch));
  const auto differ = [&](HandshakeField field, int64_t mine, int64_t theirs) {
    cause.field = field;
    cause.ours = mine;
    cause.theirs = theirs;
    return mine != theirs;
  };
  bool found = differ(HandshakeField::op, static_cast<int64_t>(x.op), static_cast<int64_t>(word(Header::kOp)));
#pragma unroll 1
  for (int i = 0; i < Handshake::kFields && !found; ++i) {
    const uint64_t both = word(Header::kHandshake + i / 2);
    found = differ(static_cast<HandshakeField>(i), ours.field(i), static_cast<int32_t>(both >> i % 2 * 32));
  }
  // Rows are compared only where both sides know them: within one operator, all ranks do or none.
  const uint64_t rows = word(Header::kRows);
  found = found || differ(HandshakeField::rows_to_peer, rows_to_peer, Header::rows_from_reader(rows));
  found = found || differ(HandshakeField::rows_from_peer, rows_from_peer, Header::rows_to_reader(rows));
  publish_failure(x, cause);
}

// Warp-collective. Waits for the handshakes of all peers and compares them with this rank's.
__device__ inline bool check_handshake(const Exchange& x, const Handshake& handshake, const RowCounts& rows) {
  if (!wait_for_handshakes(x)) {
    return false;
  }
  bool same = true;
#pragma unroll
  for (int step = 0; step < kRankSteps; ++step) {
    if (const int p = rank_at(step); x.is_peer(p)) {
      const auto word = [&](int i) { return x.inbox().poll_word(header_at(x, p, i)); };
      bool peer_same = word(Header::kOp) == static_cast<uint64_t>(x.op);
#pragma unroll
      for (int i = 0; i < Handshake::kWords; ++i) {
        peer_same = word(Header::kHandshake + i) == handshake.word(i) && peer_same;
      }
      peer_same = word(Header::kRows) == Header::rows_word(rows.from[step], rows.to[step]) && peer_same;
      if (!peer_same) {
        publish_mismatch(x, handshake, p, rows.to[step], rows.from[step]);
        same = false;
      }
    }
  }
  if (!__all_sync(kFullWarp, same)) {
    if (lane_id() == 0) {
      publish_abort(x, kAbortForMismatch);  // peers that agree with this rank may wait for data that does not come
    }
    __syncwarp();
    return false;
  }
  return true;
}

// Warp-collective. Publishes this rank's handshake and checks those of all peers. False: the exchange was aborted.
__device__ inline bool
exchange_handshakes(const Exchange& x, const Handshake& handshake, const RowCounts& rows, int64_t chunks = 0) {
  publish_handshake(x, handshake, rows, chunks);
  return check_handshake(x, handshake, rows);
}

// --- the end ---

// Block-collective. The last block ends the exchange. `last_use`: the epoch in which the peers' buffer was last
// written.
__device__ inline void end_exchange(const Exchange& x, uint64_t* last_use) {
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  State& state = *x.comm.state;
  if (fetch_add_acq_rel_device(&state.blocks_done, 1) != gridDim.x - 1) {
    return;
  }
  if (as_volatile(state.failed) != 0) {
    return;  // a reset restores the state
  }
  if (const uint32_t peer = as_volatile(state.mismatched_peer); peer != 0) {
    state.mismatched_peer = 0;
    // Not reported again if this rank has found a mismatch itself.
    publish_failure(x, {Failure::mismatch_of_peer, Phase::rows, static_cast<int>(peer) - 1});
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
  fence_system();  // between this rank's reads and the peers' next writes
#pragma unroll 1
  for (int p = 0; p < x.world_size(); ++p) {
    if (p != x.comm.rank) {
      x.peer(p).put_word(x.layout().done(x.comm.rank), x.epoch);
    }
  }
}

// --- wire rows ---

// Wire rows to, or from, each rank, counted from the first row of rank 0.
struct WireRows {
  PerRank<int> begin, end;

  __device__ PerRank<int> counts() const {
    PerRank<int> counts;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      counts[step] = end[step] - begin[step];
    }
    return counts;
  }
};

// Warp-collective. `counts`: of each rank.
__device__ inline WireRows wire_rows(const Exchange& x, const int32_t* counts) {
  const auto max_rows = static_cast<int>(x.layout().max_tokens);
  WireRows rows;
  PerRank<int> count;
#pragma unroll
  for (int step = 0; step < kRankSteps; ++step) {
    const int rank = rank_at(step);
    count[step] = rank < x.world_size() ? min(max(counts[rank], 0), max_rows) : 0;
  }
  rows.end = sum_up_to_rank(count, x.world_size());
#pragma unroll
  for (int step = 0; step < kRankSteps; ++step) {
    rows.begin[step] = rows.end[step] - count[step];
  }
  return rows;
}

}  // namespace ep::nvlink
