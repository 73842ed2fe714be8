// ep::dispatch: copies rows to the ranks that need them.
//   send     Some blocks send chunks of tokens: row -> shared memory -> every peer that needs it.
//   receive  The other blocks receive chunks of every peer: arrived row -> shared memory -> its rows of the result.
//            While no chunk has arrived, they copy this rank's own rows. The first of these warps exchanges handshakes.
// Blocks that have sent everything help with the own rows.
#include "core/device/launch.cuh"
#include "nvlink/device/rows.cuh"

#include <algorithm>

namespace ep::nvlink {
namespace {

// Per thread block. More warps keep more rows in flight, but start a microsecond later: only for many tokens.
constexpr int kMaxWarps = 24, kFewWarps = 16;

class Dispatch {
 public:
  __device__ Dispatch(const DispatchArgs& args, const DispatchShape& shape)
      : a_(args),
        x_(args.comm, OpKind::dispatch),
        receiver_(
            static_cast<int>(blockIdx.x) - shape.send_blocks +
            (static_cast<int>(gridDim.x) - shape.send_blocks) * warp_id()),
        receivers_((static_cast<int>(gridDim.x) - shape.send_blocks) * shape.warps),
        sends_(static_cast<int>(blockIdx.x) < shape.send_blocks),
        chunk_tokens_(shape.chunk_tokens),
        chunks_((args.plan.num_tokens + chunk_tokens_ - 1) / chunk_tokens_),
        ring_(Ring::of_warp(shape)),
        out_(wire_rows(x_, args.plan.send_counts)),
        in_(wire_rows(x_, args.plan.recv_counts)) {}

  // Block-collective.
  __device__ void run() {
    ring_.init();
    if (sends_) {
      write_own_rows(send());
    } else {
      receive();
    }
    end_exchange(x_, &a_.comm.state->last_dispatch);
  }

 private:
  __device__ bool is_bulk(const void* p) const { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
  __device__ bool scales_in_bulk() const { return a_.format.scale_bytes % 16 == 0 && is_bulk(a_.scales); }

  // --- send ---

  // One thread. Starts the bulk copies of a token's row into the stage of the n-th wire row.
  __device__ void load_token_row(int64_t token, int n) const {
    const bool scales = a_.format.scale_bytes != 0 && scales_in_bulk();
    barrier_expect(ring_.barrier(n), a_.format.row_bytes + (scales ? a_.format.scale_bytes : 0));
    bulk_load(ring_.stage(n), a_.x + token * a_.format.row_stride, a_.format.row_bytes, ring_.barrier(n));
    if (scales) {
      bulk_load(
          ring_.stage(n) + a_.format.scales_at(a_.plan.num_topk),
          a_.scales + token * a_.format.scale_bytes,
          a_.format.scale_bytes,
          ring_.barrier(n));
    }
  }

  // Warp-collective. Fills the parts of a wire row that bulk copies do not load. `weight`: this lane's.
  __device__ void fill_wire_row(char* stage, int64_t token, uint64_t weight) const {
    const int lane = lane_id(), weight_bytes = a_.format.weight_bytes, num_topk = a_.plan.num_topk;
    const bool scales = a_.format.scale_bytes != 0 && !scales_in_bulk();
    if (weight_bytes != 0 && lane < num_topk) {
      copy_weight(
          stage + a_.format.weights_at() + lane * weight_bytes, reinterpret_cast<const char*>(&weight), weight_bytes);
    }
    if (scales) {
      copy_bytes(
          stage + a_.format.scales_at(num_topk), a_.scales + token * a_.format.scale_bytes, a_.format.scale_bytes);
    }
    if (weight_bytes != 0 || scales) {
      fence_async_shared();
      __syncwarp();
    }
  }

  // A token, and this lane's slot of the token.
  struct Token {
    int64_t index = -1;  // -1: there is none
    int entry = -1;      // of send_row
    uint64_t weight = 0;
  };

  // Warp-collective. The tokens of this warp, chunk by chunk.
  class Tokens {
   public:
    __device__ Tokens(const Exchange& x, const DispatchArgs& args, int queue, int chunk_tokens)
        : queue_(x.comm, queue), a_(args), chunk_tokens_(chunk_tokens) {}
    __device__ Token next() {
      if (next_ == end_) {
        next_ = queue_.next() * chunk_tokens_;
        queue_.prefetch();
        end_ = min(next_ + chunk_tokens_, int64_t{a_.plan.num_tokens});
        if (next_ >= end_) {
          next_ = end_ = 0;
          return {};
        }
      }
      Token token{next_++};
      if (lane_id() < a_.plan.num_topk) {
        const int64_t i = token.index * a_.plan.num_topk + lane_id();
        token.entry = a_.plan.send_row[i];
        if (a_.format.weight_bytes != 0) {
          copy_weight(
              reinterpret_cast<char*>(&token.weight), a_.weights + i * a_.format.weight_bytes, a_.format.weight_bytes);
        }
      }
      return token;
    }

   private:
    WorkQueue queue_;
    const DispatchArgs& a_;
    const int chunk_tokens_;
    int64_t next_ = 0, end_ = 0;
  };

  // Warp-collective. Waits until the next stage is free. With two stages, the last copy may still be reading the other.
  __device__ void wait_for_stage() const {
    if (ring_.depth() > 1) {
      // fault: dispatch: stage reused too early
      bulk_wait_read<1>();
    } else {
      // fault: dispatch: stage reused too early
      bulk_wait_read<0>();
    }
    fence_async_shared();
    __syncwarp();
  }

  // Rows of a chunk to one rank: the first row and their number.
  struct Span {
    int begin = 0, count = 0;
  };

  // Warp-collective. Returns the number of tokens that this warp has staged.
  __device__ int send() {
    const int lane = lane_id(), me = a_.comm.rank;
    const Layout& layout = x_.layout();
    const int wire_row_bytes = a_.format.bytes(a_.plan.num_topk);
    // This lane's ranks.
    PerRank<int> to, rows_before;
    Peer peers[kRankSteps];
    PerRank<int64_t> rows_at;
    // The current chunk's, and the previous chunk's, whose flag is still to be written.
    Span spans[kRankSteps], unsignaled_spans[kRankSteps];
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      to[step] = rank_in_turn(step, me + warp_id(), x_.world_size());
      rows_before[step] = out_.begin.of(to[step]);
      if (x_.is_peer(to[step])) {
        peers[step] = x_.peer(to[step]);
        rows_at[step] = layout.dispatch_rows(me, to[step]);
      }
    }
    int64_t chunk = -1, unsignaled = -1;
    const auto signal = [&] {
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        if (x_.is_peer(to[step]) && unsignaled >= 0) {
          peers[step].signal_copies(
              layout.dispatch_flag(me, unsignaled),
              flag_of(unsignaled_spans[step].begin, unsignaled_spans[step].count));
        }
      }
      unsignaled = -1;
    };

