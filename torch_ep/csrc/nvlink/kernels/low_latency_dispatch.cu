// ep::low_latency_dispatch: plans and copies rows to the ranks that need them, in one exchange.
//   announce  The first block announces to every peer which tokens visit it, and the number of rows per expert.
//   send      Every other block sends tokens; with packets, each of its warps sends chunks of tokens. It quantizes a
//             row, and sends it with one SlotRoute per slot to every rank that the token visits.
//   receive   Every warp of all blocks receives rows, or chunks of rows: arrived row -> its rows of the result. Then it
//             writes the number of rows of some experts.
// The source counts a row's index among its own rows for an expert. The receiver adds the rows of lower ranks, so it
// waits only for the announcements. Small batches are sent in packets (Note [LL packets]), large batches by bulk
// copies, each followed by a flag.
#include "core/device/launch.cuh"
#include "nvlink/device/counter.cuh"
#include "nvlink/device/low_latency_receive.cuh"
#include "nvlink/device/quantize.cuh"

#include <algorithm>
#include <climits>

namespace ep::nvlink {
namespace {

constexpr int kThreads = kDispatchThreads;
constexpr int kMaxWarps = kDispatchWarps;
constexpr int kStateWarp = kMaxWarps - 2;  // has little to send, and does not lead the Counter
constexpr int kSendStages = 2;
// Dynamic shared memory of a thread block: less than kStageMemory by the static variables.
constexpr int kSharedBytes = kStageMemory - 3 * 1024;

constexpr int kNoExpert = INT_MIN;

struct LowLatencyShared {
  LowLatencyExchangeState exchange;
  bool is_lost[kMaxRanks];
};

// `uses_packets`: how rows are sent. There is a kernel for either value, since they share little code.
template <bool uses_packets>
class LowLatencyDispatch {
 public:
  __device__
  LowLatencyDispatch(const LowLatencyDispatchArgs& args, const LowLatencyShape& shape, LowLatencyShared& shared)
      : a_(args),
        x_(args.comm, kDispatchKind, args.part, args.status, shared.exchange),
        entries_{args.topk_idx, args.wide_idx},
        num_local_(args.num_experts / args.comm.low_latency.world_size),
        scales_at_(static_cast<int>(args.scales_at())),
        routes_at_(static_cast<int>(args.routes_at())),
        wire_row_bytes_(static_cast<int>(args.wire_row_bytes())),
        shape_(shape),
        shared_(shared) {
    extern __shared__ __align__(128) char memory[];
    auto* barriers = reinterpret_cast<uint64_t*>(memory + stages_bytes(shape));
    memory_ = {memory, barriers, reinterpret_cast<int*>(barriers + kMaxWarps), shared.is_lost};
    published_ = memory_.words + words(layout());
    slots_ = reinterpret_cast<uint8_t*>(published_ + words(layout()));
  }

  static int64_t shared_bytes(const LowLatencyShape& shape, const LowLatencyDispatchArgs& args) {
    return stages_bytes(shape) + kMaxWarps * static_cast<int64_t>(sizeof(uint64_t)) +
           2 * 4 * words(args.comm.low_latency) + round_up(args.num_experts, 4);
  }

  // Block-collective.
  template <class T>
  __device__ void run() {
    if (warp_id() == kStateWarp) {
      x_.poll_state();
    }
    if (!uses_packets && lane_id() == 0) {
      barrier_init(&memory_.barriers[warp_id()]);
      fence_barrier_init();
    }
    if (threadIdx.x < kMaxRanks) {
      shared_.is_lost[threadIdx.x] = false;
    }
    if (x_.publishes_credits()) {
      if (x_.begin()) {
        x_.publish_credits(a_.wait_ns);
      }
      return;
    }
    if (!(a_.part == Part::receive ? may_begin() : blockIdx.x == 0 ? announce() : send<T>())) {
      return;
    }
    if (a_.part != Part::send) {
      LowLatencyReceive<uses_packets>(a_, shape_, x_, memory_, loads_before()).run();
    }
    x_.end();
  }

