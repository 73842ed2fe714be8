// ep::low_latency_combine: the experts' rows of each token, weighted and summed, back to the rank whose token it is.
//   send      warps, each a part of one token of one rank: its rows here summed -> that rank
//   receive   warps, each a part of one own token: what every rank sent for it summed -> result
// Rows are summed where the experts are, so that one crosses the link for each (token, rank); the order and the width
// of the sums are those of ep::combine. Sums of few tokens travel in packs (Note [Packed rows]), a chunk to a warp; of
// many by bulk copies, some of their columns to a warp, followed by a flag.
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
// Packed rows that a warp has on their way at once: to sum, in shared memory; to receive, in registers.
constexpr int kSendAhead = 8, kReceiveAhead = 2;
constexpr int kAheadBytes = kSendAhead * kChunkVectors * 16;
static_assert(kMaxWarps * kAheadBytes <= kSharedBytes);

// How rows travel. What receives alone learns it from its ticket.
enum class Way { packed, bulk, either };

// Of the launch.
struct CombineShape {
  Divisor by_ranks, by_chunks, by_local;
  // Of few packed rows: half of the warps send and half of them receive, so that neither prepares after the other.
  bool has_receivers;
};

template <class T, Way way>
class LowLatencyCombine {
 public:
  __device__ LowLatencyCombine(const LowLatencyCombineArgs& args, const CombineShape& shape, FlightMemory& memory)
      : a_(args),
        shape_(shape),
        f_(args.comm, kCombineKind, args.part, args.ticket, memory),
        entries_{args.topk_idx, args.wide_idx},
        vectors_(args.row_bytes / 16),
        max_tokens_(args.part == Part::receive ? static_cast<int>(args.ticket[1]) : args.max_tokens),
        parts_(is_packed() ? chunks_of(vectors_) : kRowParts) {
    extern __shared__ __align__(128) char shared[];
    memory_ = shared + (is_packed() ? warp_id() % warps() * kAheadBytes : warp_id() * kWarpBytes);
  }

  __device__ void run() {
    if (warp_id() == kMaxWarps - 1) {  // the one with the least to send
      f_.look();
    }
    if (f_.is_teller()) {
      if (f_.begin()) {
        f_.tell(a_.wait_ns);
      }
      return;
    }
    const bool is_sender = way != Way::either && sends();
    const int first = is_sender ? kNobody : rank_of_slot(begin());  // before anything is awaited
    // All warps of a block begin at one barrier.
    if (!(way == Way::either ? may_begin() : send(is_sender))) {
      return;
    }
    if (receives()) {
      receive(is_sender ? rank_of_slot(begin()) : first);
    }
    f_.end();
  }

 private:
  __device__ bool sends() const { return !shape_.has_receivers || warp_id() < kMaxWarps / 2; }
  __device__ bool receives() const {
    return a_.part != Part::send && (!shape_.has_receivers || warp_id() >= kMaxWarps / 2);
  }
  // This warp's work: every so manieth of (row, part).
  __device__ int warps() const { return shape_.has_receivers ? kMaxWarps / 2 : kMaxWarps; }
  __device__ int begin() const { return static_cast<int>(blockIdx.x) + f_.workers() * (warp_id() % warps()); }
  __device__ int step() const { return f_.workers() * warps(); }
  // Of a piece of work, counted from 0.
  __device__ int row_of(int work) const { return is_packed() ? shape_.by_chunks.quotient(work) : work / kRowParts; }
  __device__ const LowLatencyLayout& layout() const { return f_.layout(); }
  __device__ bool is_packed() const {
    return way == Way::packed || (way == Way::either && max_tokens_ <= layout().packed_tokens);
  }

  // Of a row that is not packed.
  struct Columns {
    int begin, count;  // vectors
  };
  __device__ Columns columns_of(int part) const {
    const int most = (vectors_ + kRowParts - 1) / kRowParts, begin = min(part * most, vectors_);
    return {begin, min(most, vectors_ - begin)};
  }

