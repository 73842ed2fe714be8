// ep::low_latency_dispatch: rows to the ranks that need them, with their plan, in one exchange.
//   announce   the first block: which tokens go where and how many rows each expert gets, to every peer
//   send       the other blocks, a token each: row (quantised here) and where its copies belong -> every rank it visits
//   receive    warps of all blocks, a token each, or a part of one: arrived row -> its places in the result
// Where a row belongs among those of its source and expert is counted by the source; the receiver adds what the ranks
// before it send, so it has to wait for nothing but the announcements. Few tokens travel in packs (Note [Packed rows]),
// many by bulk copies, each followed by a flag.
#include "device/low_latency.cuh"
#include "device/packs.cuh"
#include "device/rows.cuh"
#include "device/sums.cuh"

#include <cuda_fp8.h>

#include <algorithm>
#include <climits>
#include <type_traits>

namespace ep::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxWarps = kThreads / kWarp;
constexpr int kSendStages = 2;
// Of what a block may ask for, less its variables.
constexpr int kSharedBytes = kStageMemory - 3 * 1024;
constexpr int kGroup = 128;      // channels that share a scale
constexpr float kLargest = 448;  // of e4m3
constexpr float kLeastMaximum = 1e-4F;

constexpr int kNowhere = INT_MIN;  // no expert

// Of the launch.
struct LowLatencyShape {
  int stage_bytes;    // a record, padded
  int receive_warps;  // of a block, each with a stage; none if rows are packed
  int parts;          // of a packed row, a warp each
  Divisor by_parts, by_tokens, by_local, by_words, by_rows;
};

// --- quantisation: docstring of torch_ep.low_latency_dispatch ---

// Four channels.
template <class T>
using Four = std::conditional_t<sizeof(T) == 4, float4, uint2>;

__device__ inline float4 widen_four(const float4& four, const float*) {
  return four;
}

template <class T>
__device__ float4 widen_four(const uint2& four, const T*) {
  const T* v = reinterpret_cast<const T*>(&four);
  return {widen(v[0]), widen(v[1]), widen(v[2]), widen(v[3])};
}

// NaN if one of them is.
__device__ inline float larger(float a, float b) {
  return a > b || a != a ? a : b;
}

struct Scale {
  float scale, inverse;
};

__device__ inline Scale scale_of(float maximum, Quantize quantize) {
  if (quantize == Quantize::fp8) {
    return {__fdiv_rn(maximum, kLargest), __fdiv_rn(kLargest, maximum)};
  }
  // The next power of two: of numbers with a fraction, one exponent more. At most that of infinity, also for NaN.
  const uint32_t bits = __float_as_uint(__fdiv_rn(maximum, kLargest));
  const uint32_t exponent = min((bits + 0x7fffff) >> 23, 255U);
  const float scale = __uint_as_float(exponent << 23);
  return {scale, __fdiv_rn(1, scale)};
}

// Of a block, one of each rank.
struct LowLatencyShared {
  unsigned long long waited[kMaxRanks];
  bool is_lost[kMaxRanks];
};

// `is_packed`: how rows travel. A kernel of its own for each way, since instructions that are not at hand take long
// too; for the same reason loops that are run through a few times only are not unrolled.
template <bool is_packed>
class LowLatencyDispatch {
 public:
  __device__
  LowLatencyDispatch(const LowLatencyDispatchArgs& args, const LowLatencyShape& shape, LowLatencyShared& shared)
      : a_(args),
        f_(args.comm, kDispatchKind, args.part, args.ticket, shared.waited),
        entries_{args.topk_idx, args.wide_idx, args.num_topk, args.num_experts},
        num_local_(args.num_experts / args.comm.low_latency.world_size),
        scales_at_(static_cast<int>(args.scales_at())),
        places_at_(static_cast<int>(args.places_at())),
        record_bytes_(static_cast<int>(args.record_bytes())),
        shape_(shape),
        waited_(shared.waited),
        is_lost_(shared.is_lost) {
    extern __shared__ __align__(128) char memory[];
    stages_ = memory;
    barriers_ = reinterpret_cast<uint64_t*>(stages_ + stages_bytes(shape));
    words_ = reinterpret_cast<int*>(barriers_ + kMaxWarps);
  }

  static int64_t shared_bytes(const LowLatencyShape& shape, const LowLatencyDispatchArgs& args) {
    const int64_t world_size = args.comm.low_latency.world_size;
    // Of announce: counts and visits of all; of receive: words of all, and where rows of each begin.
    const int64_t words = world_size * args.comm.low_latency.words + args.num_experts;
    return stages_bytes(shape) + kMaxWarps * static_cast<int64_t>(sizeof(uint64_t)) + words * 4;
  }

