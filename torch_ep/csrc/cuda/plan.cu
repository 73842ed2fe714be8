// ep::plan: who sends what where, in one kernel and one message to every peer.
//   tell    each block checks and counts its share of this rank's tokens, and writes them and the counts to every peer
//   count   every block adds up the counts of every block of every rank: how many rows go and come, where each expert's
//           rows begin, how many of them come before its own share of each rank's tokens
//   place   each block places its share of every rank's tokens, once these have come
// Every rank gets the experts of all tokens, not of those alone that visit it: they are small, and so nothing has to be
// counted before they leave. Each count is a word that holds the number of the exchange too: it waits for no flag, nor
// for what was written before it, and so the host of an exact plan hears soon how many rows there are.
#include "device/exchange.cuh"

namespace ep::cuda {
namespace {

constexpr int kThreads = 1024;
// Each group of kPlacers threads places the share of one rank, kPlacers tokens at a time: a bit each, in words of 32.
constexpr int kMaxGroups = kPlanGroups;
constexpr int kPlacers = kThreads / kMaxGroups;
constexpr int kWords = kPlanWords;
static_assert(kWords * 32 == kPlacers);
// Entries of topk_idx that a thread has in its registers at once.
constexpr int kBatch = 8;
// Entries of topk_idx are written to peers four at a time.
constexpr int kQuad = 4;

// What a block knows after `count`, in shared memory.
struct Shared {
  int* expert_total;  // [local experts] rows
  int* expert_begin;  // [local experts] of its group in the result
  int* before;        // [world_size][local experts] rows of the expert that come before this block's share of the rank
  uint32_t* bits;     // [groups][local experts][kWords] tokens that have the expert
  int* histogram;     // [experts] of this block's own tokens; later, [local experts] rows that are kept
};

struct RankCounts {
  int send_begin, send_total;  // wire rows to the rank
  int send_before;             // of tokens before this block's share
  int recv_begin, recv_total;  // wire rows from it
  int recv_before;
  int recv_here;   // of tokens of this block's share
  int num_tokens;  // of the rank
};

// Out of the way, and with a copy of its own, so that what calls it keeps its variables in registers.
__device__ __noinline__ uint64_t await_word(Exchange x, const uint64_t* word, int rank) {
  Wait wait(x, Phase::counts);
  uint64_t seen = load_relaxed_system(word);
  while (!x.is_tagged(seen) && wait.again(rank, seen)) {
    seen = load_relaxed_system(word);
  }
  return seen;
}

class PlanBlock {
 public:
  __device__ PlanBlock(const PlanArgs& args, RankCounts* ranks, int* words)
      : a_(args), x_(args.comm, Op::plan), ranks_(ranks), world_size_(x_.world_size()), me_(args.comm.rank) {
    num_local_ = a_.num_experts / world_size_;
    s_.expert_total = words;
    s_.expert_begin = s_.expert_total + num_local_;
    s_.before = s_.expert_begin + num_local_;
    s_.bits = reinterpret_cast<uint32_t*>(s_.before + world_size_ * num_local_);
    s_.histogram = reinterpret_cast<int*>(s_.bits + plan_groups(world_size_) * num_local_ * kWords);
  }

  __device__ void run() {
    if (tell() && count()) {
      if (blockIdx.x == 0) {
        write_totals();
      }
      place();
    } else if (a_.capacity < 0 && blockIdx.x == 0 && threadIdx.x == 0) {
      tell_host(0, true);
    }
    end_exchange(x_, &a_.comm.state->last_plan);
  }

 private:
  struct Range {
    int begin, end;
  };

  // A block's share of a rank's tokens; begins at a multiple of kQuad.
  __device__ Range tokens_of(int num_tokens, int block) const {
    const int quads = (num_tokens + kQuad - 1) / kQuad, blocks = static_cast<int>(gridDim.x);
    const auto at = [&](int b) { return min(num_tokens, static_cast<int>(int64_t{quads} * b / blocks) * kQuad); };
    return {at(block), at(block + 1)};
  }

  __device__ int64_t own_entry(int64_t i) const {
    return a_.wide_idx ? static_cast<const int64_t*>(a_.topk_idx)[i] : static_cast<const int32_t*>(a_.topk_idx)[i];
  }