  // On what both sides have to agree.
  __device__ uint32_t agreed() const {
    return static_cast<uint32_t>(max_tokens_) << kTokensShift | static_cast<uint32_t>(a_.element) << kElementShift |
           (static_cast<uint32_t>(vectors_) & ((1U << kElementShift) - 1));
  }
  static constexpr int kElementShift = 14, kTokensShift = 16;

  // --- send ---

  // Of a whole block, once it has asked for what it needs first.
  __device__ bool may_begin() { return f_.begin() && (a_.part == Part::send || f_.is_next()); }

  // Of a whole block, whose warps begin here, whether they send or not. False: not begun.
  __device__ bool send(bool is_sender) {
    const int work = is_sender ? f_.world_size() * max_tokens_ * parts_ : 0;
    uint32_t ranks = 0;  // that may be written
    int parity = 0;
    bool has_begun = false;
    for (int i = begin(); i < work || !has_begun; i += step()) {
      const int pair = row_of(i), part = i - pair * parts_;
      // Sources in turn: Note [Peers in turn].
      const int token = shape_.by_ranks.quotient(pair), turn = pair - token * f_.world_size() + f_.me();
      const int source = turn < f_.world_size() ? turn : turn - f_.world_size();
      const int row = i < work ? row_of_lane(source, token) : -1;
      const float weight = row >= 0 ? a_.row_weights[row] : 0;
      const char* y = a_.y + int64_t{row} * a_.row_bytes;
      const uint32_t lanes = __ballot_sync(kFullWarp, row >= 0);
      const UnitVectors vectors(part, vectors_);
      Unit sum;
      if (is_packed()) {  // all that can be done before the exchange begins
        sum = sum_of(lanes, y, weight, vectors);
      }
      if (!has_begun) {
        has_begun = true;
        if (!may_begin()) {
          return false;
        }
        ranks = is_sender ? enter() : 0;
      }
      if (lanes == 0 || (ranks >> source & 1) == 0) {
        continue;
      }
      if (!is_packed()) {
        send_part(source, token, part, lanes, y, weight, parity);
      } else if (vectors.any()) {
        char* packs = f_.peer(source, layout().combine_packs(f_.half(), f_.me(), token));
        Packs(sum, f_.tag()).send(packs + offset_of_unit(part));
      }
    }
    if (!is_packed()) {
      fence_async_shared();  // this memory is for sums next
      __syncwarp();
    }
    return true;
  }

  // Of a whole warp: the ranks that may be written, which are told that this one has entered.
  __device__ uint32_t enter() const {
    const uint32_t ranks = f_.writable();
    if (!is_packed()) {
      fence_async_global();  // between the credit and the bulk copies that it allows
    }
    if (blockIdx.x == 0 && warp_id() == 0) {
      if ((ranks >> lane_id() & 1) != 0) {
        store_relaxed_system(f_.peer(lane_id(), layout().entered(f_.half(), f_.me())), f_.word_of(agreed()));
      }
      if (lane_id() == 0 && a_.part == Part::send) {
        a_.ticket[0] = static_cast<int64_t>(f_.number());
        a_.ticket[1] = max_tokens_;
      }
    }
    return ranks;
  }

  // Of the lane's slot of a token; -1: none here.
  __device__ int row_of_lane(int source, int token) const {
    const int most = a_.num_experts * max_tokens_;
    const int64_t first = (int64_t{source} * max_tokens_ + token) * a_.num_topk;
    const int row = lane_id() < a_.num_topk ? a_.recv_row[first + lane_id()] : -1;
    return row < most ? row : -1;
  }

