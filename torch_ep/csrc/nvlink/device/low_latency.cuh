// The common parts of both low-latency exchanges: numbers, credits, waits, masks.
//
// Note [Two in flight]
// Exchanges of one kind are numbered on the device, and every rank numbers them the same. Exchange n uses half n % 2 of
// the buffers. A rank sends exchange n once its peers have received exchange n - 2, which used the same half. So two
// exchanges may be in flight, but not a third. A send needs only credits from the peers, so it may be a separate
// kernel, with a later kernel for the receive. Nothing is cleared: words and flags hold the number of the exchange, and
// readers compare it. docs/protocol.md has the table of signals.
//
// Note [Latency]
// For few tokens, these kernels are a chain of accesses to memory and to peers (0.25 to 0.5 microseconds each) and of
// dependent instructions (about 400 per microsecond and warp). Therefore:
//   - independent loads are issued together, by different warps: one warp of a block polls the state while the others
//     load what they will send, or prepare what they will receive; one barrier joins them;
//   - each warp handles a small part of a row;
//   - data is self-contained (words, packets): a flag would need a fence before it;
//   - no block waits for the last block: Note [Shares];
//   - the next kernel of either kind publishes, as it starts, that this rank has received an exchange.
#pragma once

#include "nvlink/device/exchange.cuh"

#include <climits>
#include <cstddef>

namespace ep::nvlink {

// Note [Masked ranks]
// No kernel writes to a masked rank or waits for it: it counts as a rank that sends nothing. Every rank has its own
// mask. Within one exchange, all blocks of a rank must agree on the ranks that take part, since these determine the
// rows of the result. If timeouts mask, the first block that has a rank's announcement, or has timed out waiting for
// it, decides for all blocks (`decide`). A rank that is masked later, between its announcement and its rows, leaves
// holes.

constexpr int kDispatchKind = 0, kCombineKind = 1;

enum class Outcome : int { arrived, absent, failed };

// A block's copy of the state of an exchange, in shared memory.
struct LowLatencyExchangeState {
  // Values at the start of the kernel.
  uint64_t number, received;
  uint32_t failed;
  RankSet active, awaited;  // ranks that take part; ranks whose credit was missing
  uint32_t share;           // Note [Shares]
  // Updated while the kernel runs: the longest wait for each rank.
  unsigned long long waited[kMaxRanks];
};

// One low-latency exchange of this rank.
class LowLatencyExchange {
 public:
  // `status`: the result of the send, for a separate receive.
  __device__
  LowLatencyExchange(const Comm& comm, int kind, Part part, const int64_t* status, LowLatencyExchangeState& memory)
      : state_(comm.state->low_latency[kind]),
        kind_(kind),
        part_(part),
        status_(status),
        memory_(memory),
        x_(comm, op_of(kind), 0) {}

  // Warp-collective. One warp per block calls it first.
  __device__ void poll_state() const {
    const State& state = *x_.comm.state;
    const uint32_t failed = as_volatile(state.failed);
    const uint64_t sent = as_volatile(state_.sent), received = as_volatile(state_.received) >> kShareBits;
    const uint64_t number = part_ == Part::receive ? static_cast<uint64_t>(*status_) : (sent >> kShareBits) + 1;
    RankSet active, awaited;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      const int p = rank_at(step);
      const uint32_t masked = as_volatile(state.masked_by_host[step]) | as_volatile(state.masked_by_timeout[step]);
      const bool is_peer = part_ != Part::receive && x_.is_peer(p);
      const uint64_t done = is_peer ? inbox().poll_signal(layout().done(kind_, p)) : 0;
      active.words[step] = ~masked & __ballot_sync(kFullWarp, p < world_size());
      // fault: low latency: half reused too early
      awaited.words[step] = __ballot_sync(kFullWarp, is_peer && done + 2 < number) & active.words[step];
      if (p < kMaxRanks) {
        memory_.waited[p] = 0;
      }
    }
    if (lane_id() == 0) {
      memory_.number = number;
      memory_.received = received;
      memory_.failed = failed;
      memory_.active = active;
      memory_.awaited = awaited;
      memory_.share = blockIdx.x == 0 ? (uint32_t{1} << kShareBits) - (gridDim.x - 1) : 1;
    }
  }

  // Block-collective, after one warp has polled the state. False: the communicator has failed.
  __device__ bool begin() {
    __syncthreads();
    x_.epoch = memory_.number;
    return memory_.failed == 0;
  }

