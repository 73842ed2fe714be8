// ep::plan: computes the routes of all rows, in one kernel and with one message to every peer.
//   publish_counts  Each block checks and counts its share of this rank's tokens. It writes the counts to every peer,
//                   then the experts of the tokens.
//   collect_counts  Every block sums the counts of all blocks of all ranks: rows to and from each rank, and rows before
//                   its own share of each rank's tokens. For expert_major, it also sums the counts per expert.
//   write_plan      Each block assigns rows to its share of every rank's tokens, once their experts have arrived.
// Every rank gets the experts of all tokens, not only of those that visit it: they are small, and nothing has to be
// counted before they are sent. Each count is a word that also holds the number of the exchange. It needs neither a
// flag nor a fence, so the host of an exact plan gets the number of rows early.
#include "nvlink/device/exchange.cuh"

#include <algorithm>

namespace ep::nvlink {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
// Loads of a thread that are in flight together.
constexpr int kBatch = 12;  // words
constexpr int kAhead = 8;   // entries of topk_idx
// These warps wait for peers first: the last warps have the fewest entries.
constexpr int kHandshakeWarp = kWarps - 1, kCreditWarp = kWarps - 2;

// What the host derives for a launch.
struct PlanShape {
  int num_local;  // experts of a rank
  int words;      // words of kWarp tokens per rank and round
  int groups;     // groups of threads per block, each for the tokens of one rank at a time
  int threads;    // threads per group
  Divisor by_local, by_topk, by_blocks, by_threads, by_published, by_alignment;
};

// Per expert, in shared memory.
struct ExpertWords {
  int* expert_total;  // [local experts] rows
  int* expert_begin;  // [local experts] of its group in the result
  int* before;        // [world_size][local experts] rows of the expert that come before this block's share of the rank
  uint32_t* bits;     // [world_size][words][local experts] tokens with the expert; in publish_counts, [words][experts]
  int* histogram;     // [experts] of this block's own tokens; in write_plan, [local experts] kept rows
};

struct RankCounts {
  int sent, sent_before;  // wire rows to the rank; wire rows of tokens before this block's share
  int received, received_before;
  int received_here;  // of tokens of this block's share
  int num_tokens;     // of the rank
};

struct PlanShared {
  RankCounts ranks[kMaxRanks];
  unsigned long long first_bad;  // of all ranks: rank << 32 | status
  int rows_to[kMaxRanks];        // of this block's own tokens
  unsigned own_bad;              // index of their first bad entry
  // Per round. Visits: own tokens that visit each rank, and tokens of each source that visit this rank. Begin: the
  // first row that a word of own tokens sends to each rank, and the first row that arrives from a word of each source.
  uint32_t sent_visits[kMaxRanks][kPlanWords], received_visits[kMaxRanks][kPlanWords];
  int sent_begin[kMaxRanks][kPlanWords], received_begin[kMaxRanks][kPlanWords];
};

// One thread. Waits for a word and returns it. Cold path: Note [Cold paths], device/exchange.cuh.
__device__ __noinline__ uint64_t await_word(Exchange x, const void* word, int rank) {
  Wait wait(x, Phase::counts);
  uint64_t seen = load_relaxed_system(word);
  while (!x.is_tagged(seen) && wait.keep_waiting(rank, seen)) {
    seen = load_relaxed_system(word);
  }
  return seen;
}

class PlanBlock {
 public:
  __device__ PlanBlock(const PlanArgs& args, const PlanShape& shape, PlanShared& shared, int* words)
      : a_(args),
        shape_(shape),
        x_(args.comm, OpKind::plan),
        shared_(shared),
        world_size_(x_.world_size()),
        me_(args.comm.rank),
        block_(static_cast<int>(blockIdx.x)),
        blocks_(static_cast<int>(gridDim.x)),
        num_local_(shape.num_local) {
    s_.expert_total = words;
    s_.expert_begin = s_.expert_total + num_local_;
    s_.before = s_.expert_begin + num_local_;
    s_.bits = reinterpret_cast<uint32_t*>(s_.before + world_size_ * num_local_);
    s_.histogram = reinterpret_cast<int*>(s_.bits + world_size_ * shape.words * num_local_);
  }

  // Block-collective.
  __device__ void run() {
    if (publish_counts() && collect_counts()) {
      if (block_ == 0) {
        write_totals();
      }
      write_plan();
    } else if (a_.capacity < 0 && block_ == 0 && threadIdx.x == 0) {
      publish_rows_to_host(a_.comm, 0, true);
    }
    end_exchange(x_, &a_.comm.state->last_plan);
  }

