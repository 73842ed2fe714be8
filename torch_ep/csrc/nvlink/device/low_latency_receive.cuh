// The receive of ep::low_latency_dispatch: waits for the announcements, then copies each wire row to its rows of the
// result.
#pragma once

#include "nvlink/device/low_latency.cuh"
#include "nvlink/device/packet.cuh"
#include "nvlink/device/rows.cuh"

namespace ep::nvlink {

constexpr int kDispatchThreads = 512;
constexpr int kDispatchWarps = kDispatchThreads / kWarp;

// What the host derives for a launch.
struct LowLatencyShape {
  int stage_bytes;       // a wire row, padded
  int receive_warps;     // per block, each with a stage; 0 if rows are sent in packets
  int parts;             // chunks per row in packets, one per warp
  int packet_row_bytes;  // of such a row
  Divisor by_parts, by_tokens, by_local, by_words, by_rows;
};

// Shared memory of a thread block.
struct LowLatencyMemory {
  char* stages;        // one wire row per stage
  uint64_t* barriers;  // one per warp
  int* words;
  bool* is_lost;  // one per rank
};

template <bool uses_packets>
class LowLatencyReceive {
 public:
  // `loads`: earlier loads on this warp's barrier.
  __device__ LowLatencyReceive(
      const LowLatencyDispatchArgs& args,
      const LowLatencyShape& shape,
      const LowLatencyExchange& exchange,
      const LowLatencyMemory& memory,
      int loads)
      : a_(args),
        shape_(shape),
        x_(exchange),
        memory_(memory),
        loads_(loads),
        num_local_(args.num_experts / args.comm.low_latency.world_size),
        scales_at_(static_cast<int>(args.scales_at())),
        routes_at_(static_cast<int>(args.routes_at())),
        wire_row_bytes_(static_cast<int>(args.wire_row_bytes())) {}

  // Block-collective.
  __device__ void run() const {
    const Announced announced{memory_.words, layout().words};
    if constexpr (uses_packets) {
      // Polls the warp's first chunk right after its announcement words: most likely it has arrived.
      ChunkOfRow first(*this, first_chunk());
      if (wait_for_announcements(memory_.words, [&] { first.poll(); })) {
        receive_packets(announced, first);
        count_rows(announced);
      }
    } else if (wait_for_announcements(memory_.words, [] {})) {
      if (warp_id() < shape_.receive_warps) {
        receive_rows(announced);
      }
      count_rows(announced);
    }
  }

 private:
  __device__ const LowLatencyLayout& layout() const { return x_.layout(); }

  // The announcements of all ranks, in shared memory.
  struct Announced {
    const int* words;  // [world_size][words of an announcement]
    int stride;

    __device__ int count(int source, int expert) const { return words[source * stride + Handshake::kFields + expert]; }
    // Rows of an expert from the ranks below the source.
    __device__ int before(int source, int expert) const {
      int sum = 0;
#pragma unroll 1
      for (int s = 0; s < source; ++s) {
        // fault: low latency: rows of earlier ranks
        sum += count(s, expert);
      }
      return sum;
    }
    __device__ bool visits(const LowLatencyLayout& layout, int source, int token) const {
      const int word = Handshake::kFields + layout.num_local_experts + token / 32;
      return (words[source * stride + word] >> token % 32 & 1) != 0;
    }
  };

  __device__ uint64_t poll_word(int source, int i) const {
    return x_.inbox().poll_word(layout().announcement(x_.half(), source) + int64_t{i} * 8);
  }

