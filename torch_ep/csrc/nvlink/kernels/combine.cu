// ep::combine: returns rows to the ranks of their tokens and reduces them on both sides.
//   send    Some blocks send chunks of every peer's rows: rows of one token reduced -> shared memory -> peer.
//   reduce  The other blocks, and the senders when they have finished, sum this rank's tokens: arrived and own rows ->
//           result. The first of these warps exchanges handshakes.
// Few rows are split by columns, so that every warp has work: a warp with a whole row would finish last.
// Sums accumulate in float32 (float64 for float64), in the order of the token's slots, without contraction. Each rank's
// partial sum is rounded to the rows' type, whether it crosses a link or not: the bits are those of
// torch_ep/reference.py.
#include "nvlink/device/reduce.cuh"
#include "nvlink/device/rows.cuh"

#include <algorithm>

namespace ep::nvlink {
namespace {

// 16 warps with 7 pieces leave 3 KB of a block's shared memory. Copies use all pieces; reductions load four at a time,
// which was faster than more.
constexpr int kMaxWarps = 16;
constexpr int kPieces = 7;
constexpr int kSumDepth = 4;
constexpr int kWarpBytes = kPieces * kPieceBytes;

template <class T, bool weighted>
class Combine {
 public:
  using Wide = typename Vector<T>::Wide;

  __device__ Combine(const CombineArgs& args, int send_blocks)
      : a_(args),
        x_(args.comm, OpKind::combine),
        send_blocks_(send_blocks),
        memory_(shared_memory() + warp_id() * kWarpBytes),
        out_(wire_rows(x_, args.plan.send_counts)),
        in_(wire_rows(x_, args.plan.recv_counts)),
        vectors_(args.format.row_bytes / 16) {}

  // Block-collective.
  __device__ void run() {
    const bool sends = static_cast<int>(blockIdx.x) < send_blocks_;
    copy_ring().init();
    bool going = true;
    if (a_.plan.expert_major) {
      const int received = in_.end.of(x_.world_size() - 1);
      const int warps = static_cast<int>(gridDim.x) * kMaxWarps;
      invert_recv_pair(
          x_, a_.plan, received, static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) * warp_id(), warps);
      going = wait_for_gate(x_, static_cast<uint32_t>(warps));
    }
    if (static_cast<int>(blockIdx.x) == send_blocks_ && warp_id() == 0) {
      going = exchange_handshakes(x_, a_.handshake, {in_.counts(), out_.counts()}) && going;
    }
    going = going && wait_for_credits(x_, as_volatile(a_.comm.state->last_combine));
    if (going && sends) {
      send();
    }
    if (going) {
      if (is_few(a_.plan.num_tokens) || any_few(out_)) {
        reduce<true>();
      } else {
        reduce<false>();
      }
    }
    end_exchange(x_, &a_.comm.state->last_combine);
  }

 private:
  // --- chunks ---

  // Columns of a row, in pieces.
  struct Columns {
    int begin, end;
    __device__ int count() const { return end - begin; }
    __device__ int64_t offset() const { return int64_t{begin} * kPieceBytes; }
  };

  // How rows are split: 1 << shift rows per chunk, or some parts per row, one per chunk.
  struct Cut {
    int shift, parts;
  };

  // For `rows` rows from one rank to another: the same on both sides.
  __device__ Cut cut_of(int rows) const {
    if (!is_few(rows)) {
      return {kChunkShift, 1};
    }
    return {0, min(max(kFewChunks / (rows * peers()), kMinParts), pieces())};
  }
  __device__ bool is_few(int rows) const { return rows > 0 && rows * peers() <= kMaxSplitRows; }
  __device__ bool any_few(const WireRows& rows) const {
    bool few = false;
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      few = few || (x_.is_peer(rank_at(step)) && is_few(rows.counts()[step]));
    }
    return __any_sync(kFullWarp, few) != 0;
  }

  __device__ int peers() const { return max(x_.world_size() - 1, 1); }
  __device__ int pieces() const { return (vectors_ + kPieceVectors - 1) / kPieceVectors; }

  // Separate code if no rank has few rows: the divisions made 4096 tokens 1.6 % slower.
  template <bool few>
  __device__ Columns columns_of(const Cut& cut, int part) const {
    if (!few || cut.parts == 1) {
      return {0, pieces()};
    }
    // fault: combine: columns of a part
    return {part * pieces() / cut.parts, (part + 1) * pieces() / cut.parts};
  }
  // The chunk of a piece of a row.
  template <bool few>
  __device__ int chunk_of(const Cut& cut, int row, int piece) const {
    return !few || cut.parts == 1 ? row >> cut.shift : row * cut.parts + ((piece + 1) * cut.parts - 1) / pieces();
  }