  template <class T>
  __device__ void run() {
    const auto tid = static_cast<int>(threadIdx.x);
    if (lane_id() == 0) {
      barrier_init(&barriers_[warp_id()]);
      fence_barrier_init();
    }
    if (tid < kMaxRanks) {
      waited_[tid] = 0;
      is_lost_[tid] = false;
    }
    if (__syncthreads_or(f_.has_failed())) {
      return;
    }
    if (f_.is_teller()) {
      f_.tell(a_.part, a_.wait_ns);
      return;
    }
    if (a_.part != Part::send && !f_.is_next()) {
      return;
    }
    if (a_.part != Part::receive) {
      if (blockIdx.x == 0) {
        announce();
      } else if constexpr (is_packed) {
        send_packed<T>();
      } else {
        send<T>();
      }
      f_.end_send();
    }
    if (a_.part != Part::send) {
      receive();
      f_.end_receive();
    }
  }

 private:
  // One is enough for packed rows: of what is quantised.
  EP_HOST_DEVICE static int64_t stages_bytes(const LowLatencyShape& shape) {
    const int stages = shape.receive_warps > kSendStages ? shape.receive_warps : kSendStages;
    return int64_t{shape.stage_bytes} * (is_packed ? 1 : stages);
  }
  __device__ int rank_of(int expert) const { return shape_.by_local.quotient(expert); }
  __device__ const LowLatencyLayout& layout() const { return f_.layout(); }

  // --- announce ---

  __device__ void announce() {
    __shared__ bool may_write[kWarp];
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
    const int words = layout().words, visit_words = layout().visit_words(), world_size = f_.world_size();
    int* counts = words_;                                                 // [experts]
    auto* visits = reinterpret_cast<uint32_t*>(words_ + a_.num_experts);  // [world_size][visit words]
    constexpr int kAhead = 4;                                             // tokens that a warp has on their way at once
    int entries[kAhead];
    const auto load = [&](int first) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int token = first + j * kMaxWarps;
        entries[j] = token < a_.num_tokens ? entry_of(token) : -1;
      }
    };
    load(warp);
#pragma unroll 1
    for (int i = tid; i < a_.num_experts + world_size * visit_words; i += kThreads) {
      words_[i] = 0;
    }
    const bool going = warp != kMaxWarps - 1 || f_.wait_for_credits(may_write[lane]);
    __syncthreads();
#pragma unroll 1
    for (int first = warp; first < a_.num_tokens; first += kAhead * kMaxWarps) {
      if (first != warp) {
        load(first);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int token = first + j * kMaxWarps;
        const Token t = token_of(entries[j]);
        if (t.expert >= 0) {
          atomicAdd(&counts[t.expert], 1);
        } else if (entries[j] != -1) {
          record_fault(token, entries[j], t.first_same);
        }
        if ((t.ranks >> lane & 1) != 0) {
          atomicOr(&visits[lane * visit_words + token / 32], 1U << token % 32);
        }
      }
    }
    if (!__syncthreads_and(going)) {
      return;
    }