  // One thread. Stores word `i` of the announcement of `source`. False: a mismatch.
  __device__ bool store_word(int& stored, int source, int i, uint32_t value) const {
    const bool is_count = i >= Handshake::kFields && i < Handshake::kFields + num_local_;
    stored = is_count ? min(max(static_cast<int>(value), 0), a_.max_tokens) : static_cast<int>(value);
    if (i >= Handshake::kFields || static_cast<int32_t>(value) == a_.handshake.field(i)) {
      return true;
    }
    if (blockIdx.x == 0) {
      FailureCause cause{Failure::mismatch, Phase::handshake, source};
      cause.field = static_cast<HandshakeField>(i);
      cause.ours = a_.handshake.field(i);
      cause.theirs = static_cast<int32_t>(value);
      cause.their_epoch = static_cast<int64_t>(x_.number());
      x_.publish_failure(cause);
    }
    return false;
  }

  // Block-collective. False: a failure or a mismatch. Each thread calls `then` after its own words, before the barrier.
  template <class Then>
  __device__ bool wait_for_announcements(int* announced, const Then& then) const {
    const int words = layout().words, all = x_.world_size() * words;
    bool going = true;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); going && i < all; i += kDispatchThreads) {
      const int s = shape_.by_words.quotient(i), word = i - s * words;
      uint64_t value = 0;
      auto outcome = Outcome::absent;
      if (x_.is_active(s)) {
        outcome = x_.wait(Phase::handshake, s, word == 0, [&] {
          value = poll_word(s, word);
          return x_.is_word(value);
        });
      }
      if (outcome == Outcome::arrived) {
        going = store_word(announced[i], s, word, static_cast<uint32_t>(value));
      } else {
        going = outcome == Outcome::absent;
        memory_.is_lost[s] = true;
        announced[i] = 0;
      }
    }
    then();
    going = __syncthreads_and(going) != 0;
    return going && (!x_.masks() || agree_on_ranks(announced));
  }

  // Block-collective, only if timeouts mask. Agrees with all other blocks on the ranks that take part.
  __device__ bool agree_on_ranks(int* announced) const {
    __shared__ bool is_there[kMaxRanks];
    const int words = layout().words;
    bool same = true;
    for (int s = lane_id(); warp_id() == 0 && s < x_.world_size(); s += kWarp) {
      is_there[s] = x_.decide(s, !memory_.is_lost[s]);
#pragma unroll 1
      for (int i = 0; is_there[s] && memory_.is_lost[s] && i < words; ++i) {
        // Another block has found the announcement, so it is there.
        same = store_word(announced[s * words + i], s, i, static_cast<uint32_t>(poll_word(s, i))) && same;
      }
    }
    same = __syncthreads_and(same) != 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < x_.world_size() * words; i += kDispatchThreads) {
      announced[i] = is_there[shape_.by_words.quotient(i)] ? announced[i] : 0;
    }
    __syncthreads();
    return same;
  }

  // Block-collective. Each warp handles some experts: it writes their rows, summed up to each source rank, and -1 for
  // rows that no rank sent.
  __device__ void count_rows(const Announced& announced) const {
    const int lane = lane_id(), world_size = x_.world_size(), rows_of_expert = world_size * a_.max_tokens;  // C
    // The warps with the fewest rows to receive come first.
    const int turn = uses_packets ? warp_id() : kDispatchWarps - 1 - warp_id();
#pragma unroll 1
    for (int e = static_cast<int>(blockIdx.x) + x_.workers() * turn; e < num_local_;
         e += x_.workers() * kDispatchWarps) {
      PerRank<int> counts;
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        counts[step] = rank_at(step) < world_size ? announced.count(rank_at(step), e) : 0;
      }
      const PerRank<int> ends = sum_up_to_rank(counts, world_size);
#pragma unroll
      for (int step = 0; step < kRankSteps; ++step) {
        if (rank_at(step) < world_size) {
          a_.source_offsets[e * world_size + rank_at(step)] = ends[step];
        }
      }
      const int total = ends.of(world_size - 1);
      if (lane == 0) {
        a_.tokens_per_expert[e] = total;
      }
#pragma unroll 1
      for (int i = total + lane; i < rows_of_expert; i += kWarp) {
        a_.recv_pair[e * rows_of_expert + i] = -1;
      }
    }
  }

  // One thread. The row of the result for a slot, or -1.
  __device__ int64_t row_at(const Announced& announced, int source, int expert_of_all, int index) const {
    const int expert = expert_of_all - x_.me() * num_local_;
    if (expert_of_all < 0 || expert < 0 || expert >= num_local_ || index < 0 ||
        index >= announced.count(source, expert)) {
      return -1;
    }
    const int64_t rows_of_expert = int64_t{x_.world_size()} * a_.max_tokens;
    return expert * rows_of_expert + announced.before(source, expert) + index;
  }

  // Warp-collective. Lane k writes slot k of a token. `i`: source * max_tokens + token.
  __device__ void write_slot(int i, int64_t row, float weight) const {
    const int64_t slot = int64_t{i} * a_.num_topk + lane_id();
    if (lane_id() < a_.num_topk) {
      a_.recv_row[slot] = static_cast<int>(row);
    }
    if (row >= 0) {
      a_.recv_pair[row] = static_cast<int>(slot);
      a_.row_weights[row] = weight;
    }
  }

  // The index of a row's first word of scales. The next word is scale_rows further.
  __device__ int64_t scales_of(int64_t row) const {
    const int rows_of_expert = x_.world_size() * a_.max_tokens, expert = shape_.by_rows.quotient(static_cast<int>(row));
    return expert * a_.num_scales * a_.scale_rows + (row - int64_t{expert} * rows_of_expert);
  }

  // One lane's part of a chunk of a row in packets: a SlotRoute, a payload, and the scale of a group of channels. Parts
  // that this lane does not have count as arrived.
  struct ChunkOfRow {
    int row, chunk, source, token;  // row: source * max_tokens + token
    LaneVectors vectors;
    bool has_route, has_payload, has_scale;
    Inbox inbox;
    int64_t route_at, payload_at, scale_at;
    int nth_scale;  // of the packet at scale_at
    uint4 route, scale;
    Packets packets;

    // The n-th chunk of all rows; empty if there is none.
    __device__ ChunkOfRow(const LowLatencyReceive& r, int n)
        : row(r.shape_.by_parts.quotient(n)),
          chunk(n - row * r.shape_.parts),
          source(r.shape_.by_tokens.quotient(row)),
          token(row - source * r.a_.max_tokens),
          vectors(chunk, r.a_.row_bytes / 16),
          inbox(r.x_.inbox()) {
      const int lane = lane_id();
      const bool is_there = n < r.num_chunks();
      const LowLatencyLayout& layout = r.layout();
      const int64_t from = layout.dispatch_packets(r.x_.half(), source, token, r.shape_.packet_row_bytes);
      has_route = is_there && lane < r.a_.num_topk;
      route_at = from + lane * kPacketBytes;
      has_payload = is_there && vectors.any();
      payload_at = from + layout.row_packets_at + packet_offset(chunk);
      // A packet has the scales of the i-th vectors of one group after another.
      const int groups = vectors.step() / kGroupVectors;
      nth_scale = (lane >= groups ? 1 : 0) + (lane >= 2 * groups ? 1 : 0);
      scale_at =
          from + layout.scale_packets_at + (chunk * kScalePacketsPerChunk + lane - nth_scale * groups) * kPacketBytes;
      has_scale = is_there && r.a_.num_scales > 0 && lane < r.groups_of(chunk);
      const uint32_t tag = r.x_.tag();
      route = {0, 0, 0, has_route ? 0 : tag};  // 0 is not the tag of any exchange
      scale = {0, 0, 0, has_scale ? 0 : tag};
#pragma unroll
      for (int i = 0; i < kPacketsPerLane; ++i) {
        packets.packets[i].w = has_payload ? 0 : tag;
      }
    }

    __device__ void poll() {
      if (has_route) {
        route = inbox.poll_packet(route_at);
      }
      if (has_scale) {
        scale = inbox.poll_packet(scale_at);
      }
      if (has_payload) {
        packets.poll(inbox, payload_at);
      }
    }
    __device__ bool has_arrived(uint32_t tag) const { return route.w == tag && scale.w == tag && packets.arrived(tag); }
    __device__ uint32_t scale_word() const { return nth_scale == 0 ? scale.x : nth_scale == 1 ? scale.y : scale.z; }
  };

  // This warp's first chunk. The warps that send least come first, from the last one before the counting warp.
  __device__ int first_chunk() const {
    constexpr int kFirst = kDispatchWarps - 2;
    const int turn = (kFirst - warp_id() + kDispatchWarps) % kDispatchWarps;
    return static_cast<int>(blockIdx.x) + x_.workers() * turn;
  }
  __device__ int num_chunks() const { return x_.world_size() * a_.max_tokens * shape_.parts; }
  // Groups of channels of a chunk.
  __device__ int groups_of(int chunk) const {
    const int groups = (a_.row_bytes / 16 + kGroupVectors - 1) / kGroupVectors;
    return min(groups - chunk * kChunkGroups, kChunkGroups);
  }

  // Block-collective. Each warp receives chunks of rows. `c`: its first chunk, which may not exist.
  __device__ void receive_packets(const Announced& announced, ChunkOfRow& c) const {
#pragma unroll 1
    for (int n = first_chunk(); n < num_chunks();) {
      int64_t row = -1;
      float weight = 0;
      if (announced.visits(layout(), c.source, c.token)) {
        const auto outcome = wait_for_chunk(c);
        if (outcome == Outcome::failed) {
          break;
        }
        if (outcome == Outcome::arrived) {
          row =
              c.has_route ? row_at(announced, c.source, static_cast<int>(c.route.x), static_cast<int>(c.route.y)) : -1;
          weight = __uint_as_float(c.route.z);
          write_chunk(c, row);
        }
      }
      if (c.chunk == 0) {
        write_slot(c.row, row, weight);
      }
      n += x_.workers() * kDispatchWarps;
      if (n < num_chunks()) {
        c = ChunkOfRow(*this, n);
      }
    }
  }

  // Warp-collective. Waits for a chunk. The outcome is the same in all lanes.
  __device__ Outcome wait_for_chunk(ChunkOfRow& c) const {
    auto outcome = Outcome::arrived;
    if (!c.has_arrived(x_.tag())) {
      outcome = x_.wait(Phase::rows, c.source, lane_id() == 0, [&] {
        c.poll();
        return c.has_arrived(x_.tag());
      });
    }
    if (__all_sync(kFullWarp, outcome == Outcome::arrived)) {
      return Outcome::arrived;
    }
    return __any_sync(kFullWarp, outcome == Outcome::failed) ? Outcome::failed : Outcome::absent;
  }

  // Warp-collective. Writes a chunk to the rows of all lanes. Each lane writes its payload and scale.
  __device__ void write_chunk(const ChunkOfRow& c, int64_t row) const {
    LanePayload payload = c.packets.payload();
#pragma unroll
    for (uint4& vector : payload.vectors) {
      keep_together(vector);
    }
    const bool is_byte = a_.quantize == Quantize::fp8_ue8m0;
    const int group = c.chunk * kChunkGroups + lane_id(), groups = a_.num_scales > 0 ? groups_of(c.chunk) : 0;
    const bool has_word = !is_byte && lane_id() < groups;
    const bool has_byte = is_byte && lane_id() < (groups + 3) / 4 * 4;  // padding groups too: 0
    char* scales = static_cast<char*>(a_.scales) +
                   (is_byte ? group / 4 * a_.scale_rows * 4 + group % 4 : group * a_.scale_rows * 4);
    const uint32_t scale = is_byte ? c.scale_word() >> 23 : c.scale_word();
    const int scale_row = static_cast<int>(a_.num_scales > 0 && row >= 0 ? scales_of(row) : 0);
#pragma unroll 1
    for (uint32_t lanes = __ballot_sync(kFullWarp, row >= 0); lanes != 0; lanes &= lanes - 1) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      const int64_t to = __shfl_sync(kFullWarp, static_cast<int>(row), lane);
      char* to_scale = scales + int64_t{__shfl_sync(kFullWarp, scale_row, lane)} * 4;
      store_payload(a_.rows + to * a_.row_bytes, payload, c.vectors);
      if (has_word) {
        *reinterpret_cast<uint32_t*>(to_scale) = scale;
      }
      if (has_byte) {
        *to_scale = static_cast<char>(scale);
      }
    }
  }

  // Warp-collective, in receive_warps warps. Receives whole rows by bulk copies.
  __device__ void receive_rows(const Announced& announced) const {
    const int lane = lane_id(), rows_of_expert = x_.world_size() * a_.max_tokens;
    char* stage = memory_.stages + int64_t{warp_id()} * shape_.stage_bytes;
    uint64_t* barrier = &memory_.barriers[warp_id()];
    int n = loads_;
    const int step = x_.workers() * shape_.receive_warps;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x) + x_.workers() * warp_id(); i < rows_of_expert; i += step) {
      const int source = shape_.by_tokens.quotient(i), token = i - source * a_.max_tokens;
      int64_t row = -1;
      float weight = 0;
      if (announced.visits(layout(), source, token)) {
        const int64_t flag = layout().dispatch_flag(x_.half(), source, token);
        auto outcome = Outcome::arrived;
        if (lane == 0) {
          outcome = x_.wait(Phase::rows, source, true, [&] { return x_.inbox().poll_signal(flag) == x_.number(); });
        }
        if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
          break;
        }
        if (__all_sync(kFullWarp, outcome == Outcome::arrived)) {
          bulk_wait_read<0>();   // earlier copies out of this stage
          fence_async_shared();  // earlier reads by this lane
          __syncwarp();
          if (lane == 0) {
            fence_async_global();  // between the flag and the bulk copy of the row that it publishes
            barrier_expect(barrier, wire_row_bytes_);
            const char* from = x_.inbox().data(layout().dispatch_row(x_.half(), source, token));
            bulk_load(stage, from, wire_row_bytes_, barrier);
          }
          barrier_wait(barrier, n++ % 2);
          if (lane < a_.num_topk) {
            const SlotRoute route = reinterpret_cast<const SlotRoute*>(stage + routes_at_)[lane];
            row = row_at(announced, source, route.expert, route.index);
            weight = route.weight;
          }
          write_row(stage, row);
        }
      }
      write_slot(i, row, weight);
    }
    bulk_wait<0>();
  }

  // Warp-collective. Writes a wire row to the rows of all lanes.
  __device__ void write_row(const char* stage, int64_t row) const {
    if (row >= 0) {
      bulk_store(a_.rows + row * a_.row_bytes, stage, a_.row_bytes);
    }
    bulk_commit();
#pragma unroll 1
    for (uint32_t left = a_.num_scales != 0 ? __ballot_sync(kFullWarp, row >= 0) : 0; left != 0; left &= left - 1) {
      const int64_t of_row = __shfl_sync(kFullWarp, row, __ffs(static_cast<int>(left)) - 1);
      int* scales = static_cast<int*>(a_.scales) + scales_of(of_row);
#pragma unroll 1
      for (int j = lane_id(); j < a_.num_scales; j += kWarp) {
        scales[j * a_.scale_rows] = reinterpret_cast<const int*>(stage + scales_at_)[j];
      }
    }
    __syncwarp();  // all have read the stage
  }

  const LowLatencyDispatchArgs& a_;
  const LowLatencyShape& shape_;
  const LowLatencyExchange& x_;
  const LowLatencyMemory& memory_;
  const int loads_;
  const int num_local_;
  const int scales_at_, routes_at_, wire_row_bytes_;
};

}  // namespace ep::nvlink