  // As peers see it: a bad value stays bad.
  __device__ static int clamp(int64_t entry) {
    return static_cast<int>(min(max(entry, int64_t{INT32_MIN}), int64_t{INT32_MAX}));
  }

  // --- tell ---

  __device__ bool tell() {
    __shared__ int rows_to[kMaxRanks];
    __shared__ unsigned first_bad;
    __shared__ __align__(16) int tile[kThreads];
    const auto tid = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const int num_topk = a_.num_topk, num_tokens = a_.refused ? 0 : a_.num_tokens;
    const Layout& layout = x_.layout();
    const Range own = tokens_of(num_tokens, block);
    for (int i = tid; i < a_.num_experts; i += kThreads) {
      s_.histogram[i] = 0;
    }
    if (tid < kMaxRanks) {
      rows_to[tid] = 0;
    }
    if (tid == 0) {
      first_bad = kNoBad;
    }
    if (meets()) {
      const int64_t agreed[kNumAgreed] = {a_.num_experts, a_.num_topk, 0, 0};
      tell_peers(x_, agreed, -1, -1);
    }
    if (!__syncthreads_and(tid >= kWarp || wait_for_credits(x_, fresh(a_.comm.state->last_plan)))) {
      return false;
    }

    // Whole tokens, and a multiple of kQuad of them: so every tile begins at one of kQuad entries.
    const int tile_tokens = kThreads / num_topk / kQuad * kQuad;
    for (int first = own.begin; first < own.end; first += tile_tokens) {
      const int64_t begin = int64_t{first} * num_topk;
      const int count = (min(first + tile_tokens, own.end) - first) * num_topk;
      const int64_t entry = tid < count ? own_entry(begin + tid) : -1;
      tile[tid] = clamp(entry);
      __syncthreads();
      if (tid < count) {
        bool good = entry >= -1 && entry < a_.num_experts;
        const int rank = good && entry >= 0 ? a_.by_local.quotient(static_cast<int>(entry)) : 0;
        const int from = rank * num_local_, to = from + num_local_;
        bool first_of_rank = true;
        for (int i = tid / num_topk * num_topk; i < tid; ++i) {
          const int other = tile[i];
          good = good && (entry < 0 || other != entry);
          first_of_rank = first_of_rank && (other < from || other >= to);
        }
        if (!good) {
          atomicMin(&first_bad, static_cast<unsigned>(begin + tid));
        } else if (entry >= 0) {
          atomicAdd(&s_.histogram[entry], 1);
          if (first_of_rank) {
            atomicAdd(&rows_to[rank], 1);
          }
        }
      }
      if (tid * kQuad < count) {
        const int4 four = reinterpret_cast<const int4*>(tile)[tid];
        for (int p = 0; p < world_size_; ++p) {
          *reinterpret_cast<int4*>(x_.peer(p, layout.plan_topk(me_) + (begin + tid * kQuad) * 4)) = four;
        }
      }
      __syncthreads();
    }
    const uint64_t status = a_.refused ? kRefused : first_bad == kNoBad ? 0 : 1 + first_bad;
    for (int p = 0; p < world_size_; ++p) {
      auto* words = reinterpret_cast<uint64_t*>(x_.peer(p, layout.plan_counts(me_, block)));
      for (int i = tid; i < num_local_ + Layout::kPlanSums; i += kThreads) {
        const uint64_t value = i < num_local_                  ? s_.histogram[p * num_local_ + i]
                               : i == word_of(Sum::rows)       ? rows_to[p]
                               : i == word_of(Sum::num_tokens) ? num_tokens
                                                               : status;
        store_relaxed_system(&words[i], x_.tag() | value);
      }
    }
    if (tid < world_size_) {
      store_relaxed_system(&a_.comm.state->send_rows[block * kMaxRanks + tid], x_.tag() | rows_to[tid]);
    }
    __syncthreads();
    if (tid < world_size_) {
      // Releases the tokens that the whole block wrote: they are ordered before this by the barrier.
      store_release_system(x_.peer(tid, layout.plan_flag(me_, block)), x_.epoch);
    }
    return true;
  }