#pragma unroll 1
    for (int i = tid; i < world_size * words; i += kThreads) {
      const int p = shape_.by_words.quotient(i), word = i - p * words;
      const int expert = word - kNumAgreed, visit = expert - layout().num_local_experts;
      if (!may_write[p]) {
        continue;
      }
      uint32_t value = 0;
      if (expert < 0) {
        value = agreed(word);
      } else if (visit >= 0) {
        value = visits[p * visit_words + visit];
      } else if (expert < num_local_) {
        value = counts[p * num_local_ + expert];
      }
      store_relaxed_system(
          f_.peer(p, layout().announcement(f_.half(), f_.me())) + int64_t{word} * 8, f_.word_of(value));
    }
    if (tid == 0 && a_.part == Part::send) {
      *a_.ticket = static_cast<int64_t>(f_.number());
    }
  }

  // Of a slot of a token whose entry is bad: out of range, or the same as that of an earlier slot.
  __device__ void record_fault(int token, int entry, int earlier) const {
    const int64_t cause = entry < -1 || entry >= a_.num_experts ? kOutOfRange : earlier;
    const int64_t shape = int64_t{a_.num_topk} << 32 | a_.num_experts;
    f_.record({Failure::bad_topk, Phase::counts, f_.me(), token * a_.num_topk + lane_id(), cause, entry, shape});
  }

  __device__ uint32_t agreed(int i) const {
    static_assert(kNumAgreed == 4);
    switch (i) {
      case 0:
        return static_cast<uint32_t>(a_.num_topk) << kTopkShift | static_cast<uint32_t>(a_.num_experts);
      case 1:
        return static_cast<uint32_t>(a_.hidden);
      case 2:
        return static_cast<uint32_t>(a_.max_tokens);
      default:
        return static_cast<uint32_t>(a_.element) << kTopkShift | static_cast<uint32_t>(a_.quantize);
    }
  }
  // As the host prints it.
  static constexpr int kTopkShift = 24;
  __device__ static int64_t shown(int i, uint32_t agreed) {
    const bool is_two = i == 0 || i == kNumAgreed - 1;
    return is_two ? int64_t{agreed >> kTopkShift} << 32 | (agreed & ((1U << kTopkShift) - 1)) : int64_t{agreed};
  }

  // --- send ---

  // What the entries of one token say, in lane k of slot k.
  struct Token {
    int expert;      // kNowhere: none
    int first_same;  // the first slot with that entry
    uint32_t ranks;  // bits of those that the token visits
  };

  // Of a whole warp. `entry`: of the lane's slot; -1 beyond the last.
  __device__ Token token_of(int entry) const {
    const int first_same = __ffs(static_cast<int>(__match_any_sync(kFullWarp, entry))) - 1;
    const bool is_good = entry >= 0 && entry < a_.num_experts && first_same == lane_id();
    const uint32_t ranks = __reduce_or_sync(kFullWarp, is_good ? 1U << rank_of(entry) : 0);
    return {is_good ? entry : kNowhere, first_same, ranks};
  }

  __device__ int entry_of(int token) const {
    return lane_id() < a_.num_topk ? entries_[int64_t{token} * a_.num_topk + lane_id()] : -1;
  }

  // Of this thread, some of the entries before those of a token.
  static constexpr int kEntriesAhead = 4;
  __device__ void load_before(int token, int begin, int (&entries)[kEntriesAhead]) const {
#pragma unroll
    for (int j = 0; j < kEntriesAhead; ++j) {
      const int i = begin + static_cast<int>(threadIdx.x) + j * kThreads;
      entries[j] = i < token * a_.num_topk ? entries_[i] : -1;
    }
  }

  // Of a whole block: counts, for the slots of a token, the rows of the tokens before it that go to the same expert.
  // `experts`, `indices`: of the block, the latter zeros. `entries`: the first that load_before gives.
  __device__ void count_before(int token, const int* experts, int* indices, int (&entries)[kEntriesAhead]) const {
#pragma unroll 1
    for (int begin = 0; begin < token * a_.num_topk; begin += kEntriesAhead * kThreads) {
      if (begin != 0) {
        load_before(token, begin, entries);
      }
#pragma unroll 1
      for (int k = 0; k < a_.num_topk; ++k) {
        const int expert = experts[k];
#pragma unroll
        for (int j = 0; j < kEntriesAhead; ++j) {
          if (entries[j] == expert) {
            atomicAdd(&indices[k], 1);
          }
        }
      }
    }
  }

  __device__ float weight_of(int token, int slot) const {
    return a_.topk_weights == nullptr ? 1 : a_.topk_weights[int64_t{token} * a_.num_topk + slot];
  }

  template <class T>
  __device__ void send_packed() {
    __shared__ int experts[kMaxTopk], indices[kMaxTopk];
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id(), blocks = f_.workers() - 1;
    const bool as_is = a_.quantize == Quantize::none;
    const int vectors = a_.row_bytes / 16;
    uint32_t may_write = 0;
    bool has_credit = false;
#pragma unroll 1
    for (int token = static_cast<int>(blockIdx.x) - 1; token < a_.num_tokens; token += blocks) {
      // What is asked for here arrives while others are waited for.
      const int entry = entry_of(token);
      const char* x = a_.x + int64_t{token} * a_.hidden * static_cast<int>(sizeof(T));
      Unit unit_ahead{};
      Four<T> groups_ahead[kGroupsAhead] = {};
      if (as_is) {
        unit_ahead = load_unit(x, tid, vectors);
      } else {
        load_groups(reinterpret_cast<const T*>(x), warp_id(), groups_ahead);
      }
      int before[kEntriesAhead];
      load_before(token, 0, before);
      const float weight = lane < a_.num_topk ? weight_of(token, lane) : 0;
      if (!has_credit) {
        bool may = false;
        may_write = f_.wait_for_credits(may) ? __ballot_sync(kFullWarp, may) : 0;
        has_credit = true;
      }
      const Token t = token_of(entry);
      if (warp_id() == 0 && lane < a_.num_topk) {
        experts[lane] = t.expert;
        indices[lane] = 0;
      }
      __syncthreads();
      count_before(token, experts, indices, before);
      if (!as_is) {
        quantize_row(reinterpret_cast<const T*>(x), stages_, groups_ahead);
      }
      __syncthreads();
#pragma unroll 1
      for (uint32_t left = t.ranks & may_write; left != 0; left &= left - 1) {
        char* packs = f_.peer(__ffs(static_cast<int>(left)) - 1, layout().dispatch_packs(f_.half(), f_.me(), token));
        if (warp_id() == 0 && lane < a_.num_topk) {
          store_relaxed_system_16(
              packs + lane * kPackBytes,
              {static_cast<uint32_t>(t.expert),
               static_cast<uint32_t>(indices[lane]),
               __float_as_uint(weight),
               f_.tag()});
        }
        send_scales(packs + layout().scale_packs_at);
#pragma unroll 1
        for (int unit = tid; unit * kUnitVectors < vectors; unit += kThreads) {
          const Unit u = as_is && unit == tid ? unit_ahead : load_unit(as_is ? x : stages_, unit, vectors);
          send_unit(packs + layout().row_packs_at, unit, u, f_.tag());
        }
      }
      __syncthreads();  // all have read the stage
    }
  }

  // Of the last warp, which has the least to do. Three words a pack.
  __device__ void send_scales(char* packs) const {
    if (warp_id() == kMaxWarps - 1) {
      const auto* words = reinterpret_cast<const uint32_t*>(stages_ + scales_at_);
#pragma unroll 1
      for (int first = 3 * lane_id(); first < a_.num_scales; first += 3 * kWarp) {
        const auto word = [&](int i) { return i < a_.num_scales ? words[i] : 0; };
        store_relaxed_system_16(
            packs + first / 3 * kPackBytes, {word(first), word(first + 1), word(first + 2), f_.tag()});
      }
    }
  }

  template <class T>
  __device__ void send() {
    __shared__ int experts[kMaxTopk], indices[kMaxTopk];
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id(), blocks = f_.workers() - 1;
    const bool as_is = a_.quantize == Quantize::none;
    int untold = -1;  // the token of this lane's last copy, whose flag is still to be written
    const auto tell = [&](int token) {
      if (token >= 0) {
        fence_async_global();
        store_release_system(f_.peer(lane, layout().dispatch_flag(f_.half(), f_.me(), token)), f_.number());
      }
    };
    int n = 0;
    bool has_credit = false, may_write = false;  // the latter: the rank of this lane
#pragma unroll 1
    for (int token = static_cast<int>(blockIdx.x) - 1; token < a_.num_tokens; token += blocks, ++n) {
      char* stage = stages_ + int64_t{n % kSendStages} * shape_.stage_bytes;
      const auto* x = reinterpret_cast<const T*>(a_.x) + int64_t{token} * a_.hidden;
      __syncwarp();  // all lanes have seen the load before
      if (as_is && tid == 0) {
        barrier_expect(&barriers_[0], a_.row_bytes);
        bulk_load(stage, x, a_.row_bytes, &barriers_[0]);
      }
      // What is asked for here arrives while others are waited for.
      const int entry = entry_of(token);
      Four<T> ahead[kGroupsAhead] = {};
      if (!as_is) {
        load_groups(x, warp_id(), ahead);
      }
      int before[kEntriesAhead];
      load_before(token, 0, before);
      const float weight = lane < a_.num_topk ? weight_of(token, lane) : 0;
      if (warp_id() == 0 && !has_credit) {
        has_credit = true;
        may_write = f_.wait_for_credits(may_write) && may_write;
        fence_async_global();  // between the credit and the bulk copies that it allows
      }
      const Token t = token_of(entry);
      if (warp_id() == 0 && lane < a_.num_topk) {
        experts[lane] = t.expert;
        indices[lane] = 0;
      }
      __syncthreads();
      count_before(token, experts, indices, before);
      if (!as_is) {
        quantize_row(x, stage, ahead);
      }
      __syncthreads();
      if (warp_id() == 0 && lane < a_.num_topk) {
        reinterpret_cast<Place*>(stage + places_at_)[lane] = {t.expert, indices[lane], weight, 0};
      }
      fence_async_shared();
      __syncthreads();
      if (warp_id() != 0) {
        continue;
      }
      if (as_is) {
        barrier_wait(&barriers_[0], n % 2);
      }
      const bool visits = may_write && (t.ranks >> lane & 1) != 0;
      if (visits) {
        bulk_store(f_.peer(lane, layout().dispatch_row(f_.half(), f_.me(), token)), stage, record_bytes_);
      }
      bulk_commit();
      bulk_wait<1>();  // all but this token's
      tell(untold);
      untold = visits ? token : -1;
    }
    if (warp_id() == 0) {
      bulk_wait<0>();
      tell(untold);
    }
    __syncthreads();
    fence_async_shared();  // this memory is for what arrives next
  }

  // Groups of a row that a warp has on their way at once; each lane has four channels of each.
  static constexpr int kGroupsAhead = 4;
  template <class T>
  __device__ void load_groups(const T* x, int first, Four<T> (&groups)[kGroupsAhead]) const {
#pragma unroll
    for (int i = 0; i < kGroupsAhead; ++i) {
      const int channel = (first + i * kMaxWarps) * kGroup + lane_id() * 4;
      groups[i] = channel < a_.hidden ? *reinterpret_cast<const Four<T>*>(x + channel) : Four<T>{};
    }
  }

  // Of a whole block. `ahead`: the first that load_groups gives this warp.
  template <class T>
  __device__ void quantize_row(const T* x, char* stage, Four<T> (&ahead)[kGroupsAhead]) const {
    const int groups = (a_.hidden + kGroup - 1) / kGroup;
#pragma unroll 1
    for (int first = warp_id(); first < groups; first += kGroupsAhead * kMaxWarps) {
      if (first != warp_id()) {
        load_groups(x, first, ahead);
      }
      float4 four[kGroupsAhead];
      float maxima[kGroupsAhead];
#pragma unroll
      for (int i = 0; i < kGroupsAhead; ++i) {
        four[i] = widen_four(ahead[i], x);
        maxima[i] = larger(larger(fabsf(four[i].x), fabsf(four[i].y)), larger(fabsf(four[i].z), fabsf(four[i].w)));
      }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < kGroupsAhead; ++i) {
          maxima[i] = larger(maxima[i], __shfl_xor_sync(kFullWarp, maxima[i], step));
        }
      }