  __device__ const LowLatencyLayout& layout() const { return x_.comm.low_latency; }
  __device__ uint64_t number() const { return x_.epoch; }
  // The number as words and packets hold it. Never 0, the initial value of memory.
  __device__ uint32_t tag() const { return max(static_cast<uint32_t>(x_.epoch), 1U); }
  __device__ uint64_t word_of(uint32_t value) const { return uint64_t{tag()} << 32 | value; }
  __device__ bool is_word(uint64_t word) const { return word >> 32 == tag(); }
  __device__ int half() const { return static_cast<int>(x_.epoch % 2); }
  __device__ int me() const { return x_.comm.rank; }
  __device__ int world_size() const { return layout().world_size; }
  __device__ Inbox inbox() const { return x_.inbox(); }
  __device__ Peer peer(int rank) const { return x_.peer(rank); }

  // Whether the rank took part when this kernel began.
  __device__ bool is_active(int rank) const { return memory_.active.has(rank); }
  __device__ bool masks() const { return x_.comm.masks; }

  // One thread.
  __device__ void publish_failure(const FailureCause& cause) const {
    publish_failure(x_.comm, kind_, number(), false, cause);
  }
  // One thread. Makes every later exchange end at once.
  __device__ void publish_fatal_failure(const FailureCause& cause) const {
    publish_failure(x_.comm, kind_, number(), true, cause);
  }

  // One thread. Waits until `ready()`. `measures`: whether the time counts as a wait for `peer`.
  template <class Ready>
  __device__ Outcome wait(Phase phase, int peer, bool measures, const Ready& ready) const {
    if (ready()) {
      return Outcome::arrived;
    }
    const uint64_t since = global_timer_ns();
    for (int polls = 1; !ready(); ++polls) {
      if (polls % kPollsPerCheck == 0) {
        const auto outcome = check_slowly(x_.comm, kind_, number(), phase, peer, since);
        if (outcome != Outcome::arrived) {
          return outcome;
        }
      }
    }
    if (measures && peer != me()) {
      atomicMax(&memory_.waited[peer], static_cast<unsigned long long>(global_timer_ns() - since));
    }
    return Outcome::arrived;
  }

  // The last block only publishes credits: its fence takes about as long as a small exchange.
  __device__ bool publishes_credits() const { return blockIdx.x == gridDim.x - 1; }
  __device__ int workers() const { return static_cast<int>(gridDim.x) - 1; }

  // Block-collective. Publishes which exchanges earlier kernels have received, and reports the waits of the previous
  // exchange.
  __device__ void publish_credits(int64_t* wait_ns) const {
    if (warp_id() == 0) {
      write_credits();
      if (part_ != Part::send) {
        report_waits(wait_ns);
      }
    }
    end();
  }

  // Warp-collective. Waits for credits. Returns the ranks whose half may be written; none if the exchange failed. A
  // rank that has not received its own earlier exchanges reports that at once, instead of blaming its peers.
  __device__ RankSet writable() const {
    if (memory_.received + 2 < number()) {
      if (blockIdx.x == 0 && threadIdx.x == 0) {
        publish_fatal_failure({Failure::too_many_in_flight, Phase::credit, me()});
      }
      return {};
    }
    return memory_.awaited.any() ? await_credits() : memory_.active;
  }

  // Every thread, before it receives. Returns whether this exchange is the next to be received: exchanges are received
  // in the order in which they were sent, each once.
  __device__ bool is_next() const {
    const uint64_t next = memory_.received + 1;
    if (next == number()) {
      return true;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      FailureCause cause{Failure::out_of_order, Phase::handshake, me()};
      cause.ours = static_cast<int64_t>(next);
      cause.theirs = static_cast<int64_t>(number());
      publish_fatal_failure(cause);
    }
    return false;
  }

  // One thread, only if timeouts mask. Returns whether a rank takes part, by the decision of the first block that knew.
  // `is_there`: this block's own answer.
  __device__ bool decide(int rank, bool is_there) const {
    auto* verdict = reinterpret_cast<unsigned long long*>(&state_.verdict[half()][rank]);
    unsigned long long seen = as_volatile(*verdict);
    while (seen >> 1 != number()) {
      const unsigned long long mine = number() << 1 | (is_there ? 1 : 0);
      const unsigned long long found = atomicCAS(verdict, seen, mine);
      seen = found == seen ? mine : found;
    }
    return (seen & 1) != 0;
  }

  // Block-collective. Ends the exchange for this block, which has sent and read everything.
  __device__ void end() const {
    __syncthreads();
    const int lane = lane_id();
    // Two lanes of one warp, so that one instruction adds both.
    // fault: low latency: receive not counted
    if (warp_id() == 0 && lane < 2 && part_ != (lane == 0 ? Part::receive : Part::send)) {
      static_assert(offsetof(LowLatencyState, received) == offsetof(LowLatencyState, sent) + sizeof(uint64_t));
      add_relaxed_device(&state_.sent + lane, memory_.share);
    }
    for (int p = lane; warp_id() == 1 && part_ != Part::send && p < world_size(); p += kWarp) {
      if (memory_.waited[p] != 0) {
        atomicMax(reinterpret_cast<unsigned long long*>(&state_.wait_ns[half()][p]), memory_.waited[p]);
      }
    }
  }

