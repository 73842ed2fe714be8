// ep::low_latency_combine: returns the experts' rows of each token, weighted and reduced, to the token's rank.
//   send     Each warp sends a part of one token of one rank: the token's rows on this rank reduced -> that rank.
//   receive  Each warp sums a part of one own token: the rows that every rank has sent for it reduced -> result.
// Rows are reduced on the rank of the experts, so that one row per (token, rank) crosses the link. Order and width of
// the sums are those of ep::combine. Small batches are sent in packets (Note [LL packets]), one chunk per warp. Large
// batches are sent by bulk copies, some columns per warp, each followed by a flag.
#include "core/device/launch.cuh"
#include "nvlink/device/low_latency.cuh"
#include "nvlink/device/packet.cuh"
#include "nvlink/device/reduce.cuh"
#include "nvlink/device/rows.cuh"

#include <algorithm>

namespace ep::nvlink {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kPieces = 7;
constexpr int kWarpBytes = kPieces * kPieceBytes;
constexpr int kSharedBytes = kMaxWarps * kWarpBytes;
constexpr int kRowParts = LowLatencyLayout::kRowFlags;
// Rows that a warp loads at once: to send, into shared memory; to receive packets, into registers.
constexpr int kSendAhead = 8, kReceiveAhead = 2;
constexpr int kAheadBytes = kSendAhead * kChunkVectors * 16;
static_assert(kMaxWarps * kAheadBytes <= kSharedBytes);

// How rows are sent. A separate receive reads it from the result of the send.
enum class Transfer { packets, bulk, either };

// What the host derives for a launch.
struct CombineShape {
  Divisor by_ranks, by_chunks, by_local;
  // Few rows in packets: half of the warps send and half receive, so that both prepare at the same time.
  bool has_receivers;
};

template <class T, Transfer kTransfer>
class LowLatencyCombine {
 public:
  __device__
  LowLatencyCombine(const LowLatencyCombineArgs& args, const CombineShape& shape, LowLatencyExchangeState& memory)
      : a_(args),
        shape_(shape),
        x_(args.comm, kCombineKind, args.part, args.status, memory),
        entries_{args.topk_idx, args.wide_idx},
        vectors_(args.row_bytes / 16),
        max_tokens_(args.part == Part::receive ? static_cast<int>(args.status[1]) : args.max_tokens),
        parts_(uses_packets() ? chunks_of(vectors_) : kRowParts) {
    extern __shared__ __align__(128) char shared[];
    memory_ = shared + (uses_packets() ? warp_id() % warps() * kAheadBytes : warp_id() * kWarpBytes);
  }

  // Block-collective.
  __device__ void run() {
    if (warp_id() == kMaxWarps - 1) {  // the one with the least to send
      x_.poll_state();
    }
    if (x_.publishes_credits()) {
      if (x_.begin()) {
        x_.publish_credits(a_.wait_ns);
      }
      return;
    }
    const bool is_sender = kTransfer != Transfer::either && sends();
    const int first = is_sender ? kNoRank : rank_of_slot(begin());  // before any wait
    // All warps of a block begin at one barrier.
    if (!(kTransfer == Transfer::either ? may_begin() : send(is_sender))) {
      return;
    }
    if (receives()) {
      receive(is_sender ? rank_of_slot(begin()) : first);
    }
    x_.end();
  }

 private:
  __device__ bool sends() const { return !shape_.has_receivers || warp_id() < kMaxWarps / 2; }
  __device__ bool receives() const {
    return a_.part != Part::send && (!shape_.has_receivers || warp_id() >= kMaxWarps / 2);
  }
  // This warp's work: every step()-th of (row, part).
  __device__ int warps() const { return shape_.has_receivers ? kMaxWarps / 2 : kMaxWarps; }
  __device__ int begin() const { return static_cast<int>(blockIdx.x) + x_.workers() * (warp_id() % warps()); }
  __device__ int step() const { return x_.workers() * warps(); }
  // The row of a piece of work.
  __device__ int row_of(int work) const { return uses_packets() ? shape_.by_chunks.quotient(work) : work / kRowParts; }
  __device__ const LowLatencyLayout& layout() const { return x_.layout(); }
  __device__ bool uses_packets() const {
    return kTransfer == Transfer::packets || (kTransfer == Transfer::either && max_tokens_ <= layout().packet_tokens);
  }