  // One thread. The host of an exact plan waits for this.
  __device__ static void publish_rows_to_host(const Comm& comm, int64_t rows, bool failed) {
    const uint64_t word = kPlanRowsReady | (failed ? kPlanFailed : 0) | static_cast<uint64_t>(rows);
    store_relaxed_system(&comm.host_report->plan, word);
  }

 private:
  struct Range {
    int begin, end;
  };

  // This block's share of a rank's tokens: its size, and its range.
  __device__ int share_of(int num_tokens) const { return shape_.by_blocks.quotient(num_tokens + blocks_ - 1); }
  __device__ Range tokens_of(int num_tokens) const {
    const int share = share_of(num_tokens);
    return {min(block_ * share, num_tokens), min((block_ + 1) * share, num_tokens)};
  }

  __device__ int rank_of(int expert) const { return shape_.by_local.quotient(expert); }

  // Tokens per rank and round.
  __device__ int round_tokens() const { return shape_.words * kWarp; }

  // One thread. Calls f(i, entry i) for this thread's share of `count` entries: every `threads`-th from the `first` one
  // on. A value out of range stays out of range.
  template <class Int, class F>
  __device__ static void each_entry(const Int* entries, int count, int first, int threads, F f) {
    int ahead[kAhead];
#pragma unroll 1
    for (int i = first, n = 0; i < count; i += threads, ++n) {
      if (n % kAhead == 0) {
        Int batch[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          batch[j] = i + j * threads < count ? entries[i + j * threads] : -1;
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          ahead[j] = static_cast<int>(min(max(int64_t{batch[j]}, int64_t{INT32_MIN}), int64_t{INT32_MAX}));
        }
      }
      f(i, ahead[0]);
#pragma unroll
      for (int j = 1; j < kAhead; ++j) {
        ahead[j - 1] = ahead[j];
      }
    }
  }

  // One thread. Calls f(i, entry i) for this thread's share of `count` own entries from the `begin`-th on.
  template <class F>
  __device__ void each_own_entry(int64_t begin, int count, F f) const {
    const auto tid = static_cast<int>(threadIdx.x);
    if (a_.wide_idx) {
      each_entry(static_cast<const int64_t*>(a_.topk_idx) + begin, count, tid, kThreads, f);
    } else {
      each_entry(static_cast<const int32_t*>(a_.topk_idx) + begin, count, tid, kThreads, f);
    }
  }

  // --- publish_counts ---

  // Block-collective. False: the exchange was aborted.
  __device__ bool publish_counts() {
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id();
    const Layout& layout = x_.layout();
    const int num_tokens = a_.refused ? 0 : a_.num_tokens;
    const Range own = tokens_of(num_tokens);
    for (int i = tid; i < a_.num_experts; i += kThreads) {
      s_.histogram[i] = 0;
    }
    if (tid < kMaxRanks) {
      shared_.rows_to[tid] = 0;
    }
    if (tid == 0) {
      shared_.own_bad = kNoBad;
      shared_.first_bad = ~0ULL;
    }
    if (is_handshake_warp()) {
      publish_handshake(x_, a_.handshake, RowCounts::unknown());
    }
    const bool going = warp_id() != kCreditWarp || wait_for_credits(x_, as_volatile(a_.comm.state->last_plan));
    for (int first = own.begin; first < own.end; first += round_tokens()) {
      if (first != own.begin) {
        __syncthreads();  // the bits have been read and may be cleared
      }
      clear_bits(true);
      __syncthreads();
      const int64_t begin = int64_t{first} * a_.num_topk;
      const int count = min(round_tokens(), own.end - first) * a_.num_topk;
      each_own_entry(begin, count, [&](int i, int entry) { count_entry(begin, i, entry); });
      __syncthreads();
      for (int e = tid; e < a_.num_experts; e += kThreads) {
        s_.histogram[e] += tokens_in(s_.bits + e, a_.num_experts);
      }
      if (tid < world_size_) {
        shared_.rows_to[tid] += tokens_in(shared_.sent_visits[tid], 1);
      }
    }
    if (!__syncthreads_and(going)) {
      return false;
    }

    const uint64_t status = a_.refused ? kRefused : shared_.own_bad == kNoBad ? 0 : 1 + shared_.own_bad;
    const int num_words = num_local_ + Layout::kPlanSums;
    for (int i = tid; i < world_size_ * num_words; i += kThreads) {
      const int p = shape_.by_published.quotient(i), n = i - p * num_words;
      const uint64_t value = n < num_local_                  ? s_.histogram[p * num_local_ + n]
                             : n == word_of(Sum::rows)       ? shared_.rows_to[p]
                             : n == word_of(Sum::num_tokens) ? num_tokens
                                                             : status;
      x_.peer(p).put_word(layout.plan_counts(me_, block_) + n * int64_t{8}, x_.tag() | value);
    }
    if (tid < world_size_) {
      store_relaxed_system(&a_.comm.state->send_rows[block_ * kMaxRanks + tid], x_.tag() | shared_.rows_to[tid]);
    }
    const int64_t begin = int64_t{own.begin} * a_.num_topk;
    each_own_entry(begin, (own.end - own.begin) * a_.num_topk, [&](int i, int entry) {
#pragma unroll 1
      for (int p = 0; p < world_size_; ++p) {
        x_.peer(p).put_value(layout.plan_topk(me_) + (begin + i) * 4, static_cast<uint32_t>(entry), sizeof(int));
      }
    });
    __syncthreads();
    for (int p = lane; warp_id() == kCreditWarp && p < world_size_; p += kWarp) {
      // Releases the tokens that the whole block wrote: the barrier orders them before this.
      x_.peer(p).signal(layout.plan_flag(me_, block_), x_.epoch);
    }
    return true;
  }