#pragma unroll
      for (int i = 0; i < kGroupsAhead; ++i) {
        if (const int g = first + i * kMaxWarps; g < groups) {
          quantize_group(g, four[i], scale_of(larger(maxima[i], kLeastMaximum), a_.quantize), stage);
        }
      }
    }
    // Exponents of groups that are not there.
    const auto tid = static_cast<int>(threadIdx.x);
    if (a_.quantize == Quantize::fp8_ue8m0 && tid < 4 && groups + tid < a_.num_scales * 4) {
      stage[scales_at_ + groups + tid] = 0;
    }
  }

  __device__ void quantize_group(int g, const float4& v, const Scale& s, char* stage) const {
    const int channel = g * kGroup + lane_id() * 4;
    if (channel < a_.hidden) {
      const auto low =
          __nv_cvt_float2_to_fp8x2({multiply(v.x, s.inverse), multiply(v.y, s.inverse)}, __NV_SATFINITE, __NV_E4M3);
      const auto high =
          __nv_cvt_float2_to_fp8x2({multiply(v.z, s.inverse), multiply(v.w, s.inverse)}, __NV_SATFINITE, __NV_E4M3);
      *reinterpret_cast<uint32_t*>(stage + channel) = static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
    }
    if (lane_id() == 0) {
      if (a_.quantize == Quantize::fp8_ue8m0) {
        stage[scales_at_ + g] = static_cast<char>(__float_as_uint(s.scale) >> 23);
      } else {
        reinterpret_cast<float*>(stage + scales_at_)[g] = s.scale;
      }
    }
  }

  // --- receive ---

  // What has arrived of the plan, in shared memory.
  struct Heard {
    const int* words;   // [world_size][words of an announcement]
    const int* begins;  // [world_size][local experts]: rows that come before those of the source
    int stride;

    __device__ int count(int source, int expert) const { return words[source * stride + kNumAgreed + expert]; }
    __device__ bool visits(const LowLatencyLayout& layout, int source, int token) const {
      const int word = kNumAgreed + layout.num_local_experts + token / 32;
      return (words[source * stride + word] >> token % 32 & 1) != 0;
    }
  };

  __device__ const char* word_at(int source, int i) const {
    return f_.own(layout().announcement(f_.half(), source)) + int64_t{i} * 8;
  }

  // Word `i` of what `source` announced, as it is kept. False: another exchange.
  __device__ bool keep(int& kept, int source, int i, uint32_t value) const {
    const bool is_count = i >= kNumAgreed && i < kNumAgreed + num_local_;
    kept = is_count ? min(max(static_cast<int>(value), 0), a_.max_tokens) : static_cast<int>(value);
    if (i >= kNumAgreed || value == agreed(i)) {
      return true;
    }
    if (blockIdx.x == 0) {
      const auto number = static_cast<int64_t>(f_.number());
      f_.record({Failure::mismatch, Phase::header, source, 1 + i, shown(i, agreed(i)), shown(i, value), number});
    }
    return false;
  }

  // Of a whole block: what every rank announced. False: failed, or not all announced the same exchange.
  __device__ bool hear(int* heard) const {
    const int words = layout().words, all = f_.world_size() * words;
    bool going = true;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); going && i < all; i += kThreads) {
      const int s = shape_.by_words.quotient(i), word = i - s * words;
      const char* from = word_at(s, word);
      uint64_t value = 0;
      auto outcome = Outcome::absent;
      if (f_.is_active(s)) {
        outcome = f_.wait(Phase::header, s, word == 0, [&] {
          value = load_relaxed_system(from);
          return f_.is_word(value);
        });
      }
      if (outcome == Outcome::there) {
        going = keep(heard[i], s, word, static_cast<uint32_t>(value));
      } else {
        going = outcome == Outcome::absent;
        is_lost_[s] = true;
        heard[i] = 0;
      }
    }
    going = __syncthreads_and(going) != 0;
    return going && (!f_.masks() || hear_together(heard));
  }

  // Where time-outs mask: of one mind with all other blocks on who takes part.
  __device__ bool hear_together(int* heard) const {
    __shared__ bool is_there[kMaxRanks];
    const int words = layout().words, s = lane_id();
    bool same = true;
    if (warp_id() == 0 && s < f_.world_size()) {
      is_there[s] = f_.decide(s, !is_lost_[s]);
#pragma unroll 1
      for (int i = 0; is_there[s] && is_lost_[s] && i < words; ++i) {
        // Another block has heard it, so it is there.
        same = keep(heard[s * words + i], s, i, static_cast<uint32_t>(load_relaxed_system(word_at(s, i)))) && same;
      }
    }
    same = __syncthreads_and(same) != 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < f_.world_size() * words; i += kThreads) {
      heard[i] = is_there[shape_.by_words.quotient(i)] ? heard[i] : 0;
    }
    __syncthreads();
    return same;
  }

  __device__ void receive() {
    const auto tid = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const int world_size = f_.world_size(), words = layout().words;
    int* begins = words_ + world_size * words;
    const Heard heard{words_, begins, words};
    if (!hear(words_)) {
      return;
    }
#pragma unroll 1
    for (int e = tid; e < num_local_; e += kThreads) {
      int end = 0;
#pragma unroll 1
      for (int s = 0; s < world_size; ++s) {
        begins[s * num_local_ + e] = end;
        end += heard.count(s, e);
        if (block == 0) {
          a_.source_offsets[e * world_size + s] = end;
        }
      }
      if (block == 0) {
        a_.tokens_per_expert[e] = end;
      }
    }
    __syncthreads();
    fill_slots(heard);
    if constexpr (is_packed) {
      receive_packed(heard);
    } else if (warp_id() < shape_.receive_warps) {
      receive_rows(heard);
    }
  }

  // Slots of rows that nobody sent.
  __device__ void fill_slots(const Heard& heard) const {
    const int rows_of_expert = f_.world_size() * a_.max_tokens, last = f_.world_size() - 1;  // C
    const int begin = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int i = begin; i < num_local_ * rows_of_expert; i += f_.workers() * kThreads) {
      const int e = shape_.by_rows.quotient(i);
      if (i - e * rows_of_expert >= heard.begins[last * num_local_ + e] + heard.count(last, e)) {
        a_.recv_slot[i] = -1;
      }
    }
  }

  // The row of a slot whose place is known, or -1.
  __device__ int64_t row_at(const Heard& heard, int source, int expert_of_all, int index) const {
    const int expert = expert_of_all - f_.me() * num_local_;
    if (expert_of_all < 0 || expert < 0 || expert >= num_local_ || index < 0 || index >= heard.count(source, expert)) {
      return -1;
    }
    const int64_t rows_of_expert = int64_t{f_.world_size()} * a_.max_tokens;
    return expert * rows_of_expert + heard.begins[source * num_local_ + expert] + index;
  }

  // Of lane k for slot k of a token. `i`: source * max_tokens + token.
  __device__ void write_slot(int i, int64_t row, float weight) const {
    const int64_t slot = int64_t{i} * a_.num_topk + lane_id();
    if (lane_id() < a_.num_topk) {
      a_.recv_row[slot] = static_cast<int>(row);
    }
    if (row >= 0) {
      a_.recv_slot[row] = static_cast<int>(slot);
      a_.row_weights[row] = weight;
    }
  }

  // The first word of the scales of a row; the next is scale_rows further.
  __device__ int* scales_of(int64_t row) const {
    const int rows_of_expert = f_.world_size() * a_.max_tokens, expert = shape_.by_rows.quotient(static_cast<int>(row));
    return static_cast<int*>(a_.scales) + expert * a_.num_scales * a_.scale_rows +
           (row - int64_t{expert} * rows_of_expert);
  }

  // Warps, each a part of one row: a chunk of it, or its scales.
  __device__ void receive_packed(const Heard& heard) const {
    const int lane = lane_id(), work = f_.world_size() * a_.max_tokens * shape_.parts;
    const bool has_place = lane < a_.num_topk;
#pragma unroll 1
    for (int n = static_cast<int>(blockIdx.x) + f_.workers() * warp_id(); n < work; n += f_.workers() * kMaxWarps) {
      const int i = shape_.by_parts.quotient(n), part = n - i * shape_.parts;
      const int source = shape_.by_tokens.quotient(i), token = i - source * a_.max_tokens;
      int64_t row = -1;
      float weight = 0;
      if (heard.visits(layout(), source, token)) {
        const char* packs = f_.own(layout().dispatch_packs(f_.half(), source, token));
        uint4 place{};
        const auto look = [&] {
          if (has_place) {
            place = load_relaxed_system_16(packs + lane * kPackBytes);
          }
        };
        const auto arrived = [&] { return !has_place || place.w == f_.tag(); };
        const auto find_row = [&] {
          row = has_place ? row_at(heard, source, static_cast<int>(place.x), static_cast<int>(place.y)) : -1;
          weight = __uint_as_float(place.z);
        };
        const auto outcome = part * kChunkVectors < a_.row_bytes / 16
                                 ? receive_chunk(packs, source, part, look, arrived, find_row, row)
                                 : receive_scales(packs, source, look, arrived, find_row, row);
        if (outcome == Outcome::failed) {
          break;
        }
      }
      if (part == 0) {
        write_slot(i, row, weight);
      }
    }
  }

  // Of a whole warp: of all its lanes, whether they may go on.
  __device__ static Outcome of_warp(Outcome outcome) {
    if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
      return Outcome::failed;
    }
    return __all_sync(kFullWarp, outcome == Outcome::there) ? Outcome::there : Outcome::absent;
  }

  // Of a whole warp: a chunk of a row, a unit a lane. `look`, `arrived`, `find_row`: of the places, which are looked at
  // together with it.
  template <class Look, class Arrived, class FindRow>
  __device__ Outcome receive_chunk(
      const char* from,
      int source,
      int chunk,
      const Look& look,
      const Arrived& arrived,
      const FindRow& find_row,
      const int64_t& row) const {
    const int unit = chunk * kUnitsAChunk + lane_id(), left_vectors = a_.row_bytes / 16 - unit * kUnitVectors;
    Packs packs{};
    const auto outcome = of_warp(f_.wait(Phase::rows, source, lane_id() == 0, [&] {
      look();
      if (left_vectors > 0) {
        packs.look(from + layout().row_packs_at, unit);
      }
      return arrived() && (left_vectors <= 0 || packs.arrived(f_.tag()));
    }));
    if (outcome == Outcome::there) {
      find_row();
      const Unit u = packs.unit();
      const uint64_t first = reinterpret_cast<uint64_t>(a_.rows + row * a_.row_bytes);
#pragma unroll 1
      for (uint32_t left = __ballot_sync(kFullWarp, row >= 0); left != 0; left &= left - 1) {
        auto* to = reinterpret_cast<uint4*>(__shfl_sync(kFullWarp, first, __ffs(static_cast<int>(left)) - 1)) +
                   unit * kUnitVectors;
#pragma unroll
        for (int j = 0; j < kUnitVectors; ++j) {
          if (j < left_vectors) {
            to[j] = u.vectors[j];
          }
        }
      }
    }
    return outcome;
  }

  // Of a whole warp: the scales of a row, three words a lane.
  template <class Look, class Arrived, class FindRow>
  __device__ Outcome receive_scales(
      const char* from,
      int source,
      const Look& look,
      const Arrived& arrived,
      const FindRow& find_row,
      const int64_t& row) const {
    auto outcome = Outcome::there;
#pragma unroll 1
    for (int begin = 0; outcome == Outcome::there && begin < a_.num_scales; begin += 3 * kWarp) {
      const int first = begin + 3 * lane_id();
      uint4 pack{};
      outcome = of_warp(f_.wait(Phase::rows, source, false, [&] {
        look();
        if (first < a_.num_scales) {
          pack = load_relaxed_system_16(from + layout().scale_packs_at + first / 3 * kPackBytes);
        }
        return arrived() && (first >= a_.num_scales || pack.w == f_.tag());
      }));
      if (outcome != Outcome::there) {
        break;
      }
      find_row();
      const uint64_t to_row = reinterpret_cast<uint64_t>(scales_of(max(row, int64_t{0})));
      const uint32_t words[3] = {pack.x, pack.y, pack.z};
#pragma unroll 1
      for (uint32_t left = __ballot_sync(kFullWarp, row >= 0); left != 0; left &= left - 1) {
        auto* to = reinterpret_cast<uint32_t*>(__shfl_sync(kFullWarp, to_row, __ffs(static_cast<int>(left)) - 1)) +
                   first * a_.scale_rows;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          if (first + j < a_.num_scales) {
            to[j * a_.scale_rows] = words[j];
          }
        }
      }
    }
    return outcome;
  }

  // Warps, each a row.
  __device__ void receive_rows(const Heard& heard) const {
    const int lane = lane_id(), rows_of_expert = f_.world_size() * a_.max_tokens;
    char* stage = stages_ + int64_t{warp_id()} * shape_.stage_bytes;
    uint64_t* barrier = &barriers_[warp_id()];
    // Loads that the barrier has counted: warp 0 of a block that sent has used it before.
    int n = a_.part == Part::both && warp_id() == 0 ? sent_here() : 0;
    const int step = f_.workers() * shape_.receive_warps;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x) + f_.workers() * warp_id(); i < rows_of_expert; i += step) {
      const int source = shape_.by_tokens.quotient(i), token = i - source * a_.max_tokens;
      int64_t row = -1;
      float weight = 0;
      if (heard.visits(layout(), source, token)) {
        const char* flag = f_.own(layout().dispatch_flag(f_.half(), source, token));
        auto outcome = Outcome::there;
        if (lane == 0) {
          outcome = f_.wait(Phase::rows, source, true, [&] { return load_acquire_system(flag) == f_.number(); });
        }
        if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
          break;
        }
        if (__all_sync(kFullWarp, outcome == Outcome::there)) {
          bulk_wait_read<0>();  // of what left from this stage
          __syncwarp();
          if (lane == 0) {
            fence_async_global();  // between the flag and the bulk copy of what it tells of
            fence_async_shared();
            barrier_expect(barrier, record_bytes_);
            bulk_load(stage, f_.own(layout().dispatch_row(f_.half(), source, token)), record_bytes_, barrier);
          }
          barrier_wait(barrier, n++ % 2);
          if (lane < a_.num_topk) {
            const Place place = reinterpret_cast<const Place*>(stage + places_at_)[lane];
            row = row_at(heard, source, place.expert, place.index);
            weight = place.weight;
          }
          place_row(stage, row);
        }
      }
      write_slot(i, row, weight);
    }
    bulk_wait<0>();
  }

  // Rows that this block has sent, by the first of its warps' barriers.
  __device__ int sent_here() const {
    const int first = static_cast<int>(blockIdx.x) - 1, blocks = f_.workers() - 1;
    return a_.quantize != Quantize::none || first < 0 || first >= a_.num_tokens
               ? 0
               : (a_.num_tokens - first + blocks - 1) / blocks;
  }

  // Of a whole warp: a record to the rows of all lanes.
  __device__ void place_row(const char* stage, int64_t row) const {
    if (row >= 0) {
      bulk_store(a_.rows + row * a_.row_bytes, stage, a_.row_bytes);
    }
    bulk_commit();
#pragma unroll 1
    for (uint32_t left = a_.num_scales != 0 ? __ballot_sync(kFullWarp, row >= 0) : 0; left != 0; left &= left - 1) {
      int* scales = scales_of(__shfl_sync(kFullWarp, row, __ffs(static_cast<int>(left)) - 1));
#pragma unroll 1
      for (int j = lane_id(); j < a_.num_scales; j += kWarp) {
        scales[j * a_.scale_rows] = reinterpret_cast<const int*>(stage + scales_at_)[j];
      }
    }
    __syncwarp();  // all have read the stage
  }

  const LowLatencyDispatchArgs& a_;
  const Flight f_;
  const Entries entries_;
  const int num_local_;
  const int scales_at_, places_at_, record_bytes_;
  const LowLatencyShape& shape_;
  unsigned long long* waited_;
  bool* is_lost_;  // ranks
  char* stages_;
  uint64_t* barriers_;  // of each warp
  int* words_;
};