 private:
  EP_HOST_DEVICE static int64_t stages_bytes(const LowLatencyShape& shape) {
    const int stages = shape.receive_warps > kSendStages ? shape.receive_warps : kSendStages;
    return uses_packets ? 0 : int64_t{shape.stage_bytes} * stages;
  }
  // Words of the announcements of all ranks: those that this rank receives, or those that it publishes.
  EP_HOST_DEVICE static int64_t words(const LowLatencyLayout& layout) {
    return int64_t{layout.world_size} * layout.words;
  }
  __device__ int rank_of(int expert) const { return shape_.by_local.quotient(expert); }
  __device__ const LowLatencyLayout& layout() const { return x_.layout(); }

  // Block-collective, after the first loads have been issued.
  __device__ bool may_begin() { return x_.begin() && (a_.part == Part::send || x_.is_next()); }

  // --- announce ---

  // Block-collective. False: the exchange did not begin.
  __device__ bool announce() {
    const int words = layout().words, all = x_.world_size() * words;
    Entry first[kTokensAhead];
    load_entries(warp_id(), first);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
      published_[i] = 0;
    }
    __syncthreads();
    for (int i = lane_id(); warp_id() == kMaxWarps - 1 && i < x_.world_size() * Handshake::kFields; i += kWarp) {
      const int p = i / Handshake::kFields, field = i - p * Handshake::kFields;
      published_[p * words + field] = a_.handshake.field(field);
    }
    const bool faulty = count(first);
    if (!may_begin()) {
      return false;
    }
    const RankSet may_write = x_.writable();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
      if (const int p = shape_.by_words.quotient(i); may_write.has(p)) {
        const int64_t to = layout().announcement(x_.half(), x_.me()) + int64_t{i - p * words} * 8;
        x_.peer(p).put_word(to, x_.word_of(static_cast<uint32_t>(published_[i])));
      }
    }
    if (faulty) {
      publish_faults();
    }
    if (threadIdx.x == 0 && a_.part == Part::send) {
      *a_.status = static_cast<int64_t>(x_.number());
    }
    return true;
  }

  static constexpr int kTokensAhead = 4;  // tokens that a warp loads at once

  // Warp-collective. Loads the entries of the warp's tokens from `first` on.
  __device__ void load_entries(int first, Entry (&entries)[kTokensAhead]) const {
#pragma unroll
    for (int i = 0; i < kTokensAhead; ++i) {
      const int token = first + i * kMaxWarps;
      entries[i] = token < a_.num_tokens ? entry_of(token) : Entry{};
    }
  }

  // Warp-collective. Counts this warp's tokens. `entries`: those of its first tokens. True: an entry is bad.
  __device__ bool count(Entry (&entries)[kTokensAhead]) const {
    const int words = layout().words;
    bool faulty = false;
#pragma unroll 1
    for (int first = warp_id(); first < a_.num_tokens; first += kTokensAhead * kMaxWarps) {
      if (first != warp_id()) {
        load_entries(first, entries);
      }
#pragma unroll 1
      for (int token = first; token < min(first + kTokensAhead * kMaxWarps, a_.num_tokens); token += kMaxWarps) {
        const int entry = entries[0].value(), expert = expert_of(entry);
#pragma unroll
        for (int i = 1; i < kTokensAhead; ++i) {
          entries[i - 1] = entries[i];
        }
        if (expert >= 0) {
          const int p = rank_of(expert);
          int* published = published_ + p * words + Handshake::kFields;
          atomicAdd(&published[expert - p * num_local_], 1);
          atomicOr(
              &published[layout().num_local_experts + token / LowLatencyLayout::kVisitBits],
              1U << token % LowLatencyLayout::kVisitBits);
        }
        faulty = faulty || (expert < 0 && entry != -1);
      }
    }
    return __any_sync(kFullWarp, faulty) != 0;
  }