  // Block-collective.
  __device__ void clear_bits(bool of_experts) {
    const auto tid = static_cast<int>(threadIdx.x);
    for (int i = tid; of_experts && i < shape_.words * a_.num_experts; i += kThreads) {
      s_.bits[i] = 0;
    }
    for (int i = tid; i < kMaxRanks * kPlanWords; i += kThreads) {
      (&shared_.sent_visits[0][0])[i] = 0;
      (&shared_.received_visits[0][0])[i] = 0;
    }
  }

  // One thread. Counts tokens in the words of one round, which are `step` apart.
  __device__ int tokens_in(const uint32_t* words, int step) const {
    constexpr int kUnroll = 4;
    static_assert(kPlanWords / 2 % kUnroll == 0);
    int sum = 0;
#pragma unroll 1
    for (int w = 0; w < shape_.words; w += kUnroll) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        sum += __popc(words[(w + i) * step]);
      }
    }
    return sum;
  }

  // One thread. Counts the i-th entry of a round that begins with entry `begin`: its token has this expert and visits
  // its rank.
  __device__ void count_entry(int64_t begin, int i, int entry) const {
    const int t = shape_.by_topk.quotient(i);
    const uint32_t bit = 1U << t % kWarp;
    if (entry >= 0 && entry < a_.num_experts) {
      atomicOr(&shared_.sent_visits[rank_of(entry)][t / kWarp], bit);
      if ((atomicOr(&s_.bits[t / kWarp * a_.num_experts + entry], bit) & bit) == 0) {
        return;
      }
      // The token has the expert at least twice. The second slot is bad, whichever thread came first.
      i = t * a_.num_topk - 1;
#pragma unroll 1
      for (int times = 0; times < 2;) {
        const int64_t at = begin + ++i;
        times += entry == (a_.wide_idx ? static_cast<const int64_t*>(a_.topk_idx)[at]
                                       : static_cast<const int32_t*>(a_.topk_idx)[at]);
      }
    } else if (entry == -1) {
      return;
    }
    atomicMin(&shared_.own_bad, static_cast<unsigned>(begin + i));
  }

  // The warp that exchanges handshakes with the peers.
  __device__ bool is_handshake_warp() const { return block_ == 0 && warp_id() == kHandshakeWarp; }

  // --- collect_counts ---

  // The words that a block publishes after the counts per expert.
  enum class Sum { rows, num_tokens, status };
  __device__ int word_of(Sum sum) const { return num_local_ + static_cast<int>(sum); }

  // The words of the n-th block, counted over all blocks of all ranks.
  __device__ const char* published_by(int n) const {
    return x_.inbox().data(x_.layout().plan_counts(0, 0)) + n * x_.layout().counts_bytes;
  }

  // One thread. Waits for a word and returns its value. `seen`: a first poll.
  __device__ int value_of(const void* word, uint64_t seen, int rank, bool& going) const {
    if (!x_.is_tagged(seen)) {
      seen = await_word(x_, word, rank);
      going = going && x_.is_tagged(seen);
    }
    return static_cast<int>(seen & 0xffffffff);
  }

  // One thread. Calls f(n, value) for a word of every kLanes-th block from the `first` one on, counted as in
  // `published_by`. `words`: that word of block 0.
  template <int kLanes, class F>
  __device__ void each_count(const char* words, int end, int first, bool& going, F f) const {
    const int64_t step = x_.layout().counts_bytes;
    uint64_t ahead[kBatch];
#pragma unroll 1
    for (int i = first, n = 0; i < end; i += kLanes, ++n) {
      if (n % kBatch == 0) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          ahead[j] = i + j * kLanes < end ? load_relaxed_system(words + (i + j * kLanes) * step) : 0;
        }
      }
      f(i, value_of(words + i * step, ahead[0], shape_.by_blocks.quotient(i), going));