  // Of a whole warp: the rows of `lanes`, at `y`, summed in that order. By shared memory, though each lane sees none
  // but its own: there are no registers for as many.
  __device__ Unit sum_of(uint32_t lanes, const char* y, float weight, const UnitVectors& vectors) const {
    auto* mine = reinterpret_cast<uint4*>(memory_) + lane_id();
    Sum<T> sums[kUnitVectors];
#pragma unroll 1
    while (lanes != 0) {
      uint32_t ahead = lanes;
#pragma unroll 1
      for (int j = 0; j < kSendAhead && ahead != 0; ++j, ahead &= ahead - 1) {
        const uint64_t from = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(y), __ffs(static_cast<int>(ahead)) - 1);
#pragma unroll
        for (int i = 0; i < kUnitVectors; ++i) {
          const auto* vector = reinterpret_cast<const uint4*>(from) + vectors.at(i);
          copy_async_if<0>(vectors.has(i), mine + (j * kUnitVectors + i) * kWarp, vector);
        }
      }
      copy_commit();
      copy_wait<0>();
#pragma unroll 1
      for (int j = 0; lanes != ahead; ++j, lanes &= lanes - 1) {
        Unit row;
#pragma unroll
        for (int i = 0; i < kUnitVectors; ++i) {
          row.vectors[i] = mine[(j * kUnitVectors + i) * kWarp];
        }
        add_unit<true>(sums, row, __shfl_sync(kFullWarp, weight, __ffs(static_cast<int>(lanes)) - 1));
      }
    }
    return rounded(sums);
  }

  template <bool weighted>
  __device__ static void add_unit(Sum<T> (&sums)[kUnitVectors], const Unit& u, float weight) {
#pragma unroll
    for (int i = 0; i < kUnitVectors; ++i) {
      sums[i].template add_term<weighted>(u.vectors[i], weight);
    }
  }

  __device__ static Unit rounded(const Sum<T> (&sums)[kUnitVectors]) {
    Unit u;
#pragma unroll
    for (int i = 0; i < kUnitVectors; ++i) {
      u.vectors[i] = sums[i].rounded();
    }
    return u;
  }

  __device__ void send_part(int source, int token, int part, uint32_t lanes, const char* y, float weight, int& parity)
      const {
    constexpr int kDepth = kPieces - 2;  // the last two pieces of the warp's memory hold what is leaving
    char* leaving = memory_ + kDepth * kPieceBytes;
    const int lane = lane_id();
    const Columns columns = columns_of(part);
    char* to = f_.peer(source, layout().combine_row(f_.half(), f_.me(), token)) + columns.begin * 16;
    const auto sink = [&](int piece, const uint4(&vectors)[kBatch]) {
      bulk_wait_read<1>();
      __syncwarp();
      char* stage = leaving + parity * kPieceBytes;
      parity ^= 1;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        reinterpret_cast<uint4*>(stage)[b * kWarp + lane] = vectors[b];
      }
      fence_async_shared();
      __syncwarp();
      if (lane == 0) {
        const int bytes = min(kPieceBytes, columns.count * 16 - piece * kPieceBytes);
        bulk_store(to + int64_t{piece} * kPieceBytes, stage, bytes);
      }
      bulk_commit();
    };
    sum_rows<T, true, kDepth>({1, 1, lanes}, y + columns.begin * 16, weight, columns.count, memory_, sink);
    bulk_wait<0>();
    if (lane == 0) {
      fence_async_global();
      store_release_system(f_.peer(source, layout().combine_flag(f_.half(), f_.me(), token, part)), f_.number());
    }
  }

  // --- receive ---

  static constexpr int kNobody = -1;

  // Of a whole warp: the rank whose sum for the token of this piece of work the lane awaits, the first of those that
  // have a slot there.
  __device__ int rank_of_slot(int work) const {
    const bool has = work < a_.num_tokens * parts_ && lane_id() < a_.num_topk;
    const int entry = has ? entries_[int64_t{row_of(work)} * a_.num_topk + lane_id()].value() : -1;
    const int rank = entry >= 0 && entry < a_.num_experts ? shape_.by_local.quotient(entry) : kNobody;
    const int first = __ffs(static_cast<int>(__match_any_sync(kFullWarp, rank))) - 1;
    return first == lane_id() ? rank : kNobody;
  }

  // `rank`: of the first piece of work.
  __device__ void receive(int rank) const {
    for (int i = begin(); i < a_.num_tokens * parts_;) {
      const int token = row_of(i), part = i - token * parts_;
      const bool counts = rank != kNobody && f_.is_active(rank);
      const bool going =
          is_packed() ? receive_packed(counts, rank, token, part) : receive_part(counts, rank, token, part);
      if (!going) {
        return;
      }
      i += step();
      rank = rank_of_slot(i);
    }
  }

  // A look at what a rank says as it enters.
  __device__ uint64_t word_of(int rank) const { return load_relaxed_system(f_.own(layout().entered(f_.half(), rank))); }

  // Of a whole warp: until `rank` has entered the same exchange, where `counts`, which is false after that where it did
  // not come. `seen`: its word, after a first look.
  __device__ bool await_rank(bool& counts, int rank, uint64_t seen) const {
    bool going = true;
    if (counts) {
      auto outcome = Outcome::there;
      if (!f_.is_word(seen)) {
        outcome = f_.wait(Phase::header, rank, true, [&] {
          seen = word_of(rank);
          return f_.is_word(seen);
        });
      }
      counts = outcome == Outcome::there;
      going = outcome != Outcome::failed;
      if (const auto theirs = static_cast<uint32_t>(seen); counts && theirs != agreed()) {
        const bool of_tokens = (theirs ^ agreed()) >> kTokensShift != 0;
        const auto shown = [&](uint32_t word) -> int64_t {
          return of_tokens ? word >> kTokensShift : word & ((1U << kTokensShift) - 1);
        };
        const auto number = static_cast<int64_t>(f_.number());
        f_.record({Failure::mismatch, Phase::header, rank, of_tokens ? 3 : 1, shown(agreed()), shown(theirs), number});
        going = false;
      }
    }
    return __all_sync(kFullWarp, going) != 0;
  }

  // Terms are added in the order of the lanes that they are of.
  __device__ bool receive_packed(bool counts, int rank, int token, int chunk) const {
    const UnitVectors vectors(chunk, vectors_);
    Packs packs[kReceiveAhead];
    int ranks[kReceiveAhead], count = 0;
    // The first look at each of some, before any is waited for.
    const auto look = [&](uint32_t lanes) {
      count = 0;
#pragma unroll
      for (int j = 0; j < kReceiveAhead; ++j) {
        ranks[j] = __shfl_sync(kFullWarp, rank, lanes != 0 ? __ffs(static_cast<int>(lanes)) - 1 : 0);
        if (lanes != 0) {
          lanes &= lanes - 1;
          count = j + 1;
          if (vectors.any()) {
            packs[j].look(packs_of(ranks[j], token, chunk));
          }
        }
      }
    };
    const uint32_t expected = __ballot_sync(kFullWarp, counts);
    const uint64_t seen = counts ? word_of(rank) : 0;
    look(expected);
    if (!await_rank(counts, rank, seen)) {
      return false;
    }
    uint32_t lanes = __ballot_sync(kFullWarp, counts);
    if (lanes != expected) {
      look(lanes);
    }
    Sum<T> sums[kUnitVectors];
    bool is_empty = true;
    while (lanes != 0) {
#pragma unroll
      for (int j = 0; j < kReceiveAhead; ++j) {
        if (j < count) {
          lanes &= lanes - 1;
          auto outcome = Outcome::there;
          if (vectors.any() && !packs[j].arrived(f_.tag())) {
            outcome = f_.wait(Phase::rows, ranks[j], lane_id() == 0, [&] {
              packs[j].look(packs_of(ranks[j], token, chunk));
              return packs[j].arrived(f_.tag());
            });
          }
          if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
            return false;
          }
          if (outcome == Outcome::there) {
            add_unit<false>(sums, packs[j].unit(), 1);
            is_empty = false;
          }
        }
      }
      look(lanes);
    }
    store_unit(a_.out + int64_t{token} * a_.row_bytes, is_empty ? Unit{} : rounded(sums), vectors);
    return true;
  }

  __device__ const char* packs_of(int rank, int token, int chunk) const {
    return f_.own(layout().combine_packs(f_.half(), rank, token) + offset_of_unit(chunk));
  }

  __device__ bool receive_part(bool counts, int rank, int token, int part) const {
    if (!await_rank(counts, rank, counts ? word_of(rank) : 0)) {
      return false;
    }
    auto outcome = Outcome::there;
    if (counts) {
      const char* flag = f_.own(layout().combine_flag(f_.half(), rank, token, part));
      outcome = f_.wait(Phase::rows, rank, true, [&] { return load_acquire_system(flag) == f_.number(); });
    }
    if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
      return false;
    }
    __syncwarp();  // what one lane acquired is there for all
    const uint32_t terms = __ballot_sync(kFullWarp, counts && outcome == Outcome::there);
    const Columns columns = columns_of(part);
    const char* row = f_.own(layout().combine_row(f_.half(), max(rank, 0), token)) + columns.begin * 16;
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
    sum_rows<T, false, kPieces>({terms, 0, 0}, row, 1, columns.count, memory_, sink);
    return true;
  }

  const LowLatencyCombineArgs& a_;
  const CombineShape& shape_;
  Flight f_;
  const Entries entries_;
  const int vectors_;
  const int max_tokens_;  // of the dispatch
  const int parts_;       // of a row
  char* memory_;          // of this warp
};