  // Vectors of some columns.
  __device__ int vectors_in(const Columns& columns) const {
    return min(vectors_, columns.end * kPieceVectors) - columns.begin * kPieceVectors;
  }

  // --- the rows of y that belong to one wire row ---

  struct Rows {
    uint32_t lanes;  // that have one
    int64_t row;     // this lane's
    Wide weight;     // of it
  };

  // Warp-collective. rank_major: the row of that number, in `lane`.
  __device__ Rows rows_of(int64_t wire_row, int lane) const {
    Rows rows{0, -1, Wide{1}};
    if (a_.plan.expert_major) {
      rows.row = row_of_slot(x_, a_.plan, wire_row);
    } else if (lane_id() == lane && wire_row < a_.plan.rows) {
      rows.row = wire_row;
    }
    rows.lanes = __ballot_sync(kFullWarp, rows.row >= 0);
    if (weighted && rows.row >= 0) {
      rows.weight = static_cast<const Wide*>(a_.row_weights)[rows.row];
    }
    return rows;
  }

  __device__ const char* y_row(const Rows& rows) const { return a_.y + rows.row * a_.format.row_stride; }

  // One thread. Copies the weight of this lane's slot of a wire row.
  __device__ void take_weight(char* to, int64_t wire_row, const Rows& rows) const {
    const int lane = lane_id(), bytes = a_.format.weight_bytes;
    if (a_.plan.expert_major ? rows.row < 0 : wire_row >= a_.plan.rows) {
      zero_weight(to, bytes);
    } else {
      copy_weight(
          to, a_.weights + (a_.plan.expert_major ? rows.row : wire_row * a_.plan.num_topk + lane) * bytes, bytes);
    }
  }

  // --- send ---