    Tokens tokens(x_, a_, 0, chunk_tokens_);
    Token token = tokens.next();
    if (lane == 0 && token.index >= 0) {
      load_token_row(token.index, 0);
    }
    int n = 0;
    if (!wait_for_credits(x_, as_volatile(a_.comm.state->last_dispatch))) {
      if (token.index >= 0) {
        ring_.wait(n++);
      }
      return n;
    }
    for (; token.index >= 0; ++n) {
      const Token next = tokens.next();
      const PerRank<int> row_to = find_rows(x_, token.entry, out_).row_to;
      PerRank<int> rows;
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        rows[step] = row_to.of(to[step]);
      }
      const bool begins_chunk = token.index / chunk_tokens_ != chunk;
      if (begins_chunk) {
        chunk = token.index / chunk_tokens_;
#pragma unroll
        for (Span& span : spans) {
          span = {};
        }
      }
      ring_.wait(n);
      char* stage = ring_.stage(n);
      fill_wire_row(stage, token.index, token.weight);
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        const int row = rows[step];
        Span& span = spans[step];
        if (x_.is_peer(to[step]) && row >= 0) {
          peers[step].put(rows_at[step] + row * layout.wire_row_bytes, stage, wire_row_bytes);
          if (span.count == 0) {
            span.begin = row;
          } else if (row != span.begin + span.count) {
            publish_bad_index(
                x_, Failure::bad_send_row, rows_before[step] + span.begin + span.count, rows_before[step] + row);
          }
          ++span.count;
        }
      }
      bulk_commit();
      if (unsignaled >= 0) {
        // fault: dispatch: flag before its rows
        bulk_wait<1>();  // all but this token's
        signal();
      }
      if (next.index < 0 || next.index / chunk_tokens_ != chunk) {
        unsignaled = chunk;
#pragma unroll
        for (int step = 0; step < kRankSteps; ++step) {
          unsignaled_spans[step] = spans[step];
        }
      }
      if (next.index >= 0) {
        wait_for_stage();
        if (lane == 0) {
          load_token_row(next.index, n + 1);
        }
      }
      token = next;
    }
    bulk_wait<0>();
    signal();
    return n;
  }

  // The flag of a chunk holds the range of its rows to the reader.
  __device__ uint64_t flag_of(int begin, int count) const {
    // fault: dispatch: row count in a flag
    return x_.tag() | static_cast<uint64_t>(count) << kCountShift | static_cast<uint64_t>(begin);
  }
  __device__ static int begin_in(uint64_t flag) { return static_cast<int>(flag & (kMaxTokens - 1)); }
  __device__ static int count_in(uint64_t flag) { return static_cast<int>(flag >> kCountShift & 0xff); }
  static constexpr int kCountShift = 24;
  static_assert(kMaxTokens == 1 << kCountShift);

  // Warp-collective. Copies own rows that the receiving blocks have not taken yet. `n`: wire rows that this warp has
  // staged before.
  __device__ void write_own_rows(int n) const {
    if (!wait_for_inverse()) {
      return;
    }
    Tokens tokens(x_, a_, 1, 1);
    for (Token own = tokens.next(); own.index >= 0; own = tokens.next()) {
      n += write_own_row(own, n);
    }
    bulk_wait<0>();
  }

  // --- receive ---

  // Warp-collective.
  __device__ void receive() {
    const int lane = lane_id();
    const Layout& layout = x_.layout();
    const int received = in_.end.of(x_.world_size() - 1);
    if (receiver_ == 0) {
      if (!exchange_handshakes(x_, a_.handshake, {out_.counts(), in_.counts()}, chunks_)) {
        return;
      }
    } else if (a_.plan.expert_major) {
      invert_recv_pair(x_, a_.plan, received, receiver_ - 1, inverters());
    }
    zero_fill(received);
    if (!wait_for_handshakes(x_) || !wait_for_inverse()) {
      return;
    }

    // For each rank, this warp takes the receiver_-th chunk, then the next chunk that no warp has taken. Taking a chunk
    // costs almost a microsecond, so take_chunk first checks that there can be one.
    PerRank<int64_t> chunk, chunks;
    PerRank<int> next, end;  // arrived rows of the previous chunk
#pragma unroll
    for (int step = 0; step < kRankSteps; ++step) {
      const int from = rank_at(step);
      chunk[step] = receiver_;
      chunks[step] = x_.is_peer(from) ? min(announced_chunks(x_, from), layout.max_tokens) : 0;
    }
    const int wire_row_bytes = a_.format.bytes(a_.plan.num_topk);
    int turn = 0;
    Tokens tokens(x_, a_, 1, 1);
    Token own = tokens.next();
    const auto have_arrived = [&] {
      RankSet ready;
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        ready.words[step] = __ballot_sync(kFullWarp, next[step] < end[step]);
      }
      return ready;
    };
    for (int n = 0;;) {
      RankSet ready = have_arrived();
      Wait wait(x_, Phase::rows);
      while (!ready.any()) {
        bool waits = false;
#pragma unroll
        for (int step = 0; step < kRankSteps; ++step) {
          waits = waits || chunk[step] < chunks[step];
        }
        if (!__any_sync(kFullWarp, waits) && own.index < 0) {
          bulk_wait<0>();
          return;
        }
        bool gives_up = false;
#pragma unroll
        for (int step = 0; step < kRankSteps; ++step) {
          const int from = rank_at(step);
          if (chunk[step] >= chunks[step]) {
            continue;
          }
          const uint64_t flag = x_.inbox().poll_signal(layout.dispatch_flag(from, chunk[step]));
          if (x_.is_tagged(flag)) {
            next[step] = begin_in(flag);
            end[step] = min(begin_in(flag) + count_in(flag), static_cast<int>(layout.max_tokens));
            chunk[step] = take_chunk(from, chunks[step]);
          } else {
            gives_up = gives_up || (own.index < 0 && !wait.keep_waiting(from, flag));
          }
        }
        ready = have_arrived();
        if (ready.any()) {
          fence_async_global();  // between the flag and the bulk copies of the rows that it publishes
          __syncwarp();
        } else if (own.index >= 0) {
          n += write_own_row(own, n);
          own = tokens.next();
        } else if (__any_sync(kFullWarp, gives_up)) {
          bulk_wait<0>();
          return;
        }
      }
      // The sources take turns, so that none of them falls behind.
      const int source = ready.first_from(turn);
      turn = (source + 1) % (kRankSteps * kWarp);
      const int row = next.of(source);
      const int64_t position = int64_t{in_.begin.of(source)} + row;
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        next[step] += rank_at(step) == source ? 1 : 0;
      }
      wait_for_stage();
      if (lane == 0) {
        barrier_expect(ring_.barrier(n), wire_row_bytes);
        bulk_load(
            ring_.stage(n),
            x_.inbox().data(layout.dispatch_rows(source, a_.comm.rank) + row * layout.wire_row_bytes),
            wire_row_bytes,
            ring_.barrier(n));
      }
      const int64_t target = target_of(position);
      ring_.wait(n);
      write_row(ring_.stage(n), position, target);
      bulk_commit();
      ++n;
    }
  }

  // One thread. Takes the next chunk of a rank, beyond the first chunk of every warp.
  __device__ int64_t take_chunk(int from, int64_t chunks) const {
    uint32_t* taken = &a_.comm.state->chunks[from];
    // fault: dispatch: chunk that no warp takes
    return receivers_ < chunks ? receivers_ + int64_t{atomicAdd(taken, 1)} : chunks;
  }

  // Warp-collective. Writes a token of this rank, if it has an expert here. Returns the rows staged: 1 or 0.
  __device__ int write_own_row(const Token& token, int n) const {
    const int me = a_.comm.rank;
    const int row = find_rows(x_, token.entry, out_).row_to.of(me);
    if (row < 0) {
      return 0;
    }
    const int64_t position = int64_t{in_.begin.of(me)} + row;
    wait_for_stage();
    if (lane_id() == 0) {
      load_token_row(token.index, n);
    }
    const int64_t target = target_of(position);
    ring_.wait(n);
    fill_wire_row(ring_.stage(n), token.index, token.weight);
    write_row(ring_.stage(n), position, target);
    bulk_commit();
    return 1;
  }

  // Warp-collective. Zeros this warp's share of the rows that no token fills.
  __device__ void zero_fill(int received) const {
    const int64_t rows = a_.plan.rows;
    if (!a_.plan.expert_major) {
      for (int64_t row = received + receiver_; row < rows; row += receivers_) {
        zero_row(row, a_.plan.num_topk);
      }
      return;
    }
    for (int64_t first = int64_t{receiver_} * kWarp; first < rows; first += int64_t{receivers_} * kWarp) {
      const int64_t row = first + lane_id();
      uint32_t empty = __ballot_sync(kFullWarp, row < rows && a_.plan.recv_pair[row] < 0);
      while (empty != 0) {
        zero_row(first + __ffs(static_cast<int>(empty)) - 1, 1);
        empty &= empty - 1;
      }
    }
  }

  // Warp-collective.
  __device__ void zero_row(int64_t row, int weights) const {
    zero_bytes(a_.out + row * a_.format.row_stride, a_.format.row_bytes);
    const int64_t weight_bytes = int64_t{a_.format.weight_bytes} * weights;
    zero_bytes(a_.out_weights + row * weight_bytes, weight_bytes);
    zero_bytes(a_.out_scales + row * a_.format.scale_bytes, a_.format.scale_bytes);
  }

  // --- both: a received wire row to its rows of the result ---

  // Warps that build rows_of: all that receive, except the one that exchanges handshakes.
  __device__ int inverters() const { return receivers_ - 1; }

  // Warp-collective. Waits until rows_of is complete.
  __device__ bool wait_for_inverse() const {
    return !a_.plan.expert_major || wait_for_gate(x_, static_cast<uint32_t>(inverters()));
  }

  // One thread. The target of this lane's slot. expert_major: the row of the result; rank_major: the local expert; -1:
  // none.
  __device__ int64_t target_of(int64_t wire_row) const {
    if (a_.plan.expert_major) {
      return row_of_slot(x_, a_.plan, wire_row);
    }
    if (a_.format.weight_bytes == 0 || wire_row >= a_.plan.rows || lane_id() >= a_.plan.num_topk) {
      return -1;
    }
    const int64_t i = wire_row * a_.plan.num_topk + lane_id();
    return a_.plan.wide_idx ? static_cast<const int64_t*>(a_.plan.recv_topk_idx)[i]
                            : static_cast<const int32_t*>(a_.plan.recv_topk_idx)[i];
  }

  // Warp-collective. Copies a staged wire row to its rows of the result. The caller commits the bulk copies. `target`:
  // of target_of, loaded before the wire row arrived.
  __device__ void write_row(const char* stage, int64_t wire_row, int64_t target) const {
    const int lane = lane_id(), num_topk = a_.plan.num_topk, weight_bytes = a_.format.weight_bytes;
    const char* weights = stage + a_.format.weights_at();
    const char* scales = stage + a_.format.scales_at(num_topk);
    if (a_.plan.expert_major) {
      if (target >= 0 && weight_bytes != 0) {
        copy_weight(a_.out_weights + target * weight_bytes, weights + lane * weight_bytes, weight_bytes);
      }
      if (target >= 0) {
        bulk_store(a_.out + target * a_.format.row_stride, stage, a_.format.row_bytes);
      }
      if (a_.format.scale_bytes != 0) {
        for (uint32_t left = __ballot_sync(kFullWarp, target >= 0); left != 0; left &= left - 1) {
          write_scales(__shfl_sync(kFullWarp, target, __ffs(static_cast<int>(left)) - 1), scales);
        }
      }
      return;
    }
    if (wire_row >= a_.plan.rows) {
      return;  // dropped
    }
    if (lane == 0) {
      bulk_store(a_.out + wire_row * a_.format.row_stride, stage, a_.format.row_bytes);
    }
    if (weight_bytes != 0 && lane < num_topk) {
      char* to = a_.out_weights + (wire_row * num_topk + lane) * weight_bytes;
      if (target >= 0) {
        copy_weight(to, weights + lane * weight_bytes, weight_bytes);
      } else {
        zero_weight(to, weight_bytes);
      }
    }
    if (a_.format.scale_bytes != 0) {
      write_scales(wire_row, scales);
    }
  }

  // Warp-collective.
  __device__ void write_scales(int64_t row, const char* scales) const {
    char* to = a_.out_scales + row * a_.format.scale_bytes;
    if (a_.format.scale_bytes % 16 == 0 && is_bulk(a_.out_scales)) {
      if (lane_id() == 0) {
        bulk_store(to, scales, a_.format.scale_bytes);
      }
    } else {
      copy_bytes(to, scales, a_.format.scale_bytes);
    }
  }

  const DispatchArgs& a_;
  const Exchange x_;
  const int receiver_, receivers_;
  const bool sends_;
  const int chunk_tokens_, chunks_;
  const Ring ring_;
  const WireRows out_, in_;
};

