// ep::low_latency_dispatch: rows to the ranks that need them, with their plan, in one exchange.
//   announce   the first block: which tokens go where and how many rows each expert gets, to every peer
//   send       the other blocks, a token each: row (quantised here) and where its copies belong -> every rank it visits
//   receive    warps of all blocks, a token each, or a part of one: arrived row -> its places in the result; then, some
//              experts each: how many rows there are
// Where a row belongs among those of its source and expert is counted by the source; the receiver adds what the ranks
// before it send, so it has to wait for nothing but the announcements. Few tokens travel in packs (Note [Packed rows]),
// many by bulk copies, each followed by a flag.
#include "device/counter.cuh"
#include "device/low_latency_receive.cuh"
#include "device/overlap.cuh"
#include "device/quantize.cuh"

#include <algorithm>
#include <climits>

namespace ep::cuda {
namespace {

constexpr int kThreads = kDispatchThreads;
constexpr int kMaxWarps = kDispatchWarps;
constexpr int kLookingWarp = kMaxWarps - 2;  // has little to send, and does not lead the Counter
constexpr int kSendStages = 2;
// Of what a block may ask for, less its variables.
constexpr int kSharedBytes = kStageMemory - 3 * 1024;

constexpr int kNowhere = INT_MIN;  // no expert

struct LowLatencyShared {
  FlightMemory flight;
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
        f_(args.comm, kDispatchKind, args.part, args.ticket, shared.flight),
        entries_{args.topk_idx, args.wide_idx},
        num_local_(args.num_experts / args.comm.low_latency.world_size),
        scales_at_(static_cast<int>(args.scales_at())),
        places_at_(static_cast<int>(args.places_at())),
        record_bytes_(static_cast<int>(args.record_bytes())),
        shape_(shape),
        shared_(shared) {
    extern __shared__ __align__(128) char memory[];
    auto* barriers = reinterpret_cast<uint64_t*>(memory + stages_bytes(shape));
    memory_ = {memory, barriers, reinterpret_cast<int*>(barriers + kMaxWarps), shared.is_lost};
    slots_ = reinterpret_cast<uint8_t*>(memory_.words) + words_bytes(layout());
  }

  static int64_t shared_bytes(const LowLatencyShape& shape, const LowLatencyDispatchArgs& args) {
    return stages_bytes(shape) + kMaxWarps * static_cast<int64_t>(sizeof(uint64_t)) +
           words_bytes(args.comm.low_latency) + round_up(args.num_experts, 4);
  }

  template <class T>
  __device__ void run() {
    if (warp_id() == kLookingWarp) {
      f_.look();
    }
    if (!is_packed && lane_id() == 0) {
      barrier_init(&memory_.barriers[warp_id()]);
      fence_barrier_init();
    }
    if (threadIdx.x < kMaxRanks) {
      shared_.is_lost[threadIdx.x] = false;
    }
    if (f_.is_teller()) {
      if (f_.begin()) {
        f_.tell(a_.wait_ns);
      }
      return;
    }
    if (a_.part == Part::receive) {
      if (!may_begin()) {
        return;
      }
    } else {
      if (!(blockIdx.x == 0 ? announce() : send<T>())) {
        return;
      }
      if (blockIdx.x == 0) {
        __syncthreads();  // this memory is for what is heard next
      }
    }
    if (a_.part != Part::send) {
      LowLatencyReceive<is_packed>(a_, shape_, f_, memory_, loads_before()).run();
    }
    f_.end();
  }

 private:
  // One is enough for packed rows: of what is quantised.
  EP_HOST_DEVICE static int64_t stages_bytes(const LowLatencyShape& shape) {
    const int stages = shape.receive_warps > kSendStages ? shape.receive_warps : kSendStages;
    return int64_t{shape.stage_bytes} * (is_packed ? 1 : stages);
  }
  // Of announce: counts and visits of all; of receive: words of all, which are more.
  EP_HOST_DEVICE static int64_t words_bytes(const LowLatencyLayout& layout) {
    return int64_t{layout.world_size} * layout.words * 4;
  }
  __device__ int rank_of(int expert) const { return shape_.by_local.quotient(expert); }
  __device__ const LowLatencyLayout& layout() const { return f_.layout(); }