  // The chunks of wire rows that this warp sends, one after another.
  class SendQueue {
   public:
    __device__ explicit SendQueue(const Combine& c) : c_(c), queue_(c.x_.comm, 0), rows_(c.in_.counts()) {
      int most = 0;
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        const Cut cut = c.cut_of(rows_[step]);
        const int chunks = ((rows_[step] + (1 << cut.shift) - 1) >> cut.shift) * cut.parts;
        most = max(most, c.x_.is_peer(rank_at(step)) ? chunks : 0);
      }
      chunks_ = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<unsigned>(most)));
    }

    // Warp-collective. Advances to the next chunk. False: none is left. Items alternate between the peers until the
    // peer with the most chunks has none left.
    __device__ bool advance() {
      const int peers = c_.peers();
      while (true) {
        const auto item = static_cast<int>(queue_.next());
        if (item >= chunks_ * peers) {
          return false;
        }
        chunk = item / peers;
        // Note [Peers in turn], device/ranks.cuh.
        to = (c_.a_.comm.rank + 1 + item - chunk * peers) % c_.x_.world_size();
        const int rows = rows_.of(to);
        const Cut cut = c_.cut_of(rows);
        begin = min(cut.parts == 1 ? chunk << cut.shift : chunk / cut.parts, rows);
        end = min(begin + (1 << cut.shift), rows);
        columns = c_.template columns_of<true>(cut, chunk - (begin >> cut.shift) * cut.parts);
        if (begin < end) {
          queue_.prefetch();
          return true;
        }
      }
    }

    int to = 0, chunk = 0;
    int begin = 0, end = 0;  // of the rows that go back to rank `to`
    Columns columns{};

   private:
    const Combine& c_;
    WorkQueue queue_;
    const PerRank<int> rows_;
    int chunks_ = 0;
  };

  // Warp-collective. Signals a chunk once its rows are written: after the copies of the next row have begun, so that
  // the warp does not stall.
  class ChunkFlags {
   public:
    __device__ explicit ChunkFlags(const Exchange& x) : x_(x) {}
    // Call after a row's last bulk_commit. `copies`: at most the number of bulk copies of the row.
    __device__ void sent(int to, int chunk, int copies, bool ends_chunk) {
      if (chunk_ >= 0) {
        if (copies >= 4) {
          bulk_wait<4>();
        } else {
          bulk_wait<1>();
        }
        signal();
      }
      if (ends_chunk) {
        to_ = to;
        chunk_ = chunk;
      }
    }
    __device__ void finish() {
      bulk_wait<0>();
      if (chunk_ >= 0) {
        signal();
      }
    }

   private:
    __device__ void signal() {
      __syncwarp();
      // The lane that issued the bulk copies. The barrier orders the other lanes' stores.
      if (lane_id() == lane_of(to_)) {
        x_.peer(to_).signal_copies(x_.layout().combine_flag(x_.comm.rank, chunk_), x_.tag());
      }
      chunk_ = -1;
    }
    const Exchange& x_;
    int to_ = 0, chunk_ = -1;
  };

  // Warp-collective.
  __device__ void send() {
    SendQueue work(*this);
    if (a_.plan.expert_major || weighted) {
      send_reduced(work);
    } else {
      send_copies(work);
    }
    fence_async_shared();  // the reduction uses this memory next
    __syncwarp();
  }

  // The lane that copies to a rank.
  __device__ static int lane_of(int rank) { return rank % kWarp; }

  // The offset of the row-th wire row to a rank in its buffer.
  __device__ int64_t row_at(int to, int row) const {
    const Layout& layout = x_.layout();
    return layout.combine_rows(a_.comm.rank, to) + row * layout.wire_row_bytes;
  }

  // Warp-collective.
  __device__ void send_weights(int to, int64_t row_at, int64_t wire_row, const Rows& rows) const {
    const int lane = lane_id(), bytes = a_.format.weight_bytes;
    if (bytes != 0 && lane < a_.plan.num_topk) {
      uint64_t weight = 0;
      take_weight(reinterpret_cast<char*>(&weight), wire_row, rows);
      x_.peer(to).put_value(row_at + a_.format.weights_at() + lane * bytes, weight, bytes);
    }
  }

  // Warp-collective. Two pieces of the warp's memory hold data that is being copied to peers.
  __device__ void send_reduced(SendQueue& work) {
    ChunkFlags flags(x_);
    char* outgoing = memory_ + kSumDepth * kPieceBytes;
    int parity = 0;
    while (work.advance()) {
      for (int row = work.begin; row < work.end; ++row) {
        const int64_t wire_row = int64_t{in_.begin.of(work.to)} + row;
        const Rows rows = rows_of(wire_row, 0);
        const int64_t to_row = row_at(work.to, row);
        const auto sink = [&](int piece, const uint4(&part)[kBatch]) {
          bulk_wait_read<1>();
          __syncwarp();
          char* stage = outgoing + parity * kPieceBytes;
          parity ^= 1;
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            reinterpret_cast<uint4*>(stage)[b * kWarp + lane_id()] = part[b];
          }
          fence_async_shared();
          __syncwarp();
          if (lane_id() == lane_of(work.to)) {
            const int at = (work.columns.begin + piece) * kPieceBytes;
            x_.peer(work.to).put(to_row + at, stage, min(kPieceBytes, a_.format.row_bytes - at));
          }
          bulk_commit();
        };
        reduce_rows<T, weighted, kSumDepth>(
            {1, 1, rows.lanes},
            y_row(rows) + work.columns.offset(),
            rows.weight,
            vectors_in(work.columns),
            memory_,
            sink);
        if (work.columns.begin == 0) {
          send_weights(work.to, to_row, wire_row, rows);
        }
        flags.sent(work.to, work.chunk, work.columns.count(), row + 1 == work.end);
      }
    }
    flags.finish();
  }

  // Warp-collective. Without a reduction, rows go through shared memory unchanged: half of it is loaded while the other
  // half is copied out.
  __device__ void send_copies(SendQueue& work) {
    const Ring ring = copy_ring();
    ChunkFlags flags(x_);
    // A piece of a row. One is loaded while the previous one waits to be copied out.
    struct Piece {
      int to, row, chunk;
      int64_t wire_row;
      int begin, bytes;
      int copies;  // of the row, up to this one
      bool ends_row, ends_chunk;
    };
    Piece waiting{};
    bool has_waiting = false;
    int copied = 0;
    const auto push = [&](const Piece& p, int n) {
      ring.wait(n);
      fence_async_shared();
      __syncwarp();
      const int64_t to_row = row_at(p.to, p.row);
      if (lane_id() == lane_of(p.to)) {
        x_.peer(p.to).put(to_row + p.begin, ring.stage(n), p.bytes);
      }
      bulk_commit();
      if (p.begin == 0) {
        send_weights(p.to, to_row, p.wire_row, Rows{0, -1, Wide{1}});
      }
      if (p.ends_row) {
        flags.sent(p.to, p.chunk, p.copies, p.ends_chunk);
      }
    };
    while (work.advance()) {
      for (int row = work.begin; row < work.end; ++row) {
        const int64_t wire_row = int64_t{in_.begin.of(work.to)} + row;
        const int end = min(work.columns.end * kPieceBytes, a_.format.row_bytes);
        int copies = 0;
        for (int begin = work.columns.begin * kPieceBytes; begin < end; begin += kHalf) {
          const Piece piece{
              work.to,
              row,
              work.chunk,
              wire_row,
              begin,
              min(kHalf, end - begin),
              ++copies,
              begin + kHalf >= end,
              row + 1 == work.end};
          bulk_wait_read<0>();  // earlier copies out of this half
          load_copy(ring, piece.wire_row, piece.begin, piece.bytes, copied);
          if (has_waiting) {
            push(waiting, copied - 1);
          }
          waiting = piece;
          has_waiting = true;
          ++copied;
        }
      }
    }
    if (has_waiting) {
      push(waiting, copied - 1);
    }
    flags.finish();
  }

  // Warp-collective.
  __device__ void load_copy(const Ring& ring, int64_t wire_row, int begin, int bytes, int n) const {
    const bool is_dropped = wire_row >= a_.plan.rows;
    fence_async_shared();
    __syncwarp();
    if (is_dropped) {
      zero_bytes(ring.stage(n), bytes);
      fence_async_shared();
      __syncwarp();
    }
    if (lane_id() == 0) {
      barrier_expect(ring.barrier(n), is_dropped ? 0 : bytes);
      if (!is_dropped) {
        bulk_load(ring.stage(n), a_.y + wire_row * a_.format.row_stride + begin, bytes, ring.barrier(n));
      }
    }
  }

  // --- reduce ---

  // Warp-collective.
  template <bool few>
  __device__ void reduce() {
    const int lane = lane_id(), me = a_.comm.rank, num_topk = a_.plan.num_topk, weight_bytes = a_.format.weight_bytes;
    const Layout& layout = x_.layout();
    const int first_own = in_.begin.of(me);
    const Cut ours = cut_of(a_.plan.num_tokens);
    Cut theirs[kRankSteps];
    PerRank<int> arrived_chunk;  // the last chunk of each rank for which this warp has waited
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      theirs[step] = cut_of(out_.counts()[step]);
      arrived_chunk[step] = -1;
    }
    WorkQueue queue(x_.comm, 1);
    for (int64_t i = queue.next(); i < int64_t{a_.plan.num_tokens} * (few ? ours.parts : 1); i = queue.next()) {
      queue.prefetch();
      const int token = few ? static_cast<int>(i) / ours.parts : static_cast<int>(i);
      const Columns columns = columns_of<few>(ours, static_cast<int>(i) - token * ours.parts);
      const int entry = lane < num_topk ? a_.plan.send_row[int64_t{token} * num_topk + lane] : -1;
      const TokenRows sent = find_rows(x_, entry, out_);
      const uint32_t terms = __ballot_sync(kFullWarp, sent.first);

      // Waits for these columns of the row of every rank.
      bool going = true;
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        const int row = sent.row_to[step], from = rank_at(step);
        // fault: combine: only the first part awaited
        const int last_chunk = chunk_of<few>(theirs[step], row, columns.end - 1);
        int chunk = chunk_of<few>(theirs[step], row, columns.begin);
        const bool waits = x_.is_peer(from) && row >= 0 && (chunk < last_chunk || last_chunk != arrived_chunk[step]);
        const auto has_arrived = [&] {
          while (x_.is_tagged(x_.inbox().poll_signal(layout.combine_flag(from, chunk)))) {
            if (!few || chunk == last_chunk) {
              return true;
            }
            ++chunk;
          }
          return false;
        };
        going = going && wait_lanes(x_, Phase::rows, waits, from, has_arrived);
        arrived_chunk[step] = waits ? last_chunk : arrived_chunk[step];
      }
      if (!going) {
        return;
      }

      // Lane k: the returned row of slot k, unless its expert is on this rank.
      const char* arrived_row = x_.inbox().data(layout.combine_rows(sent.rank, me) + sent.row * layout.wire_row_bytes);
      const bool is_own = sent.row >= 0 && sent.rank == me;
      const uint32_t own_lanes = __ballot_sync(kFullWarp, is_own);
      Rows own{0, -1, Wide{1}};
      int64_t own_wire_row = 0;
      if (own_lanes != 0) {
        const int own_lane = __ffs(static_cast<int>(own_lanes)) - 1;
        own_wire_row = int64_t{first_own} + __shfl_sync(kFullWarp, sent.row, own_lane);
        own = rows_of(own_wire_row, own_lane);
        own.lanes &= own_lanes;  // the same lanes, unless the plan is inconsistent
      }
      char* result = a_.out + token * a_.format.row_stride + columns.offset() + lane * 16;
      const int vectors = vectors_in(columns);
      const auto sink = [&](int piece, const uint4(&part)[kBatch]) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int v = piece * kPieceVectors + b * kWarp;
          if (v + lane < vectors) {
            *reinterpret_cast<uint4*>(result + int64_t{v} * 16) = part[b];
          }
        }
      };
      const char* own_row = y_row(own);
      uint32_t own_term = terms & own_lanes;
      if (!weighted && __popc(own.lanes) == 1) {
        // A single row without a weight needs no rounding: it is an ordinary term.
        own_row = reinterpret_cast<const char*>(
            __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(own_row), __ffs(static_cast<int>(own.lanes)) - 1));
        own_term = 0;
      }
      reduce_rows<T, weighted, kSumDepth>(
          {terms, own_term, own.lanes},
          (is_own ? own_row : arrived_row) + columns.offset(),
          own.weight,
          vectors,
          memory_,
          sink);

      if (weight_bytes != 0 && columns.begin == 0 && lane < num_topk) {
        char* to = a_.out_weights + (int64_t{token} * num_topk + lane) * weight_bytes;
        if (sent.row < 0) {
          zero_weight(to, weight_bytes);
        } else if (is_own) {
          take_weight(to, own_wire_row, own);
        } else {
          copy_weight(to, arrived_row + a_.format.weights_at() + lane * weight_bytes, weight_bytes);
        }
      }
    }
  }

  // Chunks of large batches have two rows: each chunk costs a fence, as in ep::dispatch.
  static constexpr int kChunkShift = 1;

  __device__ static char* shared_memory() {
    extern __shared__ __align__(128) char shared[];
    return shared;
  }
  static constexpr int kHalf = kWarpBytes / 2;

  __device__ Ring copy_ring() const { return {memory_, barriers() + warp_id() * 2, 2, kHalf}; }
  __device__ static uint64_t* barriers() {
    return reinterpret_cast<uint64_t*>(shared_memory() + kMaxWarps * kWarpBytes);
  }

  const CombineArgs& a_;
  const Exchange x_;
  const int send_blocks_;
  char* const memory_;  // of this warp
  const WireRows out_, in_;
  const int vectors_;  // of a row
};