#pragma unroll
      for (int j = 1; j < kBatch; ++j) {
        ahead[j - 1] = ahead[j];
      }
    }
  }

  // Block-collective. False: the exchange was aborted.
  __device__ bool collect_counts() {
    bool going = true;
    if (is_handshake_warp()) {
      going = check_handshake(x_, a_.handshake, RowCounts::unknown());
    }
    for (int rank = warp_id(); rank < world_size_; rank += kWarps) {
      collect_rank(rank, going);
    }
    if (a_.expert_major) {
      collect_experts(going);
    } else {
      for (int e = first_expert(); e < num_local_; e += blocks_ * kWarps) {
        const int rows = rows_of(e, world_size_ * blocks_, going);
        if (lane_id() == 0) {
          s_.expert_total[e] = rows;
        }
      }
    }
    if (!__syncthreads_and(going)) {
      return false;
    }
    const int lane = lane_id();
    is_void_ = shared_.first_bad != ~0ULL;
    if (is_void_ && block_ == 0 && threadIdx.x == 0 && !(a_.refused && a_.capacity >= 0)) {
      publish_bad_topk(static_cast<int>(shared_.first_bad >> 32), static_cast<int64_t>(shared_.first_bad & 0xffffffff));
    }
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      const bool counts = !is_void_ && rank_at(step) < world_size_;
      mine_[step] = counts ? shared_.ranks[rank_at(step)] : RankCounts{};
      sent_end_[step] = mine_[step].sent;
      received_end_[step] = mine_[step].received;
    }
    sent_end_ = sum_up_to_rank(sent_end_, world_size_);
    received_end_ = sum_up_to_rank(received_end_, world_size_);
    received_ = received_end_.of(world_size_ - 1);
    needed_ = a_.expert_major ? add_up_experts() : received_;
    rows_ = a_.capacity < 0 ? min(needed_, a_.map_rows) : a_.capacity;
    // If rows are dropped, assign_rows finds the end of the capacity.
    if (!a_.expert_major && received_ <= rows_ && lane == 0) {
      for (int e = first_expert(); e < num_local_; e += blocks_ * kWarps) {
        a_.tokens_per_expert[e] = is_void_ ? 0 : s_.expert_total[e];
      }
    }
    return true;
  }

  // rank_major: the first expert whose rows this warp sums, with one warp of all blocks per expert. The last warps come
  // first: they have the least work.
  __device__ int first_expert() const { return block_ + blocks_ * (kWarps - 1 - warp_id()); }

  // Warp-collective. Sums the words that all blocks of a rank published after the counts per expert.
  __device__ void collect_rank(int rank, bool& going) const {
    RankCounts sums{};
    for (int b = lane_id(); b < blocks_; b += kWarp) {
      const char* published = published_by(rank * blocks_ + b);
      const void* words[] = {
          &a_.comm.state->send_rows[b * kMaxRanks + rank],
          published + word_of(Sum::rows) * int64_t{8},
          published + word_of(Sum::num_tokens) * int64_t{8},
          published + word_of(Sum::status) * int64_t{8}};
      uint64_t seen[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        seen[j] = load_relaxed_system(words[j]);
      }
      const int sent = value_of(words[0], seen[0], me_, going), received = value_of(words[1], seen[1], rank, going);
      sums.sent += sent;
      sums.sent_before += b < block_ ? sent : 0;
      sums.received += received;
      // fault: plan: rows of earlier blocks
      sums.received_before += b < block_ ? received : 0;
      sums.received_here += b == block_ ? received : 0;
      sums.num_tokens = value_of(words[2], seen[2], rank, going);  // every block publishes the same
      const auto status = static_cast<uint32_t>(value_of(words[3], seen[3], rank, going));
      if (status != 0) {
        atomicMin(&shared_.first_bad, static_cast<unsigned long long>(rank) << 32 | status);
      }
    }
    const auto add_up = [](int n) { return static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<unsigned>(n))); };
    sums = {
        add_up(sums.sent),
        add_up(sums.sent_before),
        add_up(sums.received),
        add_up(sums.received_before),
        add_up(sums.received_here),
        sums.num_tokens};
    if (lane_id() == 0) {
      shared_.ranks[rank] = sums;
    }
  }

  // Block-collective. Per (rank, local expert): sums the rows of the blocks before this one into `before`, and the rows
  // of all blocks into totals().
  __device__ void collect_experts(bool& going) const {
    constexpr int kLanes = 2;  // that share the blocks
    const auto tid = static_cast<int>(threadIdx.x);
    for (int first = 0; first < a_.num_experts; first += kThreads / kLanes) {
      const int i = first + tid / kLanes, rank = rank_of(i), expert = i - rank * num_local_;
      const int begin = rank * blocks_, end = i < a_.num_experts ? begin + blocks_ : begin;
      int total = 0, before = 0;
      each_count<kLanes>(published_by(0) + expert * int64_t{8}, end, begin + tid % kLanes, going, [&](int n, int rows) {
        total += rows;
        before += n < begin + block_ ? rows : 0;
      });
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        total += __shfl_xor_sync(kFullWarp, total, lanes);
        before += __shfl_xor_sync(kFullWarp, before, lanes);
      }
      if (i < a_.num_experts && tid % kLanes == 0) {
        // Rows of lower ranks are added once all totals are known.
        s_.before[i] = before;
        totals()[i] = total;
      }
    }
  }

  // [rank][local expert], in the memory of the bits, which are not needed yet.
  __device__ int* totals() const { return reinterpret_cast<int*>(s_.bits); }

  // Block-collective, expert_major. Returns the rows of all groups.
  __device__ int64_t add_up_experts() const {
    for (int e = static_cast<int>(threadIdx.x); e < num_local_; e += kThreads) {
      int sum = 0;
      for (int i = e; i < a_.num_experts; i += num_local_) {
        s_.before[i] += sum;
        sum += is_void_ ? 0 : totals()[i];
      }
      s_.expert_total[e] = sum;
    }
    __syncthreads();
    // A group begins at the padded end of the previous group. Each lane has some consecutive groups.
    if (warp_id() == 0) {
      const int lane = lane_id(), share = (num_local_ + kWarp - 1) / kWarp;
      const int from = min(lane * share, num_local_), to = min(from + share, num_local_);
      int size = 0;
      for (int e = from; e < to; ++e) {
        size += aligned(s_.expert_total[e]);
      }
      int begin = sum_up_to_lane(size) - size;
      for (int e = from; e < to; ++e) {
        s_.expert_begin[e] = begin;
        begin += aligned(s_.expert_total[e]);
      }
    }
    __syncthreads();
    return end_of(num_local_ - 1);
  }

  __device__ int aligned(int n) const { return shape_.by_alignment.quotient(n + a_.alignment - 1) * a_.alignment; }
  // The end of an expert's group.
  __device__ int64_t end_of(int expert) const {
    return int64_t{s_.expert_begin[expert]} + aligned(s_.expert_total[expert]);
  }

  // One thread. `status`: the word that the rank published, not 0.
  __device__ void publish_bad_topk(int rank, int64_t status) const {
    FailureCause cause{Failure::too_many_tokens, Phase::counts, rank};
    if (status != kRefused) {
      bool going = true;
      for (int b = 0; b < blocks_; ++b) {
        going = going && wait_for_tokens(rank, b);
      }
      if (!going) {
        return;
      }
      const int* entries = topk_of(rank);
      const auto bad = static_cast<int>(status - 1);
      cause.kind = Failure::bad_expert;
      cause.token = bad / a_.num_topk;
      cause.slot = bad % a_.num_topk;
      cause.ours = a_.num_experts;
      cause.theirs = entries[bad];
      for (int i = bad - cause.slot; cause.kind == Failure::bad_expert && i < bad; ++i) {
        if (entries[i] == entries[bad]) {
          cause.kind = Failure::duplicate_expert;
          cause.earlier_slot = i % a_.num_topk;
        }
      }
    }
    publish_failure(x_, cause);
  }

  // Rows of an expert that are not dropped.
  __device__ int kept(int expert) const {
    return static_cast<int>(min(max(rows_ - s_.expert_begin[expert], int64_t{0}), int64_t{s_.expert_total[expert]}));
  }

  // Block-collective, in the first block.
  __device__ void write_totals() const {
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id();
    if (tid == 0 && a_.capacity < 0) {
      publish_rows_to_host(a_.comm, rows_, is_void_);
    }
    if (warp_id() == 1) {
      int64_t dropped = max(needed_ - rows_, int64_t{0});
      if (a_.expert_major && dropped > 0) {  // some of these are padding
        int rows = 0;
        for (int e = lane; e < num_local_; e += kWarp) {
          rows += s_.expert_total[e] - kept(e);
        }
        dropped = __reduce_add_sync(kFullWarp, static_cast<unsigned>(rows));
      }
      if (lane == 0) {
        *a_.num_dropped = static_cast<int>(dropped);
      }
    }
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      if (const int rank = rank_at(step); warp_id() == 0 && rank < world_size_) {
        a_.send_counts[rank] = mine_[step].sent;
        a_.recv_counts[rank] = mine_[step].received;
        if (!a_.expert_major) {
          a_.offsets[rank] = static_cast<int>(min(int64_t{received_end_[step]}, rows_));
        }
      }
    }
    for (int e = tid; a_.expert_major && e < num_local_; e += kThreads) {
      a_.offsets[e] = static_cast<int>(min(end_of(e), rows_));
      a_.tokens_per_expert[e] = kept(e);
    }
  }

  // --- write_plan ---

  // One thread. Waits until the experts of a block's share of a rank's tokens have arrived.
  __device__ bool wait_for_tokens(int rank, int block) const {
    const int64_t flag = x_.layout().plan_flag(rank, block);
    Wait wait(x_, Phase::counts);
    uint64_t seen = x_.inbox().poll_signal(flag);
    while (seen != x_.epoch) {
      if (!wait.keep_waiting(rank, seen)) {
        return false;
      }
      seen = x_.inbox().poll_signal(flag);
    }
    return true;
  }

  // Block-collective.
  __device__ void write_plan() {
    const auto tid = static_cast<int>(threadIdx.x);
    const bool waits = tid < world_size_ && !is_void_;
    if (!__syncthreads_and(!waits || wait_for_tokens(tid, block_))) {
      return;
    }
    int max_tokens = 0;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      max_tokens = max(max_tokens, mine_[step].num_tokens);
    }
    max_tokens = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<unsigned>(max_tokens)));
    assign_rows(share_of(max_tokens));
    if (is_void_ && !a_.refused) {
      const Range own = tokens_of(a_.num_tokens);
      for (int i = own.begin * a_.num_topk + tid; i < own.end * a_.num_topk; i += kThreads) {
        a_.send_row[i] = -1;
      }
    }
    clear_rest();
  }

  // Block-collective. Assigns rows to this block's share of every rank's tokens: at most `share` tokens per rank.
  __device__ void assign_rows(int share) {
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id();
    const int group = shape_.by_threads.quotient(tid), thread = tid - group * shape_.threads;
    // Of this lane's ranks: the first rows of the round, to and from each rank; at first, those of this block's share.
    // If rank_major drops rows, the one share in which the capacity ends counts the kept rows of each expert.
    PerRank<int> sent, received;
    RankSet ends;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      const RankCounts& mine = mine_[step];
      sent[step] = sent_end_[step] - mine.sent + mine.sent_before;
      received[step] = received_end_[step] - mine.received + mine.received_before;
      const bool ends_here = received[step] <= rows_ && rows_ < received[step] + mine.received_here;
      ends.words[step] = __ballot_sync(kFullWarp, ends_here);
    }
    const bool counts_kept = !a_.expert_major && ends.any();
    const int ends_in = counts_kept ? ends.first_from(0) : -1;
    if (counts_kept) {
      bool going = true;  // collect_counts has waited for these words
      for (int e = warp_id(); e < num_local_; e += kWarps) {
        const int rows = rows_of(e, ends_in * blocks_ + block_, going);
        if (lane == 0) {
          s_.histogram[e] = rows;
        }
      }
    }

    for (int done = 0; done < share; done += round_tokens()) {
      if (done != 0) {
        __syncthreads();  // the bits have been read and may be cleared
#pragma unroll
        for (int step = 0; step < kRankSteps; ++step) {
          if (const int rank = rank_at(step); rank < world_size_) {
            sent[step] += tokens_in(shared_.sent_visits[rank], 1);
            received[step] += tokens_in(shared_.received_visits[rank], 1);
          }
        }
        for (int i = tid; a_.expert_major && i < a_.num_experts; i += kThreads) {
          const int rank = rank_of(i);
          s_.before[i] += tokens_in(s_.bits + (rank * shape_.words - rank) * num_local_ + i, num_local_);
        }
        __syncthreads();
      }
      clear_bits(a_.expert_major);
      __syncthreads();
      // f(source, its first token of this round, i, entry i) for the sources of this group of threads.
      const auto each_entry_of_sources = [&](auto f) {
        for (int source = group; source < world_size_; source += shape_.groups) {  // the same for a whole warp
          const Range tokens = tokens_of(shared_.ranks[source].num_tokens);
          const int first = tokens.begin + done;
          const int* entries = topk_of(source) + int64_t{first} * a_.num_topk;
          const int count = is_void_ ? 0 : min(round_tokens(), tokens.end - first) * a_.num_topk;
          each_entry(entries, count, thread, shape_.threads, [&](int i, int expert) { f(source, first, i, expert); });
        }
      };
      each_entry_of_sources([&](int source, int /*first*/, int i, int expert) {
        const int t = shape_.by_topk.quotient(i), rank = expert >= 0 ? rank_of(expert) : -1;
        const uint32_t bit = 1U << t % kWarp;
        if (rank >= 0 && source == me_) {
          atomicOr(&shared_.sent_visits[rank][t / kWarp], bit);
        }
        if (rank == me_) {
          atomicOr(&shared_.received_visits[source][t / kWarp], bit);
          if (a_.expert_major) {
            atomicOr(bits_of(source, t, expert - me_ * num_local_), bit);
          }
        }
      });
      __syncthreads();
      constexpr int kBegins = kMaxRanks * kPlanWords;  // a multiple of a warp's threads
      static_assert(kBegins % kWarp == 0);
      for (int i = tid; i < 2 * kBegins; i += kThreads) {
        const int w = i % kPlanWords, r = i / kPlanWords % kMaxRanks;
        const bool is_sent = i < kBegins;
        int begin = (is_sent ? sent : received).of(r);
        const uint32_t* visits = is_sent ? shared_.sent_visits[r] : shared_.received_visits[r];
#pragma unroll 1
        for (int before = 0; before < w; ++before) {
          begin += __popc(visits[before]);
        }
        (is_sent ? shared_.sent_begin : shared_.received_begin)[r][w] = begin;
      }
      __syncthreads();
      each_entry_of_sources([&](int source, int first, int i, int expert) {
        const int t = shape_.by_topk.quotient(i), k = i - t * a_.num_topk;
        assign_slot(source, t, first + t, k, expert, counts_kept && source == ends_in);
      });
    }
    if (counts_kept) {
      __syncthreads();
      for (int e = tid; e < num_local_; e += kThreads) {
        a_.tokens_per_expert[e] = s_.histogram[e];
      }
    }
  }

  // The experts of a rank's tokens, as they arrived.
  __device__ const int* topk_of(int rank) const {
    return reinterpret_cast<const int*>(x_.inbox().data(x_.layout().plan_topk(rank)));
  }

  // The word of `bits` for a source's t-th token of this round and an expert.
  __device__ uint32_t* bits_of(int source, int t, int local) const {
    return &s_.bits[(source * shape_.words + t / kWarp) * num_local_ + local];
  }

  // One thread. Assigns slot k of a source's token, the t-th of this round. `counts`: count the kept rows of the
  // expert.
  __device__ void assign_slot(int source, int t, int token, int k, int expert, bool counts) const {
    const int w = t / kWarp;
    const uint32_t bit = 1U << t % kWarp, below = bit - 1;
    const int rank = expert >= 0 ? rank_of(expert) : -1;
    if (source == me_) {
      int row = -1;
      if (rank >= 0) {
        row = shared_.sent_begin[rank][w] + __popc(shared_.sent_visits[rank][w] & below);
      }
      a_.send_row[int64_t{token} * a_.num_topk + k] = row;
    }
    const uint32_t visits = shared_.received_visits[source][w];
    if ((visits & bit) == 0) {
      return;
    }
    const int row = shared_.received_begin[source][w] + __popc(visits & below);
    const int local = rank == me_ ? expert - me_ * num_local_ : -1;
    const int64_t pair = int64_t{row} * a_.num_topk + k;
    if (!a_.expert_major) {
      if (row < rows_) {
        write_topk(pair, local);
        if (counts && local >= 0) {
          atomicAdd(&s_.histogram[local], 1);
        }
      }
    } else if (local >= 0) {
      const uint32_t* bits = bits_of(source, 0, local);
      int row_of_expert = s_.expert_begin[local] + s_.before[source * num_local_ + local];
#pragma unroll 1
      for (int i = 0; i < w; ++i) {
        row_of_expert += __popc(bits[i * num_local_]);
      }
      row_of_expert += __popc(bits[w * num_local_] & below);
      if (row_of_expert < rows_) {
        static_cast<int32_t*>(a_.recv_map)[row_of_expert] = static_cast<int>(pair);
      }
    }
  }

  // One thread.
  __device__ void write_topk(int64_t i, int expert) const {
    if (a_.wide_idx) {
      static_cast<int64_t*>(a_.recv_map)[i] = expert;
    } else {
      static_cast<int32_t*>(a_.recv_map)[i] = expert;
    }
  }

  // Warp-collective. Rows of a local expert in the first n shares, counted as in `published_by`.
  __device__ int rows_of(int expert, int n, bool& going) const {
    int sum = 0;
    each_count<kWarp>(
        published_by(0) + expert * int64_t{8}, n, lane_id(), going, [&](int /*block*/, int rows) { sum += rows; });
    return static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<unsigned>(sum)));
  }

  // Grid-wide. Writes -1 to the elements of recv_map that no token takes.
  __device__ void clear_rest() const {
    const auto tid = static_cast<int64_t>(threadIdx.x);
    const int64_t threads = int64_t{blocks_} * kThreads, thread = int64_t{block_} * kThreads + tid;
    if (!a_.expert_major) {
      for (int64_t i = received_ * a_.num_topk + thread; i < rows_ * a_.num_topk; i += threads) {
        write_topk(i, -1);
      }
      return;
    }
    auto* recv_pair = static_cast<int32_t*>(a_.recv_map);
    for (int e = block_; e < num_local_; e += blocks_) {
      const int64_t used = int64_t{s_.expert_begin[e]} + s_.expert_total[e];
      const int64_t end = min(end_of(e), rows_);
      for (int64_t i = used + tid; i < end; i += kThreads) {
        recv_pair[i] = -1;
      }
    }
    for (int64_t i = needed_ + thread; i < rows_; i += threads) {
      recv_pair[i] = -1;
    }
  }

  static constexpr unsigned kNoBad = 0xffffffff;
  static constexpr int64_t kRefused = 0xffffffff;

  const PlanArgs& a_;
  const PlanShape& shape_;
  const Exchange x_;
  PlanShared& shared_;
  ExpertWords s_;
  const int world_size_, me_, block_, blocks_, num_local_;
  bool is_void_ = false;  // a rank has bad values: a plan of no rows, on every rank
  // Per rank: the counts that it published, and the ends of the wire rows to it and from it.
  RankCounts mine_[kRankSteps];
  PerRank<int> sent_end_, received_end_;
  int64_t received_ = 0;  // wire rows
  int64_t needed_ = 0;    // rows of the result if nothing is dropped
  int64_t rows_ = 0;      // of the result
};