  // Part of a row that is sent by bulk copies.
  struct Columns {
    int begin, count;  // vectors
  };
  __device__ Columns columns_of(int part) const {
    const int most = (vectors_ + kRowParts - 1) / kRowParts, begin = min(part * most, vectors_);
    return {begin, min(most, vectors_ - begin)};
  }

  // The packet that a rank publishes as it enters: the values on which both sides must agree, and the number of the
  // exchange. With a separate packet, a rank waits only for peers whose rows it reads.
  __device__ uint4 entered_packet() const {
    return {
        static_cast<uint32_t>(max_tokens_),
        static_cast<uint32_t>(a_.handshake.hidden),
        static_cast<uint32_t>(a_.handshake.dtype),
        x_.tag()};
  }
  __device__ static bool agree(const uint4& a, const uint4& b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

  // --- send ---

  // Block-collective, after the first loads have been issued.
  __device__ bool may_begin() { return x_.begin() && (a_.part == Part::send || x_.is_next()); }

  // Block-collective. All warps begin the exchange here, whether they send or not. False: the exchange did not begin.
  __device__ bool send(bool is_sender) {
    const int work = is_sender ? x_.world_size() * max_tokens_ * parts_ : 0;
    RankSet ranks;  // those that may be written
    int parity = 0;
    bool has_begun = false;
    for (int i = begin(); i < work || !has_begun; i += step()) {
      const int pair = row_of(i), part = i - pair * parts_;
      // The sources take turns: Note [Peers in turn].
      const int token = shape_.by_ranks.quotient(pair), turn = pair - token * x_.world_size() + x_.me();
      const int source = turn < x_.world_size() ? turn : turn - x_.world_size();
      const int row = i < work ? row_of_lane(source, token) : -1;
      const float weight = row >= 0 ? a_.row_weights[row] : 0;
      const char* y = a_.y + int64_t{row} * a_.row_bytes;
      const uint32_t lanes = __ballot_sync(kFullWarp, row >= 0);
      const LaneVectors vectors(part, vectors_);
      LanePayload sum;
      if (uses_packets()) {  // all work that is possible before the exchange begins
        sum = reduce_lanes(lanes, y, weight, vectors);
      }
      if (!has_begun) {
        has_begun = true;
        if (!may_begin()) {
          return false;
        }
        ranks = is_sender ? enter() : RankSet{};
      }
      if (lanes == 0 || !ranks.has(source)) {
        continue;
      }
      if (!uses_packets()) {
        send_part(source, token, part, lanes, y, weight, parity);
      } else if (vectors.any()) {
        const int64_t packets = layout().combine_packets(x_.half(), x_.me(), token);
        Packets(sum, x_.tag()).send(x_.peer(source), packets + packet_offset(part));
      }
    }
    if (!uses_packets()) {
      fence_async_shared();  // the reduction uses this memory next
      __syncwarp();
    }
    return true;
  }

  // Warp-collective. Waits for credits. Then publishes, to the ranks that may be written, that this rank has entered.
  __device__ RankSet enter() const {
    const RankSet ranks = x_.writable();
    if (!uses_packets()) {
      fence_async_global();  // between the credit and the bulk copies that it permits
    }
    if (blockIdx.x == 0 && warp_id() == 0) {
      for (int p = lane_id(); p < x_.world_size(); p += kWarp) {
        if (ranks.has(p)) {
          x_.peer(p).put_packet(layout().entered(x_.half(), x_.me()), entered_packet());
        }
      }
      if (lane_id() == 0 && a_.part == Part::send) {
        a_.status[0] = static_cast<int64_t>(x_.number());
        a_.status[1] = max_tokens_;
      }
    }
    return ranks;
  }

  // One thread. The row of this lane's slot of a token; -1: none on this rank.
  __device__ int row_of_lane(int source, int token) const {
    const int most = a_.num_experts * max_tokens_;
    const int64_t first = (int64_t{source} * max_tokens_ + token) * a_.num_topk;
    const int row = lane_id() < a_.num_topk ? a_.recv_row[first + lane_id()] : -1;
    return row < most ? row : -1;
  }

  // Warp-collective. Adds the rows of `lanes`, at `y`, in that order. Rows go through shared memory for lack of
  // registers, although each lane reads only data that it loaded itself.
  __device__ LanePayload reduce_lanes(uint32_t lanes, const char* y, float weight, const LaneVectors& vectors) const {
    auto* mine = reinterpret_cast<uint4*>(memory_) + lane_id();
    Sum<T> sums[kVectorsPerLane];
#pragma unroll 1
    while (lanes != 0) {
      uint32_t ahead = lanes;
#pragma unroll 1
      for (int j = 0; j < kSendAhead && ahead != 0; ++j, ahead &= ahead - 1) {
        const uint64_t from = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(y), __ffs(static_cast<int>(ahead)) - 1);
#pragma unroll
        for (int i = 0; i < kVectorsPerLane; ++i) {
          const auto* vector = reinterpret_cast<const uint4*>(from) + vectors.at(i);
          copy_async_if<0>(vectors.has(i), mine + (j * kVectorsPerLane + i) * kWarp, vector);
        }
      }
      copy_commit();
      copy_wait<0>();
#pragma unroll 1
      for (int j = 0; lanes != ahead; ++j, lanes &= lanes - 1) {
        LanePayload row;
#pragma unroll
        for (int i = 0; i < kVectorsPerLane; ++i) {
          row.vectors[i] = mine[(j * kVectorsPerLane + i) * kWarp];
        }
        add_payload<true>(sums, row, __shfl_sync(kFullWarp, weight, __ffs(static_cast<int>(lanes)) - 1));
      }
    }
    return rounded(sums);
  }