template <class T, bool weighted>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    combine_kernel(const __grid_constant__ CombineArgs args, int send_blocks) {
  prefetch_arguments(args);
  if (!has_failed(args.comm)) {
    Combine<T, weighted>(args, send_blocks).run();
  }
}

// The fastest shares with 24 blocks on four H200. Senders that reduce need more blocks than senders that copy, most of
// all for large batches. See Note [Blocks that send], device/rows.cuh.
int send_blocks_of(const CombineArgs& args) {
  constexpr int kManyTokens = 512;
  const int blocks = args.comm.layout.num_blocks;
  if (args.comm.layout.world_size == 1) {
    return 0;
  }
  if (!args.plan.expert_major && args.row_weights == nullptr) {
    return blocks / 2;
  }
  return args.plan.num_tokens < kManyTokens ? (7 * blocks + 6) / 12 : (17 * blocks + 12) / 24;
}

constexpr int kSharedBytes = kMaxWarps * (kWarpBytes + 2 * static_cast<int>(sizeof(uint64_t)));

template <class T>
cudaError_t prepare() {
  constexpr auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const auto error = cudaFuncSetAttribute(combine_kernel<T, false>, attribute, kSharedBytes);
  return error != cudaSuccess ? error : cudaFuncSetAttribute(combine_kernel<T, true>, attribute, kSharedBytes);
}

template <class T, bool weighted>
cudaError_t launch(const CombineArgs& args, cudaStream_t stream) {
  const auto kernel = combine_kernel<T, weighted>;
  kernel<<<args.comm.layout.num_blocks, kMaxWarps * kWarp, kSharedBytes, stream>>>(args, send_blocks_of(args));
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const CombineArgs& args, cudaStream_t stream) {
  return args.row_weights != nullptr ? launch<T, true>(args, stream) : launch<T, false>(args, stream);
}

}  // namespace

cudaError_t prepare_combine() {
  for (const auto prepare_type : {prepare<double>, prepare<float>, prepare<__nv_bfloat16>, prepare<__half>}) {
    if (const auto error = prepare_type(); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_combine(const CombineArgs& args, cudaStream_t stream) {
  switch (args.element) {
    case Element::f64:
      return launch<double>(args, stream);
    case Element::f32:
      return launch<float>(args, stream);
    case Element::bf16:
      return launch<__nv_bfloat16>(args, stream);
    case Element::f16:
      return launch<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace ep::nvlink