template <class T, Way way>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) low_latency_combine_kernel(
    const __grid_constant__ LowLatencyCombineArgs args,
    const __grid_constant__ CombineShape shape) {
  ask_for(args);
  await_kernels_before();
  __shared__ FlightMemory memory;
  LowLatencyCombine<T, way>(args, shape, memory).run();
}

// A warp for each part of a row, whichever way it travels, some warps to a block; and a block that tells.
int blocks_of(const LowLatencyCombineArgs& args, int multiprocessors) {
  constexpr int kWarpsABlock = kMaxWarps / 4;
  const int64_t to_send = args.part == Part::receive ? 0 : int64_t{args.comm.low_latency.world_size} * args.max_tokens;
  const int64_t to_receive = args.part == Part::send ? 0 : args.num_tokens;
  const int64_t parts = std::max(to_send, to_receive) * std::max(kRowParts, chunks_of(args.row_bytes / 16));
  const int64_t workers = std::max<int64_t>((parts + kWarpsABlock - 1) / kWarpsABlock, 1);
  return static_cast<int>(std::min<int64_t>(workers + 1, std::max(multiprocessors, 2)));
}

CombineShape shape_of(const LowLatencyCombineArgs& args, Way way, int blocks) {
  const int chunks = chunks_of(args.row_bytes / 16);
  const int64_t work = int64_t{args.comm.low_latency.world_size} * args.max_tokens * chunks;
  return {
      Divisor(args.comm.low_latency.world_size),
      Divisor(chunks),
      Divisor(args.num_experts / args.comm.low_latency.world_size),
      way == Way::packed && args.part == Part::both && work <= int64_t{blocks - 1} * (kMaxWarps / 2)};
}

