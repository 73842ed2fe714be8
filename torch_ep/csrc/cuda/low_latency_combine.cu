// ep::low_latency_combine: the experts' rows of each token, weighted and summed, back to the rank whose token it is.
//   send      warps, each a part of the columns of one token of one rank: its rows here summed -> that rank
//   receive   warps, each a part of the columns of one own token: what every rank sent for it summed -> result
// Rows are summed where the experts are, so that one crosses the link for each (token, rank); the order and the width
// of the sums are those of ep::combine.
#include "device/low_latency.cuh"
#include "device/rows.cuh"
#include "device/sums.cuh"

#include <algorithm>

namespace ep::cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kPieces = 7;
constexpr int kWarpBytes = kPieces * kPieceBytes;
constexpr int kSharedBytes = kMaxWarps * kWarpBytes;
constexpr int kParts = LowLatencyLayout::kRowFlags;

template <class T>
class LowLatencyCombine {
 public:
  __device__ explicit LowLatencyCombine(const LowLatencyCombineArgs& args)
      : a_(args),
        f_(args.comm, kCombineKind, args.part, args.ticket),
        entries_{args.topk_idx, args.wide_idx, args.num_topk, args.num_experts},
        vectors_(args.row_bytes / 16),
        part_vectors_((vectors_ + kParts - 1) / kParts) {
    extern __shared__ __align__(128) char shared[];
    memory_ = shared + warp_id() * kWarpBytes;
  }

  __device__ void run() {
    if (a_.part != Part::send && !f_.is_next()) {
      return;
    }
    if (a_.part != Part::receive) {
      bool may_write = false;
      if (f_.wait_for_credits(may_write)) {
        send(__ballot_sync(kFullWarp, may_write));
      }
      f_.end_send(a_.part, a_.ticket);
    }
    if (a_.part != Part::send) {
      receive();
      f_.end_receive(a_.wait_ns);
    }
  }

 private:
  // This warp's work: every so manieth of (row, part).
  __device__ int64_t begin() const { return int64_t{blockIdx.x} + int64_t{gridDim.x} * warp_id(); }
  __device__ int64_t step() const { return int64_t{gridDim.x} * kMaxWarps; }

  struct Columns {
    int begin, count;  // vectors
  };
  __device__ Columns columns_of(int part) const {
    const int begin = min(part * part_vectors_, vectors_);
    return {begin, min(part_vectors_, vectors_ - begin)};
  }

  // Holds the number of the exchange, and on what both sides have to agree.
  __device__ uint64_t flag() const { return f_.number() << 16 | static_cast<uint64_t>(agreed()); }
  __device__ int64_t agreed() const { return static_cast<int64_t>(a_.element) << 14 | (vectors_ & 0x3fff); }

  // --- send ---

  // `ranks`: bits of those that may be written.
  __device__ void send(uint32_t ranks) {
    constexpr int kDepth = kPieces - 2;  // the last two pieces of the warp's memory hold what is leaving
    char* leaving = memory_ + kDepth * kPieceBytes;
    const int lane = lane_id();
    int parity = 0;
    const int64_t work = int64_t{f_.world_size()} * a_.max_tokens * kParts;
    for (int64_t i = begin(); i < work; i += step()) {
      const int part = static_cast<int>(i % kParts);
      const int64_t pair = i / kParts;
      const int source = static_cast<int>(pair / a_.max_tokens), token = static_cast<int>(pair % a_.max_tokens);
      const int64_t most = int64_t{a_.num_experts / f_.world_size()} * f_.world_size() * a_.max_tokens;
      int64_t row = lane < a_.num_topk ? a_.recv_row[pair * a_.num_topk + lane] : -1;
      row = row < most && (ranks >> source & 1) != 0 ? row : -1;
      const uint32_t lanes = __ballot_sync(kFullWarp, row >= 0);
      if (lanes == 0) {
        continue;
      }
      const float weight = row >= 0 ? a_.row_weights[row] : 0;
      const Columns columns = columns_of(part);
      const char* from = a_.y + row * a_.row_bytes + columns.begin * 16;
      char* to = f_.peer(source, f_.layout().combine_row(f_.half(), f_.me(), token)) + columns.begin * 16;
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
      sum_rows<T, true, kDepth>({1, 1, lanes}, from, weight, columns.count, memory_, sink);
      bulk_wait<0>();
      if (lane == 0) {
        fence_async_global();
        store_release_system(f_.peer(source, f_.layout().combine_flag(f_.half(), f_.me(), token, part)), flag());
      }
    }
    fence_async_shared();  // this memory is for sums next
    __syncwarp();
  }