  // One thread. Cold path: Note [Cold paths].
  static __device__ __noinline__ void
  publish_failure(const Comm& comm, int kind, uint64_t number, bool stops, FailureCause cause) {
    const Exchange x(comm, op_of(kind), number);
    ::ep::nvlink::publish_failure(x, cause, &comm.state->low_latency[kind].reported);
    if (stops) {
      stop(x);
    }
  }

 private:
  static constexpr int kPollsPerCheck = 64;

  // Warp-collective. Waits for the credits that were missing. Returns the ranks that may be written.
  __device__ RankSet await_credits() const {
    RankSet may_write;
    bool going = true;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      const int p = rank_at(step);
      auto outcome = memory_.active.has(p) ? Outcome::arrived : Outcome::absent;
      if (memory_.awaited.has(p)) {
        outcome =
            wait(Phase::credit, p, false, [&] { return inbox().poll_signal(layout().done(kind_, p)) + 2 >= number(); });
      }
      going = __all_sync(kFullWarp, outcome != Outcome::failed) != 0 && going;
      may_write.words[step] = __ballot_sync(kFullWarp, outcome == Outcome::arrived);
    }
    __syncwarp();  // data that one lane acquired becomes visible to all lanes
    return going ? may_write : RankSet{};
  }

  // Warp-collective.
  __device__ void write_credits() const {
    const State& state = *x_.comm.state;
    const uint64_t received[LowLatencyLayout::kKinds] = {
        as_volatile(state.low_latency[kDispatchKind].received) >> kShareBits,
        as_volatile(state.low_latency[kCombineKind].received) >> kShareBits};
    fence_system();  // between the reads of those kernels and the peers' next writes
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      if (const int p = rank_at(step); x_.is_peer(p) && is_active(p)) {
        peer(p).put_word(layout().done(kDispatchKind, me()), received[kDispatchKind]);
        peer(p).put_word(layout().done(kCombineKind, me()), received[kCombineKind]);
      }
    }
  }

  // Warp-collective. The previous exchange has ended, so its waits are known.
  __device__ void report_waits(int64_t* wait_ns) const {
    for (int p = lane_id(); p < world_size(); p += kWarp) {
      uint64_t& before = state_.wait_ns[1 - half()][p];
      wait_ns[p] = static_cast<int64_t>(as_volatile(before));
      before = 0;
    }
  }

  // One thread. Cold path. Returns whether to keep waiting (arrived), to go on without the peer (absent), or to stop
  // (failed).
  __device__ static __noinline__ Outcome
  check_slowly(const Comm& comm, int kind, uint64_t number, Phase phase, int peer, uint64_t since) {
    State& state = *comm.state;
    if (as_volatile(state.failed) != 0) {
      return Outcome::failed;
    }
    const int word = peer / kWarp;
    if (((as_volatile(state.masked_by_host[word]) | as_volatile(state.masked_by_timeout[word])) >> peer % kWarp & 1) !=
        0) {
      return Outcome::absent;
    }
    if (static_cast<int64_t>(global_timer_ns() - since) <= comm.timeout_ns) {
      return Outcome::arrived;
    }
    if (comm.masks && peer != comm.rank) {
      atomicOr(&state.masked_by_timeout[word], 1U << peer % kWarp);
      return Outcome::absent;
    }
    publish_failure(comm, kind, number, true, {Failure::timeout, phase, peer});
    return Outcome::failed;
  }

  __device__ static OpKind op_of(int kind) {
    return kind == kDispatchKind ? OpKind::low_latency_dispatch : OpKind::low_latency_combine;
  }

  LowLatencyState& state_;
  const int kind_;
  const Part part_;
  const int64_t* status_;
  LowLatencyExchangeState& memory_;
  Exchange x_;
};

// The words of an entry of topk_idx. A load does not stall; using the value does.
struct Entry {
  int low = -1, high = -1;
  bool wide = false;

  // A value out of range stays out of range.
  __device__ int value() const { return !wide || high == low >> 31 ? low : high < 0 ? INT_MIN : INT_MAX; }
};

struct Entries {
  const void* topk_idx;
  bool wide;

  __device__ Entry operator[](int64_t i) const {
    const auto* words = static_cast<const int*>(topk_idx) + (wide ? 2 * i : i);
    return {words[0], wide ? words[1] : 0, wide};
  }
};

}  // namespace ep::nvlink