Way way_of(const LowLatencyCombineArgs& args) {
  if (args.part == Part::receive) {
    return Way::either;
  }
  return args.max_tokens <= args.comm.low_latency.packed_tokens ? Way::packed : Way::bulk;
}

int shared_bytes(Way way, const CombineShape& shape) {
  return way == Way::packed ? kMaxWarps / (shape.has_receivers ? 2 : 1) * kAheadBytes : kSharedBytes;
}

template <class T>
cudaError_t launch(const LowLatencyCombineArgs& args, int multiprocessors, cudaStream_t stream) {
  const Way way = way_of(args);
  const auto kernel = way == Way::packed ? low_latency_combine_kernel<T, Way::packed>
                      : way == Way::bulk ? low_latency_combine_kernel<T, Way::bulk>
                                         : low_latency_combine_kernel<T, Way::either>;
  const int blocks = blocks_of(args, multiprocessors);
  const CombineShape shape = shape_of(args, way, blocks);
  const int shared = shared_bytes(way, shape);
  const Launch how = args.comm.shares_device ? Launch::plain : Launch::overlapped;
  return launch_kernel(how, kernel, blocks, kMaxWarps * kWarp, shared, stream, args, shape);
}

template <class T>
cudaError_t prepare() {
  for (const auto kernel :
       {low_latency_combine_kernel<T, Way::packed>,
        low_latency_combine_kernel<T, Way::bulk>,
        low_latency_combine_kernel<T, Way::either>}) {
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