  // --- receive ---

  __device__ void receive() {
    const int lane = lane_id(), num_local = a_.num_experts / f_.world_size();
    for (int64_t i = begin(); i < int64_t{a_.num_tokens} * kParts; i += step()) {
      const int part = static_cast<int>(i % kParts), token = static_cast<int>(i / kParts);
      const int entry = lane < a_.num_topk ? entries_[int64_t{token} * a_.num_topk + lane] : -1;
      const int rank = entry >= 0 && entry < a_.num_experts ? entry / num_local : -1;
      const uint32_t same = __match_any_sync(kFullWarp, rank);
      bool counts = rank >= 0 && __ffs(static_cast<int>(same)) - 1 == lane && f_.is_active(rank);
      if (!await(counts, rank, token, part)) {
        return;
      }
      const uint32_t terms = __ballot_sync(kFullWarp, counts);
      const Columns columns = columns_of(part);
      const char* row = f_.own(f_.layout().combine_row(f_.half(), max(rank, 0), token)) + columns.begin * 16;
      char* result = a_.out + int64_t{token} * a_.row_bytes + (columns.begin + lane) * 16;
      const auto sink = [&](int piece, const uint4(&vectors)[kBatch]) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int v = piece * kPieceVectors + b * kWarp;
          if (v + lane < columns.count) {
            *reinterpret_cast<uint4*>(result + int64_t{v} * 16) = vectors[b];
          }
        }
      };
      sum_rows<T, false, kPieces>({terms, 0, 0}, row, 1, columns.count, memory_, sink);
    }
  }

  // Of a whole warp: until what `rank` sent is there, where `counts`, which is false after that where nothing came.
  __device__ bool await(bool& counts, int rank, int token, int part) const {
    bool going = true;
    if (counts) {
      const char* word = f_.own(f_.layout().combine_flag(f_.half(), rank, token, part));
      uint64_t seen = 0;
      const auto outcome = f_.wait(Phase::rows, rank, [&] {
        seen = load_acquire_system(word);
        return seen >> 16 == (f_.number() & (~0ULL >> 16));
      });
      counts = outcome == Outcome::there;
      going = outcome != Outcome::failed;
      if (counts && seen != flag()) {
        const auto theirs = static_cast<int64_t>(seen & 0xffff);
        f_.record({Failure::mismatch, Phase::rows, rank, 1, agreed(), theirs, static_cast<int64_t>(f_.number())});
        going = false;
      }
    }
    going = __all_sync(kFullWarp, going) != 0;
    __syncwarp();  // what one lane acquired is there for all
    return going;
  }

  const LowLatencyCombineArgs& a_;
  const Flight f_;
  const Entries entries_;
  const int vectors_, part_vectors_;
  char* memory_;  // of this warp
};

template <class T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    low_latency_combine_kernel(const __grid_constant__ LowLatencyCombineArgs args) {
  if (fresh(args.comm.state->failed) == 0) {
    LowLatencyCombine<T>(args).run();
  }
}

// Enough for a warp to each part of a row; a token visits most ranks.
int blocks_of(const LowLatencyCombineArgs& args, int multiprocessors) {
  const int64_t to_send = args.part == Part::receive ? 0 : int64_t{args.comm.low_latency.world_size} * args.max_tokens;
  const int64_t to_receive = args.part == Part::send ? 0 : args.num_tokens;
  const int64_t warps = std::max(to_send, to_receive) * kParts;
  return static_cast<int>(std::clamp<int64_t>((warps + kMaxWarps - 1) / kMaxWarps, 1, multiprocessors));
}

template <class T>
cudaError_t launch(const LowLatencyCombineArgs& args, int multiprocessors, cudaStream_t stream) {
  const auto kernel = low_latency_combine_kernel<T>;
  kernel<<<blocks_of(args, multiprocessors), kMaxWarps * kWarp, kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t prepare_low_latency_combine() {
  constexpr auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  for (const auto kernel :
       {low_latency_combine_kernel<float>,
        low_latency_combine_kernel<__nv_bfloat16>,
        low_latency_combine_kernel<__half>}) {
    if (const auto error = cudaFuncSetAttribute(kernel, attribute, kSharedBytes); error != cudaSuccess) {
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

}  // namespace ep::cuda