__global__ void __launch_bounds__(kThreads, 1)
    plan_kernel(const __grid_constant__ PlanArgs args, const __grid_constant__ PlanShape shape) {
  prefetch_arguments(args);
  extern __shared__ int words[];
  __shared__ PlanShared shared;
  if (!has_failed(args.comm)) {
    PlanBlock(args, shape, shared, words).run();
  } else if (args.capacity < 0 && blockIdx.x == 0 && threadIdx.x == 0) {
    PlanBlock::publish_rows_to_host(args.comm, 0, true);
  }
}

PlanShape shape_of(const PlanArgs& args) {
  const Layout& layout = args.comm.layout;
  PlanShape shape{};
  shape.num_local = args.num_experts / layout.world_size;
  shape.words = plan_words(layout.world_size);
  shape.groups = std::min(layout.world_size, kWarps);
  shape.threads = kWarps / shape.groups * kWarp;
  shape.by_local = Divisor(shape.num_local);
  shape.by_topk = Divisor(args.num_topk);
  shape.by_blocks = Divisor(layout.num_blocks);
  shape.by_threads = Divisor(shape.threads);
  shape.by_published = Divisor(shape.num_local + Layout::kPlanSums);
  shape.by_alignment = Divisor(args.alignment);
  return shape;
}

}  // namespace

int64_t plan_shared_bytes(int num_experts, int world_size) {
  return num_experts / world_size * plan_words_per_expert(world_size) * static_cast<int64_t>(sizeof(int));
}

cudaError_t prepare_plan() {
  return cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 220 * 1024);
}

cudaError_t launch_plan(const PlanArgs& args, cudaStream_t stream) {
  const auto shared = static_cast<int>(plan_shared_bytes(args.num_experts, args.comm.layout.world_size));
  plan_kernel<<<args.comm.layout.num_blocks, kThreads, shared, stream>>>(args, shape_of(args));
  return cudaGetLastError();
}

}  // namespace ep::nvlink