  // One thread.
  template <bool weighted>
  __device__ static void add_payload(Sum<T> (&sums)[kVectorsPerLane], const LanePayload& u, float weight) {
#pragma unroll
    for (int i = 0; i < kVectorsPerLane; ++i) {
      sums[i].template add_term<weighted>(u.vectors[i], weight);
    }
  }

  // One thread.
  __device__ static LanePayload rounded(const Sum<T> (&sums)[kVectorsPerLane]) {
    LanePayload u;
#pragma unroll
    for (int i = 0; i < kVectorsPerLane; ++i) {
      u.vectors[i] = sums[i].rounded();
    }
    return u;
  }

  // Warp-collective. Sends a part of a row by bulk copies, followed by its flag.
  __device__ void send_part(int source, int token, int part, uint32_t lanes, const char* y, float weight, int& parity)
      const {
    constexpr int kDepth = kPieces - 2;  // the last two pieces hold data that is being copied to peers
    char* outgoing = memory_ + kDepth * kPieceBytes;
    const int lane = lane_id();
    const Columns columns = columns_of(part);
    const Peer peer = x_.peer(source);
    const int64_t to = layout().combine_row(x_.half(), x_.me(), token) + columns.begin * 16;
    const auto sink = [&](int piece, const uint4(&vectors)[kBatch]) {
      bulk_wait_read<1>();
      __syncwarp();
      char* stage = outgoing + parity * kPieceBytes;
      parity ^= 1;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        reinterpret_cast<uint4*>(stage)[b * kWarp + lane] = vectors[b];
      }
      fence_async_shared();
      __syncwarp();
      if (lane == 0) {
        const int bytes = min(kPieceBytes, columns.count * 16 - piece * kPieceBytes);
        peer.put(to + int64_t{piece} * kPieceBytes, stage, bytes);
      }
      bulk_commit();
    };
    reduce_rows<T, true, kDepth>({1, 1, lanes}, y + columns.begin * 16, weight, columns.count, memory_, sink);
    bulk_wait<0>();
    if (lane == 0) {
      peer.signal_copies(layout().combine_flag(x_.half(), x_.me(), token, part), x_.number());
    }
  }