  // Warp-collective. Reports entries that are out of range, or equal to that of an earlier slot.
  __device__ void publish_faults() const {
#pragma unroll 1
    for (int token = warp_id(); token < a_.num_tokens; token += kMaxWarps) {
      const int entry = entry_of(token).value();
      const int earlier = __ffs(static_cast<int>(__match_any_sync(kFullWarp, entry))) - 1;
      const bool in_range = is_expert(entry);
      if (entry != -1 && !(in_range && earlier == lane_id())) {
        FailureCause cause{in_range ? Failure::duplicate_expert : Failure::bad_expert, Phase::counts, x_.me()};
        cause.token = token;
        cause.slot = lane_id();
        cause.earlier_slot = earlier;
        cause.ours = a_.num_experts;
        cause.theirs = entry;
        x_.publish_failure(cause);
      }
    }
  }

  // --- send ---

  __device__ bool is_expert(int entry) const { return entry >= 0 && entry < a_.num_experts; }

  // Warp-collective. Lane k has entry k of a token, -1 beyond the last slot. kNoExpert: no expert, or the expert of an
  // earlier slot.
  __device__ int expert_of(int entry) const {
    const int first_same = __ffs(static_cast<int>(__match_any_sync(kFullWarp, entry))) - 1;
    return first_same == lane_id() && is_expert(entry) ? entry : kNoExpert;
  }

  // Warp-collective. The ranks that a token visits. Lane k has entry k.
  __device__ RankSet ranks_of(int entry) const {
    RankSet ranks;
    const int rank = is_expert(entry) ? rank_of(entry) : -1;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      const bool is_here = rank >= 0 && rank / kWarp == step;
      ranks.words[step] = __reduce_or_sync(kFullWarp, is_here ? 1U << rank % kWarp : 0);
    }
    return ranks;
  }

  // One thread. The entry of this lane's slot.
  __device__ Entry entry_of(int token) const {
    return lane_id() < a_.num_topk ? entries_[int64_t{token} * a_.num_topk + lane_id()] : Entry{};
  }
  // One thread. The weight of this lane's slot.
  __device__ float weight_of(int token) const {
    const bool has = lane_id() < a_.num_topk && a_.topk_weights != nullptr;
    return has ? a_.topk_weights[int64_t{token} * a_.num_topk + lane_id()] : 1;
  }

  // All warps count large batches; the last warp counts small batches.
  using Counter = RowCounter<uses_packets ? 1 : kMaxWarps>;

  // Block-collective. False: the exchange did not begin.
  template <class T>
  __device__ bool send() {
    if constexpr (uses_packets) {
      return send_packets<T>();
    } else {
      return send_bulk<T>();
    }
  }

  // Block-collective. Each warp sends chunks of tokens; the last warp of a block sends the SlotRoutes of some tokens.
  template <class T>
  __device__ bool send_packets() {
    const int lane = lane_id(), senders = x_.workers() - 1, chunks = shape_.parts;
    const bool leads = Counter::leads();
    const int end = leads ? a_.num_tokens : a_.num_tokens * chunks;
    const int step = leads ? senders : senders * (kMaxWarps - 1);
    Counter counter(a_, entries_, slots_);
    PerRank<int> to;  // this lane's ranks
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      to[step] = rank_in_turn(step, x_.me() + static_cast<int>(blockIdx.x) + warp_id(), x_.world_size());
    }
    RankSet may_write;
    bool has_begun = false;