template <class T, bool is_packed>
__global__ void __launch_bounds__(kThreads, 1) low_latency_dispatch_kernel(
    const __grid_constant__ LowLatencyDispatchArgs args,
    const __grid_constant__ LowLatencyShape shape) {
  ask_for(args);
  __shared__ LowLatencyShared shared;
  LowLatencyDispatch<is_packed>(args, shape, shared).template run<T>();
}

bool is_packed(const LowLatencyDispatchArgs& args) {
  return args.max_tokens <= args.comm.low_latency.packed_tokens;
}

template <bool is_packed>
LowLatencyShape shape_of(const LowLatencyDispatchArgs& args) {
  const LowLatencyLayout& layout = args.comm.low_latency;
  LowLatencyShape shape{};
  shape.stage_bytes = static_cast<int>(round_up(args.record_bytes(), 128));
  shape.parts = chunks_of(args.row_bytes / 16) + (args.num_scales > 0 ? 1 : 0);
  shape.by_parts = Divisor(shape.parts);
  shape.by_tokens = Divisor(std::max(args.max_tokens, 1));
  shape.by_local = Divisor(args.num_experts / layout.world_size);
  shape.by_words = Divisor(layout.words);
  shape.by_rows = Divisor(layout.world_size * std::max(args.max_tokens, 1));
  if (!is_packed) {
    const int64_t rest = kSharedBytes - LowLatencyDispatch<true>::shared_bytes(LowLatencyShape{}, args);
    shape.receive_warps = static_cast<int>(std::clamp<int64_t>(rest / shape.stage_bytes, 1, kMaxWarps));
  }
  return shape;
}