  // --- receive ---

  static constexpr int kNoRank = -1;

  // Warp-collective. The rank whose row this lane awaits for a piece of work. Of the lanes whose slots are on one rank,
  // the first lane has that rank; the others have kNoRank.
  __device__ int rank_of_slot(int work) const {
    const bool has = work < a_.num_tokens * parts_ && lane_id() < a_.num_topk;
    const int entry = has ? entries_[int64_t{row_of(work)} * a_.num_topk + lane_id()].value() : -1;
    const int rank = entry >= 0 && entry < a_.num_experts ? shape_.by_local.quotient(entry) : kNoRank;
    const int first = __ffs(static_cast<int>(__match_any_sync(kFullWarp, rank))) - 1;
    return first == lane_id() ? rank : kNoRank;
  }

  // Warp-collective. `rank`: rank_of_slot of the first piece of work.
  __device__ void receive(int rank) const {
    for (int i = begin(); i < a_.num_tokens * parts_;) {
      const int token = row_of(i), part = i - token * parts_;
      const bool counts = rank != kNoRank && x_.is_active(rank);
      const bool going =
          uses_packets() ? receive_packets(counts, rank, token, part) : receive_part(counts, rank, token, part);
      if (!going) {
        return;
      }
      i += step();
      rank = rank_of_slot(i);
    }
  }

  // One thread. Polls the packet that a rank publishes as it enters.
  __device__ uint4 poll_entered(int rank) const { return x_.inbox().poll_packet(layout().entered(x_.half(), rank)); }

  // Warp-collective. On lanes with `counts`, waits until `rank` has entered the same exchange. `counts` becomes false
  // if the rank is absent. `entered`: a first poll. False: the exchange failed.
  __device__ bool await_rank(bool& counts, int rank, uint4 entered) const {
    bool going = true;
    if (counts) {
      auto outcome = Outcome::arrived;
      if (entered.w != x_.tag()) {
        outcome = x_.wait(Phase::handshake, rank, true, [&] {
          entered = poll_entered(rank);
          return entered.w == x_.tag();
        });
      }
      counts = outcome == Outcome::arrived;
      going = outcome != Outcome::failed;
      if (counts && !agree(entered, entered_packet())) {
        publish_mismatch(a_.comm, x_.number(), rank, entered_packet(), entered);
        going = false;
      }
    }
    return __all_sync(kFullWarp, going) != 0;
  }

  // One thread. Cold path: Note [Cold paths]. Static, since a pointer to this object would keep it out of registers.
  static __device__ __noinline__ void
  publish_mismatch(const Comm& comm, uint64_t number, int rank, uint4 ours, uint4 theirs) {
    FailureCause cause{Failure::mismatch, Phase::handshake, rank};
    cause.their_epoch = static_cast<int64_t>(number);
    const auto differ = [&](HandshakeField field, uint32_t mine, uint32_t other) {
      cause.field = field;
      cause.ours = static_cast<int32_t>(mine);
      cause.theirs = static_cast<int32_t>(other);
      return mine != other;
    };
    if (!differ(HandshakeField::hidden, ours.y, theirs.y) && !differ(HandshakeField::dtype, ours.z, theirs.z)) {
      differ(HandshakeField::max_tokens, ours.x, theirs.x);
    }
    LowLatencyExchange::publish_failure(comm, kCombineKind, number, false, cause);
  }