#pragma unroll 1
    for (int n = static_cast<int>(blockIdx.x) - 1 + (leads ? 0 : senders * warp_id()); n < end || !has_begun;
         n += step) {
      const int token = leads ? n : shape_.by_parts.quotient(n), chunk = leads ? 0 : n - token * chunks;
      // These loads overlap the waits below.
      const Entry entry = n < end ? entry_of(token) : Entry{};
      const LaneVectors vectors(chunk, leads || n >= end ? 0 : a_.row_bytes / 16);
      const T* x = reinterpret_cast<const T*>(a_.x) + int64_t{token} * a_.hidden;
      LanePayload payload;
      Channels<T> channels[kVectorsPerLane];
      float weight = 1;
      if (leads && n < end) {
        weight = weight_of(token);
        counter.load(token);
      } else if (a_.quantize == Quantize::none) {
        payload = load_payload(reinterpret_cast<const char*>(x), vectors);
      } else {
#pragma unroll
        for (int i = 0; i < kVectorsPerLane; ++i) {
          channels[i].load(x, vectors.at(i), vectors.has(i));
        }
      }
      if (!has_begun) {
        has_begun = true;
        if (!may_begin()) {
          return false;
        }
        may_write = x_.writable();
      }
      float scales[kVectorsPerLane] = {};
      if (!leads && a_.quantize != Quantize::none) {
        quantize(channels, a_.quantize, payload.vectors, scales);
      }
      const int64_t packets = layout().dispatch_packets(x_.half(), x_.me(), token, shape_.packet_row_bytes);
      Packets payload_packets(payload, x_.tag());
      // One more packet: scales, or a SlotRoute.
      uint4 extra{__float_as_uint(scales[0]), __float_as_uint(scales[1]), __float_as_uint(scales[2]), x_.tag()};
      int64_t extra_at =
          layout().scale_packets_at + (chunk * kScalePacketsPerChunk + lane / kGroupVectors) * kPacketBytes;
      bool has_extra = a_.num_scales > 0 && vectors.any() && lane % kGroupVectors == 0;
      if (leads && n < end) {
        extra = route_of(counter, token, entry.value(), weight);
        extra_at = lane * kPacketBytes;
        has_extra = lane < a_.num_topk;
      }
      keep_together(extra);
#pragma unroll
      for (uint4& packet : payload_packets.packets) {
        keep_together(packet);
      }
      const RankSet ranks = ranks_of(entry.value());
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        const int rank = to[step];
        const bool visits = rank < x_.world_size() && ranks.has(rank) && may_write.has(rank);
#pragma unroll 1
        for (uint32_t lanes = __ballot_sync(kFullWarp, visits); lanes != 0; lanes &= lanes - 1) {
          const Peer peer = x_.peer(__shfl_sync(kFullWarp, rank, __ffs(static_cast<int>(lanes)) - 1));
          if (vectors.any()) {
            payload_packets.send(peer, packets + layout().row_packets_at + packet_offset(chunk));
          }
          if (has_extra) {
            peer.put_packet(packets + extra_at, extra);
          }
        }
      }
    }
    return true;
  }

  // Warp-collective, in the warp that counts. The SlotRoute of this lane's slot, as a packet.
  __device__ uint4 route_of(Counter& counter, int token, int entry, float weight) const {
    const int expert = expert_of(entry);
    counter.begin(expert);
    Counter::sync();
    counter.count(token);
    Counter::sync();
    const int index = counter.end(expert);
    return {static_cast<uint32_t>(expert), static_cast<uint32_t>(index), __float_as_uint(weight), x_.tag()};
  }

  // Block-collective. Each block sends whole tokens.
  template <class T>
  __device__ bool send_bulk() {
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id(), blocks = x_.workers() - 1;
    const bool as_is = a_.quantize == Quantize::none;
    // Of this lane's ranks: the token of the last copy, whose flag is still to be written.
    PerRank<int> to, unsignaled;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      to[step] = rank_in_turn(step, x_.me() + static_cast<int>(blockIdx.x), x_.world_size());
      unsignaled[step] = -1;
    }
    const auto signal = [&] {
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        if (const int token = unsignaled[step]; token >= 0) {
          x_.peer(to[step]).signal_copies(layout().dispatch_flag(x_.half(), x_.me(), token), x_.number());
        }
      }
    };
    Counter counter(a_, entries_, slots_);
    int n = 0;
    bool has_begun = false;
    RankSet may_write;