  // Of a whole block, once it has asked for what it needs first.
  __device__ bool may_begin() { return f_.begin() && (a_.part == Part::send || f_.is_next()); }

  // --- announce ---

  // False: not begun.
  __device__ bool announce() {
    __shared__ bool may_write[kWarp];
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
    const int words = layout().words, visit_words = layout().visit_words(), world_size = f_.world_size();
    int* counts = memory_.words;                                                 // [experts]
    auto* visits = reinterpret_cast<uint32_t*>(memory_.words + a_.num_experts);  // [world_size][visit words]
    constexpr int kAhead = 4;  // tokens that a warp has on their way at once
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
      memory_.words[i] = 0;
    }
    if (!may_begin()) {
      return false;
    }
    const bool going = warp != kMaxWarps - 1 || f_.wait_for_credits(may_write[lane]);
#pragma unroll 1
    for (int first = warp; first < a_.num_tokens; first += kAhead * kMaxWarps) {
      if (first != warp) {
        load(first);
      }
#pragma unroll 1
      for (int token = first; token < min(first + kAhead * kMaxWarps, a_.num_tokens); token += kMaxWarps) {
        const int entry = entries[0];
#pragma unroll
        for (int j = 1; j < kAhead; ++j) {
          entries[j - 1] = entries[j];
        }
        const Token t = token_of(entry);
        if (t.expert >= 0) {
          atomicAdd(&counts[t.expert], 1);
        } else if (entry != -1) {
          record_fault(token, entry, t.first_same);
        }
        if ((ranks_of(entry) >> lane & 1) != 0) {
          atomicOr(&visits[lane * visit_words + token / 32], 1U << token % 32);
        }
      }
    }
    if (!__syncthreads_and(going)) {
      return true;
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
        value = Agreed(a_).word(word);
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
    return true;
  }

  // Of a slot of a token whose entry is bad: out of range, or the same as that of an earlier slot.
  __device__ void record_fault(int token, int entry, int earlier) const {
    const int64_t cause = entry < -1 || entry >= a_.num_experts ? kOutOfRange : earlier;
    const int64_t shape = int64_t{a_.num_topk} << 32 | a_.num_experts;
    f_.record({Failure::bad_topk, Phase::counts, f_.me(), token * a_.num_topk + lane_id(), cause, entry, shape});
  }

  // --- send ---

  // What the entries of one token say, in lane k of slot k.
  struct Token {
    int expert;      // kNowhere: none
    int first_same;  // the first slot with that entry
  };

  __device__ bool is_expert(int entry) const { return entry >= 0 && entry < a_.num_experts; }

  // Of a whole warp. `entry`: of the lane's slot; -1 beyond the last.
  __device__ Token token_of(int entry) const {
    const int first_same = __ffs(static_cast<int>(__match_any_sync(kFullWarp, entry))) - 1;
    return {is_expert(entry) && first_same == lane_id() ? entry : kNowhere, first_same};
  }

  // Likewise: bits of the ranks that the token visits.
  __device__ uint32_t ranks_of(int entry) const {
    return __reduce_or_sync(kFullWarp, is_expert(entry) ? 1U << rank_of(entry) : 0);
  }

  __device__ int entry_of(int token) const {
    return lane_id() < a_.num_topk ? entries_[int64_t{token} * a_.num_topk + lane_id()] : -1;
  }

  // Where rows are many, all warps count; where they are few, those that have no part of the row to send.
  using Counter = RowCounter<is_packed ? 4 : kMaxWarps>;

  // What the warp that leads the counting knows of the lane's slot.
  struct Lead {
    int expert = kNowhere;
    float weight = 0;
  };

  __device__ Lead begin_counting(Counter& counter, int token, int entry) const {
    Lead lead;
    if (Counter::leads()) {
      const int lane = lane_id();
      if (lane < a_.num_topk) {
        lead.weight = a_.topk_weights == nullptr ? 1 : a_.topk_weights[int64_t{token} * a_.num_topk + lane];
      }
      lead.expert = token_of(entry).expert;
      counter.begin(lead.expert);
    }
    return lead;
  }