__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    dispatch_kernel(const __grid_constant__ DispatchArgs args, const __grid_constant__ DispatchShape shape) {
  prefetch_arguments(args);
  if (!has_failed(args.comm)) {
    Dispatch(args, shape).run();
  }
}

// Tokens per chunk, for `warps` that send and `token_bytes` per token. Each chunk costs a fence, some microseconds of
// one warp. But the receiver uses no row of a chunk before the whole chunk has arrived, and the chunks of all warps
// share the links. So with larger chunks the receiver starts and ends later. That costs more if the receiver has more
// work than the sender.
int chunk_tokens_of(int tokens, int warps, int token_bytes, bool expert_major) {
  constexpr int kChunkBytes = 64 * 1024;
  if (tokens <= (expert_major ? 12 * warps : warps)) {
    return 1;
  }
  return std::clamp(kChunkBytes / token_bytes, 1, tokens <= 16 * warps ? 2 : 4);
}

// Eight blocks that only copy rows fill the links of an H200. Here they also wait for flags and for the first rows. In
// rank_major each arrived row goes to one row of the result, so the receivers need one block less.
DispatchShape shape_of(const DispatchArgs& args) {
  const int tokens = args.plan.num_tokens, blocks = args.comm.layout.num_blocks, ranks = args.comm.layout.world_size;
  const int senders = args.plan.expert_major ? (blocks + 2) / 3 : (3 * blocks + 4) / 8;
  const auto stage = static_cast<int>(round_up(args.format.bytes(args.plan.num_topk), 128));
  const int fit = kStageMemory / stage;
  const int stages = fit >= 2 * kMaxWarps ? 2 : 1;
  const int warps = std::min(fit / stages, tokens > 4 * senders * kFewWarps ? kMaxWarps : kFewWarps);
  const int token_bytes =
      stage * std::max(std::min(ranks - 1, args.plan.num_topk), 1);  // to all ranks that it can visit
  const int chunk_tokens = chunk_tokens_of(tokens, senders * warps, token_bytes, args.plan.expert_major);
  return {ranks > 1 ? senders : 0, warps, stages, stage, chunk_tokens};
}

}  // namespace

int max_wire_row_bytes() {
  return kStageMemory / 4 / 128 * 128;
}

cudaError_t prepare_dispatch() {
  return cudaFuncSetAttribute(dispatch_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024);
}

cudaError_t launch_dispatch(const DispatchArgs& args, cudaStream_t stream) {
  const DispatchShape shape = shape_of(args);
  const int shared = shape.warps * shape.stages * (shape.stage_bytes + static_cast<int>(sizeof(uint64_t)));
  const int blocks = args.comm.layout.num_blocks, threads = shape.warps * kWarp;
  return launch_kernel(Launch::in_clusters, dispatch_kernel, blocks, threads, shared, stream, args, shape);
}

}  // namespace ep::nvlink