#pragma unroll 1
    for (int token = static_cast<int>(blockIdx.x) - 1; token < a_.num_tokens; token += blocks, ++n) {
      char* stage = memory_.stages + int64_t{n % kSendStages} * shape_.stage_bytes;
      const auto* x = reinterpret_cast<const T*>(a_.x) + int64_t{token} * a_.hidden;
      __syncwarp();  // all lanes have waited for the previous load
      if (as_is && tid == 0) {
        barrier_expect(&memory_.barriers[0], a_.row_bytes);
        bulk_load(stage, x, a_.row_bytes, &memory_.barriers[0]);
      }
      // These loads overlap the waits below.
      const Entry entry = entry_of(token);
      const float weight = weight_of(token);
      Channels<T> ahead[1];
      if (!as_is) {
        load_piece(x, warp_id(), ahead);
      }
      counter.load(token);
      int expert = kNoExpert;
      if (Counter::leads()) {
        expert = expert_of(entry.value());
        counter.begin(expert);
      }
      if (!has_begun) {
        has_begun = true;
        if (!may_begin()) {
          if (as_is && tid == 0) {
            barrier_wait(&memory_.barriers[0], 0);  // no copy may arrive in the shared memory of a block that has ended
          }
          return false;
        }
        if (warp_id() == 0) {
          may_write = x_.writable();
          fence_async_global();  // between the credit and the bulk copies that it allows
        }
      } else {
        __syncthreads();  // the copies out of this stage have ended
      }
      counter.count(token);
      if (!as_is) {
        quantize_row(x, stage, ahead);
      }
      Counter::sync();
      if (Counter::leads()) {
        const int index = counter.end(expert);
        if (lane < a_.num_topk) {
          reinterpret_cast<SlotRoute*>(stage + routes_at_)[lane] = {expert, index, weight, 0};
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
      const RankSet ranks = ranks_of(entry.value());
      PerRank<bool> visits;
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        const int rank = to[step];
        visits[step] = rank < x_.world_size() && ranks.has(rank) && may_write.has(rank);
        if (visits[step]) {
          x_.peer(rank).put(layout().dispatch_row(x_.half(), x_.me(), token), stage, wire_row_bytes_);
        }
      }
      bulk_commit();
      // fault: low latency: flag before its row
      bulk_wait<1>();  // all but this token's
      signal();
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        unsignaled[step] = visits[step] ? token : -1;
      }
    }
    if (warp_id() == 0) {
      bulk_wait<0>();
      signal();
    }
    __syncthreads();
    fence_async_shared();  // received rows use this memory next
    return has_begun || may_begin();
  }

  // Warp-collective. Loads piece n of a row to be quantized, one vector per lane.
  template <class T>
  __device__ void load_piece(const T* x, int n, Channels<T> (&channels)[1]) const {
    const int v = n * kWarp + lane_id();
    channels[0].load(x, v, v < a_.row_bytes / 16);
  }

  // Block-collective. Quantizes a row into `stage`, with its scales. `channels`: the warp's first piece.
  template <class T>
  __device__ void quantize_row(const T* x, char* stage, Channels<T> (&channels)[1]) const {
    const int vectors = a_.row_bytes / 16;
#pragma unroll 1
    for (int n = warp_id(); n * kWarp < vectors; n += kMaxWarps) {
      if (n != warp_id()) {
        load_piece(x, n, channels);
      }
      uint4 vector[1];
      float scale[1];
      quantize(channels, a_.quantize, vector, scale);
      const int v = n * kWarp + lane_id(), group = v / kGroupVectors;
      if (v < vectors) {
        reinterpret_cast<uint4*>(stage)[v] = vector[0];
        if (v % kGroupVectors != 0) {
          continue;
        }
        if (a_.quantize == Quantize::fp8_ue8m0) {
          stage[scales_at_ + group] = static_cast<char>(exponent_of(scale[0]));
        } else {
          reinterpret_cast<float*>(stage + scales_at_)[group] = scale[0];
        }
      }
    }
    // Exponents of padding groups.
    const int groups = (vectors + kGroupVectors - 1) / kGroupVectors;
    const auto tid = static_cast<int>(threadIdx.x);
    if (a_.quantize == Quantize::fp8_ue8m0 && tid < 4 && groups + tid < a_.num_scales * 4) {
      stage[scales_at_ + groups + tid] = 0;
    }
  }

  // Earlier loads on this warp's barrier: rows that warp 0 has sent unquantized.
  __device__ int loads_before() const {
    const int first = static_cast<int>(blockIdx.x) - 1, blocks = x_.workers() - 1;
    const bool has_sent = !uses_packets && a_.part == Part::both && warp_id() == 0 && a_.quantize == Quantize::none &&
                          first >= 0 && first < a_.num_tokens;
    return has_sent ? (a_.num_tokens - first + blocks - 1) / blocks : 0;
  }

  const LowLatencyDispatchArgs& a_;
  LowLatencyExchange x_;
  const Entries entries_;
  const int num_local_;
  const int scales_at_, routes_at_, wire_row_bytes_;
  const LowLatencyShape& shape_;
  LowLatencyShared& shared_;
  LowLatencyMemory memory_;
  int* published_;  // in the block that announces
  uint8_t* slots_;  // of the Counter
};