  // Warp-collective. Terms are added in the order of their lanes.
  __device__ bool receive_packets(bool counts, int rank, int token, int chunk) const {
    const LaneVectors vectors(chunk, vectors_);
    Packets packets[kReceiveAhead];
    int ranks[kReceiveAhead], count = 0;
    // Polls several rows once, before it waits for any of them.
    const auto poll = [&](uint32_t lanes) {
      count = 0;
#pragma unroll
      for (int j = 0; j < kReceiveAhead; ++j) {
        ranks[j] = __shfl_sync(kFullWarp, rank, lanes != 0 ? __ffs(static_cast<int>(lanes)) - 1 : 0);
        if (lanes != 0) {
          lanes &= lanes - 1;
          count = j + 1;
          if (vectors.any()) {
            packets[j].poll(x_.inbox(), packets_at(ranks[j], token, chunk));
          }
        }
      }
    };
    const uint32_t expected = __ballot_sync(kFullWarp, counts);
    const uint4 seen = counts ? poll_entered(rank) : uint4{};
    poll(expected);
    if (!await_rank(counts, rank, seen)) {
      return false;
    }
    uint32_t lanes = __ballot_sync(kFullWarp, counts);
    if (lanes != expected) {
      poll(lanes);
    }
    Sum<T> sums[kVectorsPerLane];
    bool is_empty = true;
    while (lanes != 0) {
#pragma unroll
      for (int j = 0; j < kReceiveAhead; ++j) {
        if (j < count) {
          lanes &= lanes - 1;
          auto outcome = Outcome::arrived;
          if (vectors.any() && !packets[j].arrived(x_.tag())) {
            outcome = x_.wait(Phase::rows, ranks[j], lane_id() == 0, [&] {
              packets[j].poll(x_.inbox(), packets_at(ranks[j], token, chunk));
              return packets[j].arrived(x_.tag());
            });
          }
          if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
            return false;
          }
          if (outcome == Outcome::arrived) {
            add_payload<false>(sums, packets[j].payload(), 1);
            is_empty = false;
          }
        }
      }
      poll(lanes);
    }
    store_payload(a_.out + int64_t{token} * a_.row_bytes, is_empty ? LanePayload{} : rounded(sums), vectors);
    return true;
  }

  __device__ int64_t packets_at(int rank, int token, int chunk) const {
    return layout().combine_packets(x_.half(), rank, token) + packet_offset(chunk);
  }

  // Warp-collective. Sums the columns of a part that arrived by bulk copies.
  __device__ bool receive_part(bool counts, int rank, int token, int part) const {
    if (!await_rank(counts, rank, counts ? poll_entered(rank) : uint4{})) {
      return false;
    }
    auto outcome = Outcome::arrived;
    if (counts) {
      const int64_t flag = layout().combine_flag(x_.half(), rank, token, part);
      outcome = x_.wait(Phase::rows, rank, true, [&] { return x_.inbox().poll_signal(flag) == x_.number(); });
    }
    if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
      return false;
    }
    __syncwarp();  // data that one lane acquired becomes visible to all lanes
    const uint32_t terms = __ballot_sync(kFullWarp, counts && outcome == Outcome::arrived);
    const Columns columns = columns_of(part);
    const char* row = x_.inbox().data(layout().combine_row(x_.half(), max(rank, 0), token) + columns.begin * 16);
    char* result = a_.out + int64_t{token} * a_.row_bytes + (columns.begin + lane_id()) * 16;
    const auto sink = [&](int piece, const uint4(&vectors)[kBatch]) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int v = piece * kPieceVectors + b * kWarp;
        if (v + lane_id() < columns.count) {
          *reinterpret_cast<uint4*>(result + int64_t{v} * 16) = vectors[b];
        }
      }
    };
    reduce_rows<T, false, kPieces>({terms, 0, 0}, row, 1, columns.count, memory_, sink);
    return true;
  }

  const LowLatencyCombineArgs& a_;
  const CombineShape& shape_;
  LowLatencyExchange x_;
  const Entries entries_;
  const int vectors_;
  const int max_tokens_;  // of the dispatch
  const int parts_;       // of a row
  char* memory_;          // of this warp
};