  // False: not begun.
  template <class T>
  __device__ bool send() {
    if constexpr (is_packed) {
      return send_packed<T>();
    } else {
      return send_bulk<T>();
    }
  }

  template <class T>
  __device__ bool send_packed() {
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id(), blocks = f_.workers() - 1;
    const bool as_is = a_.quantize == Quantize::none;
    const Quantizer<T, kMaxWarps> quantizer(a_.quantize, a_.hidden, scales_at_, a_.num_scales);
    const int vectors = a_.row_bytes / 16;
    Counter counter(a_, shape_, entries_, slots_);
    uint32_t may_write = 0;
    bool has_begun = false;
#pragma unroll 1
    for (int token = static_cast<int>(blockIdx.x) - 1; token < a_.num_tokens; token += blocks) {
      // What is asked for here arrives while others are waited for.
      const int entry = entry_of(token);
      const char* x = a_.x + int64_t{token} * a_.hidden * static_cast<int>(sizeof(T));
      Unit unit_ahead{};
      typename Quantizer<T, kMaxWarps>::Ahead groups_ahead = {};
      if (as_is) {
        unit_ahead = load_unit(x, tid, vectors);
      } else {
        quantizer.load(reinterpret_cast<const T*>(x), warp_id(), groups_ahead);
      }
      if (Counter::counts()) {
        counter.load(token);
      }
      const Lead lead = begin_counting(counter, token, entry);
      if (!has_begun) {
        has_begun = true;
        if (!may_begin()) {
          return false;
        }
        bool may = false;
        may_write = f_.wait_for_credits(may) ? __ballot_sync(kFullWarp, may) : 0;
      } else if (Counter::counts()) {
        Counter::sync();
      }
      const uint32_t ranks = ranks_of(entry) & may_write;
      const int64_t packs = layout().dispatch_packs(f_.half(), f_.me(), token);
      if (Counter::counts()) {
        counter.count(token);
        Counter::sync();
      }
      if (Counter::leads()) {
        const int index = counter.end(lead.expert);
        if (lane < a_.num_topk) {
          const uint4 place{
              static_cast<uint32_t>(lead.expert), static_cast<uint32_t>(index), __float_as_uint(lead.weight), f_.tag()};
          to_each(ranks, packs + lane * kPackBytes, [&](char* to) { store_relaxed_system_16(to, place); });
        }
      }
      if (!as_is) {
        quantizer.run(reinterpret_cast<const T*>(x), memory_.stages, groups_ahead);
        __syncthreads();
        send_scales(ranks, packs + layout().scale_packs_at);
      }
#pragma unroll 1
      for (int unit = tid; unit * kUnitVectors < vectors; unit += kThreads) {
        const Unit u = as_is && unit == tid ? unit_ahead : load_unit(as_is ? x : memory_.stages, unit, vectors);
        to_each(
            ranks, packs + layout().row_packs_at + offset_of_unit(unit), [&](char* to) { send_unit(to, u, f_.tag()); });
      }
      if (!as_is) {
        __syncthreads();  // all have read the stage
      }
    }
    return has_begun || may_begin();
  }

  template <class Send>
  __device__ void to_each(uint32_t ranks, int64_t offset, const Send& send) const {
#pragma unroll 1
    for (; ranks != 0; ranks &= ranks - 1) {
      send(f_.peer(__ffs(static_cast<int>(ranks)) - 1, offset));
    }
  }

  // Of one warp. Three words a pack.
  __device__ void send_scales(uint32_t ranks, int64_t packs) const {
    if (warp_id() == kLookingWarp) {
      const auto* words = reinterpret_cast<const uint32_t*>(memory_.stages + scales_at_);
#pragma unroll 1
      for (int first = 3 * lane_id(); first < a_.num_scales; first += 3 * kWarp) {
        const auto word = [&](int i) { return i < a_.num_scales ? words[i] : 0; };
        const uint4 pack{word(first), word(first + 1), word(first + 2), f_.tag()};
        to_each(ranks, packs + first / 3 * kPackBytes, [&](char* to) { store_relaxed_system_16(to, pack); });
      }
    }
  }