  // The warp that meets the peers.
  __device__ bool meets() const { return blockIdx.x == 0 && warp_id() == kThreads / kWarp - 1; }

  // --- count ---

  // What a block of a rank tells besides the counts of the experts.
  enum class Sum { rows, num_tokens, status };
  __device__ int word_of(Sum sum) const { return num_local_ + static_cast<int>(sum); }

  __device__ const uint64_t* word(int rank, int block, int i) const {
    return reinterpret_cast<const uint64_t*>(x_.own(x_.layout().plan_counts(rank, block))) + i;
  }

  // The value of a word, once it is there; `seen`: of the first look at it.
  __device__ int heard(const uint64_t* word, uint64_t seen, int rank, bool& going) const {
    if (!x_.is_tagged(seen)) {
      seen = await_word(x_, word, rank);
      going = going && x_.is_tagged(seen);
    }
    return static_cast<int>(seen & 0xffffffff);
  }

  // False: given up.
  __device__ bool count() {
    __shared__ unsigned long long first_bad;  // rank << 32 | status, the first one of all
    const auto tid = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const auto blocks = static_cast<int>(gridDim.x);
    if (tid == 0) {
      first_bad = ~0ULL;
    }
    __syncthreads();
    bool going = true;
    if (meets()) {
      const int64_t agreed[kNumAgreed] = {a_.num_experts, a_.num_topk, 0, 0};
      going = check_peers(x_, agreed, -1, -1);
    }
    // Of each (rank, local expert): in `before`, the rows of blocks before this one. Four lanes share the blocks.
    constexpr int kLanes = 4;
    const int pairs = world_size_ * num_local_;
    for (int first = 0; first < pairs; first += kThreads / kLanes) {
      const int i = first + tid / kLanes, rank = i / num_local_, expert = i % num_local_;
      int total = 0, before = 0;
      for (int b0 = tid % kLanes; i < pairs && b0 < blocks; b0 += kLanes * kBatch) {
        uint64_t seen[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int b = b0 + j * kLanes;
          seen[j] = b < blocks ? load_relaxed_system(word(rank, b, expert)) : x_.tag();
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int b = b0 + j * kLanes, n = heard(word(rank, b, expert), seen[j], rank, going);
          total += n;
          before += b < block ? n : 0;
        }
      }
      for (int step = kLanes / 2; step > 0; step /= 2) {
        total += __shfl_xor_sync(kFullWarp, total, step);
        before += __shfl_xor_sync(kFullWarp, before, step);
      }
      if (i < pairs && tid % kLanes == 0) {
        s_.before[i] = before;
        // The ranks before: added below, once these totals are known.
        totals_of_rank(rank)[expert] = total;
      }
    }
    if (warp_id() < world_size_) {
      const int rank = warp_id(), lane = lane_id();
      RankCounts sums{};
      for (int b = lane; b < blocks; b += kWarp) {
        const uint64_t* words[] = {
            &a_.comm.state->send_rows[b * kMaxRanks + rank],
            word(rank, b, word_of(Sum::rows)),
            word(rank, b, word_of(Sum::num_tokens)),
            word(rank, b, word_of(Sum::status))};
        uint64_t seen[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          seen[j] = load_relaxed_system(words[j]);
        }
        const int sent = heard(words[0], seen[0], me_, going), received = heard(words[1], seen[1], rank, going);
        sums.send_total += sent;
        sums.send_before += b < block ? sent : 0;
        sums.recv_total += received;
        sums.recv_before += b < block ? received : 0;
        sums.recv_here += b == block ? received : 0;
        sums.num_tokens = heard(words[2], seen[2], rank, going);  // every block tells the same
        const auto status = static_cast<uint32_t>(heard(words[3], seen[3], rank, going));
        if (status != 0) {
          atomicMin(&first_bad, static_cast<unsigned long long>(rank) << 32 | status);
        }
      }
      const auto add_up = [](int n) {
        return static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<unsigned>(n)));
      };
      sums = {
          0,
          add_up(sums.send_total),
          add_up(sums.send_before),
          0,
          add_up(sums.recv_total),
          add_up(sums.recv_before),
          add_up(sums.recv_here),
          sums.num_tokens};
      if (lane == 0) {
        ranks_[rank] = sums;
      }
    }
    if (!__syncthreads_and(going)) {
      return false;
    }
    is_void_ = first_bad != ~0ULL;
    if (is_void_) {  // counts nothing
      if (block == 0 && tid == 0 && !(a_.refused && a_.capacity >= 0)) {
        record_bad(static_cast<int>(first_bad >> 32), static_cast<int64_t>(first_bad & 0xffffffff));
      }
      for (int i = tid; i < pairs; i += kThreads) {
        s_.before[i] = totals_of_rank(0)[i] = 0;
      }
      if (tid < world_size_) {
        ranks_[tid] = {};
      }
    }
    __syncthreads();
    for (int e = tid; e < num_local_; e += kThreads) {
      int sum = 0;
      for (int r = 0; r < world_size_; ++r) {
        s_.before[r * num_local_ + e] += sum;
        sum += totals_of_rank(r)[e];
      }
      s_.expert_total[e] = sum;
    }
    if (tid == 0) {
      for (int r = 1; r < world_size_; ++r) {
        ranks_[r].send_begin = ranks_[r - 1].send_begin + ranks_[r - 1].send_total;
        ranks_[r].recv_begin = ranks_[r - 1].recv_begin + ranks_[r - 1].recv_total;
      }
    }
    __syncthreads();
    if (tid < kWarp) {
      // Groups begin where the groups before end, padded.
      int begin = 0;
      for (int first = 0; first < num_local_; first += kWarp) {
        const int e = first + tid;
        const int size = e < num_local_ ? aligned(s_.expert_total[e]) : 0;
        int end = size;
        for (int step = 1; step < kWarp; step *= 2) {
          const int below = __shfl_up_sync(kFullWarp, end, step);
          end += tid >= step ? below : 0;
        }
        if (e < num_local_) {
          s_.expert_begin[e] = begin + end - size;
        }
        begin += __shfl_sync(kFullWarp, end, kWarp - 1);
      }
    }
    __syncthreads();
    received_ = ranks_[world_size_ - 1].recv_begin + ranks_[world_size_ - 1].recv_total;
    const int last = num_local_ - 1;
    const int64_t needed =
        a_.expert_major ? int64_t{s_.expert_begin[last]} + aligned(s_.expert_total[last]) : received_;
    needed_ = needed;
    rows_ = a_.capacity < 0 ? min(needed, a_.map_rows) : a_.capacity;
    return true;
  }