template <class T, bool uses_packets>
__global__ void __launch_bounds__(kThreads, 1) low_latency_dispatch_kernel(
    const __grid_constant__ LowLatencyDispatchArgs args,
    const __grid_constant__ LowLatencyShape shape) {
  prefetch_arguments(args);
  await_kernels_before();
  __shared__ LowLatencyShared shared;
  LowLatencyDispatch<uses_packets>(args, shape, shared).template run<T>();
}

bool uses_packets(const LowLatencyDispatchArgs& args) {
  return args.comm.low_latency.use_packets(args.max_tokens, args.row_bytes);
}

template <bool uses_packets>
LowLatencyShape shape_of(const LowLatencyDispatchArgs& args) {
  const LowLatencyLayout& layout = args.comm.low_latency;
  LowLatencyShape shape{};
  shape.stage_bytes = static_cast<int>(round_up(args.wire_row_bytes(), 128));
  shape.parts = chunks_of(args.row_bytes / 16);
  shape.packet_row_bytes = static_cast<int>(layout.packet_row_bytes_of(args.row_bytes));
  shape.by_parts = Divisor(shape.parts);
  shape.by_tokens = Divisor(std::max(args.max_tokens, 1));
  shape.by_local = Divisor(args.num_experts / layout.world_size);
  shape.by_words = Divisor(layout.words);
  shape.by_rows = Divisor(layout.world_size * std::max(args.max_tokens, 1));
  if (!uses_packets) {
    const int64_t rest = kSharedBytes - LowLatencyDispatch<true>::shared_bytes(LowLatencyShape{}, args);
    shape.receive_warps = static_cast<int>(std::clamp<int64_t>(rest / shape.stage_bytes, 1, kMaxWarps));
  }
  return shape;
}

// One block per token and per row that may arrive, or per some chunks of a row; one block that announces, and one that
// publishes credits.
template <bool uses_packets>
int blocks_of(const LowLatencyDispatchArgs& args, const LowLatencyShape& shape, int multiprocessors) {
  const int64_t rows = int64_t{args.comm.low_latency.world_size} * args.max_tokens;
  constexpr int kWarpsPerBlock = 2;
  const int64_t to_receive = uses_packets ? (rows * shape.parts + kWarpsPerBlock - 1) / kWarpsPerBlock : rows;
  const int64_t to_send = args.num_tokens + 1;
  const int64_t workers =
      std::max({args.part == Part::send ? 0 : to_receive, args.part == Part::receive ? 0 : to_send, int64_t{2}});
  return static_cast<int>(std::min<int64_t>(workers + 1, std::max(multiprocessors, 3)));
}

template <class T, bool uses_packets>
cudaError_t launch_as(const LowLatencyDispatchArgs& args, int multiprocessors, cudaStream_t stream) {
  const LowLatencyShape shape = shape_of<uses_packets>(args);
  const auto shared = static_cast<int>(LowLatencyDispatch<uses_packets>::shared_bytes(shape, args));
  const int blocks = blocks_of<uses_packets>(args, shape, multiprocessors);
  const auto kernel = low_latency_dispatch_kernel<T, uses_packets>;
  const Launch how = args.comm.shares_device ? Launch::plain : Launch::overlapped;
  return launch_kernel(how, kernel, blocks, kThreads, shared, stream, args, shape);
}

template <class T>
cudaError_t launch(const LowLatencyDispatchArgs& args, int multiprocessors, cudaStream_t stream) {
  return uses_packets(args) ? launch_as<T, true>(args, multiprocessors, stream)
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

}  // namespace ep::nvlink