// A block for each token and for each row that may come, or for some parts of it; one that announces them; one that
// tells.
template <bool is_packed>
int blocks_of(const LowLatencyDispatchArgs& args, const LowLatencyShape& shape, int multiprocessors) {
  const int64_t rows = int64_t{args.comm.low_latency.world_size} * args.max_tokens;
  constexpr int kWarpsABlock = kMaxWarps / 2;
  const int64_t to_receive = is_packed ? (rows * shape.parts + kWarpsABlock - 1) / kWarpsABlock : rows;
  const int64_t to_send = args.num_tokens + 1;
  const int64_t workers =
      std::max({args.part == Part::send ? 0 : to_receive, args.part == Part::receive ? 0 : to_send, int64_t{2}});
  return static_cast<int>(std::min<int64_t>(workers + 1, std::max(multiprocessors, 3)));
}

template <class T, bool is_packed>
cudaError_t launch_as(const LowLatencyDispatchArgs& args, int multiprocessors, cudaStream_t stream) {
  const LowLatencyShape shape = shape_of<is_packed>(args);
  const auto shared = static_cast<int>(LowLatencyDispatch<is_packed>::shared_bytes(shape, args));
  const int blocks = blocks_of<is_packed>(args, shape, multiprocessors);
  const auto kernel = low_latency_dispatch_kernel<T, is_packed>;
  kernel<<<blocks, kThreads, shared, stream>>>(args, shape);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const LowLatencyDispatchArgs& args, int multiprocessors, cudaStream_t stream) {
  return is_packed(args) ? launch_as<T, true>(args, multiprocessors, stream)
                         : launch_as<T, false>(args, multiprocessors, stream);
}

}  // namespace

cudaError_t prepare_low_latency_dispatch() {
  constexpr auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  for (const auto kernel :
       {low_latency_dispatch_kernel<float, true>,
        low_latency_dispatch_kernel<float, false>,
        low_latency_dispatch_kernel<__nv_bfloat16, true>,
        low_latency_dispatch_kernel<__nv_bfloat16, false>,
        low_latency_dispatch_kernel<__half, true>,
        low_latency_dispatch_kernel<__half, false>}) {
    if (const auto error = cudaFuncSetAttribute(kernel, attribute, kSharedBytes); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_low_latency_dispatch(const LowLatencyDispatchArgs& args, int multiprocessors, cudaStream_t stream) {
  switch (args.element) {
    case Element::f32:
      return launch<float>(args, multiprocessors, stream);
    case Element::bf16:
      return launch<__nv_bfloat16>(args, multiprocessors, stream);
    case Element::f16:
      return launch<__half>(args, multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace ep::cuda