  // One thread. `status`: of what the rank told, not 0.
  __device__ void record_bad(int rank, int64_t status) const {
    int64_t value = 0, cause = kTooManyTokens;
    if (status != kRefused) {
      bool going = true;
      for (int b = 0; b < static_cast<int>(gridDim.x); ++b) {
        going = going && wait_for_tokens(rank, b);
      }
      if (!going) {
        return;
      }
      const int* entries = reinterpret_cast<const int*>(x_.own(x_.layout().plan_topk(rank)));
      const int64_t bad = status - 1, token = bad / a_.num_topk;
      value = entries[bad];
      cause = kOutOfRange;
      for (int64_t i = token * a_.num_topk; cause == kOutOfRange && i < bad; ++i) {
        cause = entries[i] == value ? i % a_.num_topk : kOutOfRange;
      }
    }
    // Tensors of other shapes may have been planned for before the host reads this.
    const int64_t shape = int64_t{a_.num_topk} << 32 | a_.num_experts;
    record(x_, {Failure::bad_topk, Phase::counts, rank, status - 1, cause, value, shape});
  }

  // The bits are not needed yet.
  __device__ int* totals_of_rank(int rank) const {
    static_assert(kWords >= kMaxRanks);  // with one group
    return reinterpret_cast<int*>(s_.bits) + rank * num_local_;
  }

  __device__ int aligned(int n) const { return (n + a_.alignment - 1) / a_.alignment * a_.alignment; }