  template <class T>
  __device__ bool send_bulk() {
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id(), blocks = f_.workers() - 1;
    const bool as_is = a_.quantize == Quantize::none;
    const Quantizer<T, kMaxWarps> quantizer(a_.quantize, a_.hidden, scales_at_, a_.num_scales);
    int untold = -1;  // the token of this lane's last copy, whose flag is still to be written
    const auto tell = [&](int token) {
      if (token >= 0) {
        fence_async_global();
        store_release_system(f_.peer(lane, layout().dispatch_flag(f_.half(), f_.me(), token)), f_.number());
      }
    };
    Counter counter(a_, shape_, entries_, slots_);
    int n = 0;
    bool has_begun = false, may_write = false;  // the latter: the rank of this lane
#pragma unroll 1
    for (int token = static_cast<int>(blockIdx.x) - 1; token < a_.num_tokens; token += blocks, ++n) {
      char* stage = memory_.stages + int64_t{n % kSendStages} * shape_.stage_bytes;
      const auto* x = reinterpret_cast<const T*>(a_.x) + int64_t{token} * a_.hidden;
      __syncwarp();  // all lanes have seen the load before
      if (as_is && tid == 0) {
        barrier_expect(&memory_.barriers[0], a_.row_bytes);
        bulk_load(stage, x, a_.row_bytes, &memory_.barriers[0]);
      }
      // What is asked for here arrives while others are waited for.
      const int entry = entry_of(token);
      typename Quantizer<T, kMaxWarps>::Ahead ahead = {};
      if (!as_is) {
        quantizer.load(x, warp_id(), ahead);
      }
      counter.load(token);
      const Lead lead = begin_counting(counter, token, entry);
      if (!has_begun) {
        has_begun = true;
        if (!may_begin()) {
          if (as_is && tid == 0) {
            barrier_wait(&memory_.barriers[0], 0);  // nothing is to arrive in the memory of a block that has ended
          }
          return false;
        }
        if (warp_id() == 0) {
          may_write = f_.wait_for_credits(may_write) && may_write;
          fence_async_global();  // between the credit and the bulk copies that it allows
        }
      } else {
        __syncthreads();  // what was in this stage has left
      }
      counter.count(token);
      if (!as_is) {
        quantizer.run(x, stage, ahead);
      }
      Counter::sync();
      if (Counter::leads()) {
        const int index = counter.end(lead.expert);
        if (lane < a_.num_topk) {
          reinterpret_cast<Place*>(stage + places_at_)[lane] = {lead.expert, index, lead.weight, 0};
        }
      }
      fence_async_shared();
      __syncthreads();
      if (warp_id() != 0) {
        continue;
      }
      if (as_is) {
        barrier_wait(&memory_.barriers[0], n % 2);
      }
      const uint32_t ranks = ranks_of(entry);
      const bool visits = may_write && (ranks >> lane & 1) != 0;
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
    return has_begun || may_begin();
  }

  // That the barrier of this warp has counted: of rows that warp 0 has sent as they are.
  __device__ int loads_before() const {
    const int first = static_cast<int>(blockIdx.x) - 1, blocks = f_.workers() - 1;
    const bool has_sent = !is_packed && a_.part == Part::both && warp_id() == 0 && a_.quantize == Quantize::none &&
                          first >= 0 && first < a_.num_tokens;
    return has_sent ? (a_.num_tokens - first + blocks - 1) / blocks : 0;
  }

  const LowLatencyDispatchArgs& a_;
  Flight f_;
  const Entries entries_;
  const int num_local_;
  const int scales_at_, places_at_, record_bytes_;
  const LowLatencyShape& shape_;
  LowLatencyShared& shared_;
  LowLatencyMemory memory_;
  uint8_t* slots_;  // of the Counter
};

template <class T, bool is_packed>
__global__ void __launch_bounds__(kThreads, 1) low_latency_dispatch_kernel(
    const __grid_constant__ LowLatencyDispatchArgs args,
    const __grid_constant__ LowLatencyShape shape) {
  ask_for(args);
  await_kernels_before();
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
  shape.by_topk = Divisor(args.num_topk);
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
  return launch_overlapped(!args.comm.shares_device, kernel, blocks, kThreads, shared, stream, args, shape);
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