template <class T, Transfer kTransfer>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) low_latency_combine_kernel(
    const __grid_constant__ LowLatencyCombineArgs args,
    const __grid_constant__ CombineShape shape) {
  prefetch_arguments(args);
  await_kernels_before();
  __shared__ LowLatencyExchangeState memory;
  LowLatencyCombine<T, kTransfer>(args, shape, memory).run();
}

// One warp per part of a row, some warps per block, and one block that publishes credits.
int blocks_of(const LowLatencyCombineArgs& args, int multiprocessors) {
  constexpr int kWarpsPerBlock = kMaxWarps / 4;
  const int64_t to_send = args.part == Part::receive ? 0 : int64_t{args.comm.low_latency.world_size} * args.max_tokens;
  const int64_t to_receive = args.part == Part::send ? 0 : args.num_tokens;
  const int64_t parts = std::max(to_send, to_receive) * std::max(kRowParts, chunks_of(args.row_bytes / 16));
  const int64_t workers = std::max<int64_t>((parts + kWarpsPerBlock - 1) / kWarpsPerBlock, 1);
  return static_cast<int>(std::min<int64_t>(workers + 1, std::max(multiprocessors, 2)));
}

CombineShape shape_of(const LowLatencyCombineArgs& args, Transfer kTransfer, int blocks) {
  const int chunks = chunks_of(args.row_bytes / 16);
  const int64_t work = int64_t{args.comm.low_latency.world_size} * args.max_tokens * chunks;
  return {
      Divisor(args.comm.low_latency.world_size),
      Divisor(chunks),
      Divisor(args.num_experts / args.comm.low_latency.world_size),
      kTransfer == Transfer::packets && args.part == Part::both && work <= int64_t{blocks - 1} * (kMaxWarps / 2)};
}

Transfer transfer_of(const LowLatencyCombineArgs& args) {
  if (args.part == Part::receive) {
    return Transfer::either;
  }
  return args.max_tokens <= args.comm.low_latency.packet_tokens ? Transfer::packets : Transfer::bulk;
}

int shared_bytes(Transfer kTransfer, const CombineShape& shape) {
  return kTransfer == Transfer::packets ? kMaxWarps / (shape.has_receivers ? 2 : 1) * kAheadBytes : kSharedBytes;
}

template <class T>
cudaError_t launch(const LowLatencyCombineArgs& args, int multiprocessors, cudaStream_t stream) {
  const Transfer kTransfer = transfer_of(args);
  const auto kernel = kTransfer == Transfer::packets ? low_latency_combine_kernel<T, Transfer::packets>
                      : kTransfer == Transfer::bulk  ? low_latency_combine_kernel<T, Transfer::bulk>
                                                     : low_latency_combine_kernel<T, Transfer::either>;
  const int blocks = blocks_of(args, multiprocessors);
  const CombineShape shape = shape_of(args, kTransfer, blocks);
  const int shared = shared_bytes(kTransfer, shape);
  const Launch how = args.comm.shares_device ? Launch::plain : Launch::overlapped;
  return launch_kernel(how, kernel, blocks, kMaxWarps * kWarp, shared, stream, args, shape);
}

template <class T>
cudaError_t prepare() {
  for (const auto kernel :
       {low_latency_combine_kernel<T, Transfer::packets>,
        low_latency_combine_kernel<T, Transfer::bulk>,
        low_latency_combine_kernel<T, Transfer::either>}) {
    if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
        error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t prepare_low_latency_combine() {
  for (const auto prepare : {prepare<float>, prepare<__nv_bfloat16>, prepare<__half>}) {
    if (const auto error = prepare(); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_low_latency_combine(const LowLatencyCombineArgs& args, int multiprocessors, cudaStream_t stream) {
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