  // Rows of an expert that find a place.
  __device__ int kept(int expert) const {
    return static_cast<int>(min(max(rows_ - s_.expert_begin[expert], int64_t{0}), int64_t{s_.expert_total[expert]}));
  }

  // One thread: the exact plan's host waits for this.
  __device__ void tell_host(int64_t rows, bool failed) const {
    Mailbox& mailbox = *a_.comm.mailbox;
    fresh(mailbox.rows) = rows;
    fresh(mailbox.plan_failed) = failed;
    store_release_system(&mailbox.plan_epoch, x_.epoch);
  }

  __device__ void write_totals() {
    const auto tid = static_cast<int>(threadIdx.x);
    if (tid == 0) {
      if (a_.capacity < 0) {
        tell_host(rows_, is_void_);
      }
    }
    if (tid < kWarp) {
      int dropped = 0;
      for (int e = tid; a_.expert_major && e < num_local_; e += kWarp) {
        dropped += s_.expert_total[e] - kept(e);
      }
      dropped = static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<unsigned>(dropped)));
      if (tid == 0) {
        *a_.num_dropped = a_.expert_major ? dropped : static_cast<int>(max(needed_ - rows_, int64_t{0}));
      }
    }
    if (tid < world_size_) {
      const RankCounts& r = ranks_[tid];
      a_.send_counts[tid] = r.send_total;
      a_.recv_counts[tid] = r.recv_total;
      if (!a_.expert_major) {
        a_.offsets[tid] = static_cast<int>(min(int64_t{r.recv_begin} + r.recv_total, rows_));
      }
    }
    for (int e = tid; e < num_local_; e += kThreads) {
      if (a_.expert_major) {
        const int64_t end = int64_t{s_.expert_begin[e]} + aligned(s_.expert_total[e]);
        a_.offsets[e] = static_cast<int>(min(end, rows_));
        a_.tokens_per_expert[e] = kept(e);
      } else if (received_ <= rows_) {
        a_.tokens_per_expert[e] = s_.expert_total[e];  // else `place` knows, where the capacity ends
      }
    }
  }

  // --- place ---

  // A thread: until it can read what a block of a rank wrote of its tokens.
  __device__ bool wait_for_tokens(int rank, int block) const {
    const void* flag = x_.own(x_.layout().plan_flag(rank, block));
    Wait wait(x_, Phase::counts);
    uint64_t seen = load_acquire_system(flag);
    while (seen != x_.epoch) {
      if (!wait.again(rank, seen)) {
        return false;
      }
      seen = load_acquire_system(flag);
    }
    return true;
  }

  __device__ void place() {
    __shared__ VisitBits visits[kMaxGroups];
    const auto waits = static_cast<int>(threadIdx.x) < world_size_ && !is_void_;
    if (!__syncthreads_and(!waits || wait_for_tokens(static_cast<int>(threadIdx.x), static_cast<int>(blockIdx.x)))) {
      return;
    }
    const int group = static_cast<int>(threadIdx.x) / kPlacers, groups = plan_groups(world_size_);
    if (group < groups) {
      for (int r = group; r < world_size_; r += groups) {
        place_rank(r, group, visits[group]);
      }
    }
    if (is_void_ && !a_.refused) {
      const Range own = tokens_of(a_.num_tokens, static_cast<int>(blockIdx.x));
      for (int i = own.begin * a_.num_topk + static_cast<int>(threadIdx.x); i < own.end * a_.num_topk; i += kThreads) {
        a_.send_slot[i] = -1;
      }
    }
    clear_rest();
  }

  // Tokens that visit each rank; the last: that come here.
  using VisitBits = uint32_t[kMaxRanks + 1][kWords];

  __device__ static int rank_in(const uint32_t* bits, int at) {
    int below = 0;
    for (int w = 0; w < at / 32; ++w) {
      below += __popc(bits[w]);
    }
    return below + __popc(bits[at / 32] & ((1U << at % 32) - 1));
  }

  // f(slot, expert) for every slot of a token, experts loaded kBatch at a time.
  template <class F>
  __device__ void each_slot(const int* entries, F f) const {
    for (int first = 0; first < a_.num_topk; first += kBatch) {
      int experts[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        experts[i] = first + i < a_.num_topk ? entries[first + i] : -1;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < a_.num_topk) {
          f(first + i, experts[i]);
        }
      }
    }
  }

  // Of a group: this block's share of the tokens of a rank.
  __device__ void place_rank(int rank, int group, VisitBits& visits_bits) {
    const int tid = static_cast<int>(threadIdx.x) % kPlacers;
    const auto sync = [&] { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kPlacers) : "memory"); };
    const int num_topk = a_.num_topk, first_local = me_ * num_local_;
    const bool is_own = rank == me_;
    const RankCounts& counts = ranks_[rank];
    const Range own = tokens_of(counts.num_tokens, static_cast<int>(blockIdx.x));
    const int* topk = reinterpret_cast<const int*>(x_.own(x_.layout().plan_topk(rank)));
    int* before = s_.before + rank * num_local_;
    uint32_t* bits = s_.bits + group * num_local_ * kWords;
    int received = counts.recv_begin + counts.recv_before;
    // rank_major, dropping: the one share in which the capacity ends counts what each expert keeps.
    const bool counts_kept = !a_.expert_major && received <= rows_ && rows_ < received + counts.recv_here;
    int* kept_rows = s_.histogram;
    if (counts_kept) {
      for (int e = tid; e < num_local_; e += kPlacers) {
        kept_rows[e] = before[e];
      }
    }

    for (int first = own.begin; first < own.end; first += kPlacers) {
      for (int i = tid; i < num_local_ * kWords; i += kPlacers) {
        bits[i] = 0;
      }
      for (int i = tid; i < (kMaxRanks + 1) * kWords; i += kPlacers) {
        (&visits_bits[0][0])[i] = 0;
      }
      sync();
      const int t = first + tid;
      const int* entries = topk + int64_t{t} * num_topk;
      uint32_t visits = 0;
      if (t < own.end) {
        each_slot(entries, [&](int, int expert) {
          if (expert >= 0) {
            visits |= 1U << a_.by_local.quotient(expert);
            const int local = expert - first_local;
            if (local >= 0 && local < num_local_) {
              atomicOr(&bits[local * kWords + tid / 32], 1U << tid % 32);
            }
          }
        });
        const bool comes = (visits >> me_ & 1) != 0;
        if (comes) {
          atomicOr(&visits_bits[kMaxRanks][tid / 32], 1U << tid % 32);
        }
        for (uint32_t left = is_own ? visits : 0; left != 0; left &= left - 1) {
          atomicOr(&visits_bits[__ffs(static_cast<int>(left)) - 1][tid / 32], 1U << tid % 32);
        }
      }
      sync();
      if (t < own.end) {
        if (is_own) {
          place_sent(t, entries, visits_bits, tid);
        }
        if ((visits >> me_ & 1) != 0) {
          const int64_t row = received + rank_in(visits_bits[kMaxRanks], tid);
          place_received(row, entries, before, bits, counts_kept ? kept_rows : nullptr, tid);
        }
      }
      if (first + kPlacers >= own.end) {
        break;
      }
      sync();
      received += rank_in_all(visits_bits[kMaxRanks]);
      for (int e = tid; e < num_local_; e += kPlacers) {
        before[e] += rank_in_all(bits + e * kWords);
      }
      if (is_own && tid < world_size_) {
        ranks_[tid].send_before += rank_in_all(visits_bits[tid]);
      }
      sync();
    }
    sync();
    if (counts_kept) {
      for (int e = tid; e < num_local_; e += kPlacers) {
        a_.tokens_per_expert[e] = kept_rows[e];
      }
    }
  }

  __device__ static int rank_in_all(const uint32_t* bits) {
    int sum = 0;
    for (int w = 0; w < kWords; ++w) {
      sum += __popc(bits[w]);
    }
    return sum;
  }

  __device__ void place_sent(int64_t t, const int* entries, const VisitBits& visits_bits, int at) const {
    each_slot(entries, [&](int k, int expert) {
      int row = -1;
      if (expert >= 0) {
        const int to = a_.by_local.quotient(expert);
        row = ranks_[to].send_begin + ranks_[to].send_before + rank_in(visits_bits[to], at);
      }
      a_.send_slot[t * a_.num_topk + k] = row;
    });
  }

  __device__ void place_received(
      int64_t row,
      const int* entries,
      const int* before,
      const uint32_t* bits,
      int* kept_rows,
      int at) const {
    const int first_local = me_ * num_local_;
    each_slot(entries, [&](int k, int expert) {
      const int local = expert - first_local;
      const bool here = expert >= 0 && local >= 0 && local < num_local_;
      if (a_.expert_major) {
        if (here) {
          const int64_t place = int64_t{s_.expert_begin[local]} + before[local] + rank_in(bits + local * kWords, at);
          if (place < rows_) {
            static_cast<int32_t*>(a_.recv_map)[place] = static_cast<int>(row * a_.num_topk + k);
          }
        }
      } else if (row < rows_) {
        write_topk(row * a_.num_topk + k, here ? local : -1);
        if (here && kept_rows != nullptr) {
          atomicAdd(&kept_rows[local], 1);
        }
      }
    });
  }

  __device__ void write_topk(int64_t i, int expert) const {
    if (a_.wide_idx) {
      static_cast<int64_t*>(a_.recv_map)[i] = expert;
    } else {
      static_cast<int32_t*>(a_.recv_map)[i] = expert;
    }
  }

  // Places of the result that no token takes.
  __device__ void clear_rest() const {
    const auto tid = static_cast<int64_t>(threadIdx.x), block = static_cast<int64_t>(blockIdx.x);
    const int64_t threads = int64_t{gridDim.x} * kThreads;
    if (!a_.expert_major) {
      for (int64_t i = received_ * a_.num_topk + block * kThreads + tid; i < rows_ * a_.num_topk; i += threads) {
        write_topk(i, -1);
      }
      return;
    }
    auto* slots = static_cast<int32_t*>(a_.recv_map);
    for (int e = static_cast<int>(block); e < num_local_; e += static_cast<int>(gridDim.x)) {
      const int64_t begin = s_.expert_begin[e], used = begin + s_.expert_total[e];
      const int64_t end = min(begin + aligned(s_.expert_total[e]), rows_);
      for (int64_t i = used + tid; i < end; i += kThreads) {
        slots[i] = -1;
      }
    }
    for (int64_t i = needed_ + block * kThreads + tid; i < rows_; i += threads) {
      slots[i] = -1;
    }
  }

  static constexpr unsigned kNoBad = 0xffffffff;
  static constexpr int64_t kRefused = 0xffffffff;

  const PlanArgs& a_;
  const Exchange x_;
  RankCounts* ranks_;
  Shared s_;
  const int world_size_, me_;
  int num_local_ = 0;
  bool is_void_ = false;  // some rank's values are bad: a plan of no rows, everywhere
  int64_t received_ = 0;  // wire rows
  int64_t needed_ = 0;    // rows of the result if nothing is dropped
  int64_t rows_ = 0;      // of the result
};

__global__ void __launch_bounds__(kThreads, 1) plan_kernel(const __grid_constant__ PlanArgs args) {
  ask_for(args);
  extern __shared__ int words[];
  __shared__ RankCounts ranks[kMaxRanks];
  if (!has_failed(args.comm)) {
    PlanBlock(args, ranks, words).run();
  } else if (args.capacity < 0 && blockIdx.x == 0 && threadIdx.x == 0) {
    fresh(args.comm.mailbox->plan_failed) = 1;
    store_release_system(&args.comm.mailbox->plan_epoch, fresh(args.comm.state->epoch) + 1);
  }
}

}  // namespace

int64_t plan_shared_bytes(int num_experts, int world_size) {
  return num_experts / world_size * plan_words_an_expert(world_size) * static_cast<int64_t>(sizeof(int));
}

cudaError_t prepare_plan() {
  return cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 220 * 1024);
}

cudaError_t launch_plan(const PlanArgs& args, cudaStream_t stream) {
  const auto shared = static_cast<int>(plan_shared_bytes(args.num_experts, args.comm.layout.world_size));
  plan_kernel<<<args.comm.layout.num_blocks, kThreads, shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace ep::cuda
