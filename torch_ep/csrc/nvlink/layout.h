// The layout of a rank's symmetric buffer, for host and device. Every rank has the same layout, so an offset is valid
// in every peer's buffer. docs/protocol.md has the table of signals.
#pragma once

#include "core/integer_math.h"
#include "core/quantization.h"

#include <cstdint>

namespace ep::nvlink {

// Note [How many ranks]
// The world size is a run-time value. kMaxRanks bounds arrays that have an element per rank; nothing else depends on
// it. The costs of a larger bound, with figures for 72 ranks (one NVL72 domain):
//   - kernel arguments: 8 bytes per rank, the peers' buffers. 656 bytes at most now; with 72 ranks 1.1 KB of 4 KB, and
//     beyond 1 KB prefetch_arguments (device/exchange.cuh) needs more than one line per warp;
//   - registers: one per 32 ranks for each value that a warp keeps per rank (Note [Ranks and lanes], device/ranks.cuh);
//   - shared memory of ep::plan: plan_words_per_expert(72) words per local expert, so at most 117 of them;
//   - shared memory of ep::low_latency_dispatch: two announcements per rank, with 4 local experts and 128 tokens 10 KB;
//   - symmetric memory: two buffers of (world_size - 1) * max_tokens wire rows. With 4096 tokens of 7168 elements, 72
//     ranks take 7.8 GiB each, so max_tokens has to be smaller;
//   - a plan sends every token's experts to every rank, and each block reads the counts of all blocks of all ranks;
//   - abort signals have 7 bits for a rank.
constexpr int kMaxRanks = 16;
constexpr int kWarpLanes = 32;
constexpr int kRankSteps = (kMaxRanks + kWarpLanes - 1) / kWarpLanes;  // ranks per lane
constexpr int kMaxTopk = 32;                                           // one lane per slot
// Bound of the tokens per rank: the index of a row and a count share the lower half of a flag.
constexpr int64_t kMaxTokens = int64_t{1} << 24;

// If rows to a rank times peers are at most kMaxSplitRows, ep::combine splits these rows into chunks of columns, so
// that every warp has a chunk: kMinParts per row, or more for very few rows, about kFewChunks in total. Measured on two
// H100.
constexpr int kFewChunks = 192;
constexpr int kMinParts = 2;
constexpr int kMaxSplitRows = 512;

// Words of 32 tokens per rank and round of a block of ep::plan.
constexpr int kPlanWords = 8;
EP_HOST_DEVICE constexpr int plan_words(int world_size) {
  return world_size <= 4 ? kPlanWords : kPlanWords / 2;
}

// Words of shared memory that ep::plan needs per local expert: total, begin, rows before this block's share of each
// rank, a bit per token of a round, and a histogram entry per rank.
EP_HOST_DEVICE constexpr int64_t plan_words_per_expert(int world_size) {
  return 2 + 2 * world_size + world_size * plan_words(world_size);
}

// Experts that fit into the shared memory of a thread block.
EP_HOST_DEVICE constexpr int64_t most_experts(int64_t world_size) {
  constexpr int64_t kSharedBytes = 200 * 1024;
  return kSharedBytes / 4 / plan_words_per_expert(static_cast<int>(world_size)) * world_size;
}

// Values on which all ranks of an exchange must agree. An operator sets the fields that it uses; the others are 0.
struct Handshake {
  static constexpr int kFields = 10;
  static constexpr int kWords = kFields / 2;  // words of 64 bits in a header

  int32_t num_experts, num_topk;
  int32_t hidden, dtype;  // of a row; dtypes are of at::ScalarType
  int32_t max_tokens, quantize;
  int32_t weight_bytes, weight_dtype;  // topk_weights, per token
  int32_t scale_bytes, scale_dtype;    // scales, per token

  EP_HOST_DEVICE int32_t field(int i) const { return (&num_experts)[i]; }
  EP_HOST_DEVICE uint64_t word(int i) const {
    return static_cast<uint64_t>(static_cast<uint32_t>(field(2 * i + 1))) << 32 | static_cast<uint32_t>(field(2 * i));
  }
};
static_assert(sizeof(Handshake) == Handshake::kFields * sizeof(int32_t));

// The fields of Handshake, in their order, and other values that may differ between two ranks.
enum class HandshakeField : int32_t {
  num_experts,
  num_topk,
  hidden,
  dtype,
  max_tokens,
  quantize,
  weight_bytes,
  weight_dtype,
  scale_bytes,
  scale_dtype,
  op,
  rows_to_peer,
  rows_from_peer,
};
static_assert(static_cast<int>(HandshakeField::op) == Handshake::kFields);

// The layout of a rank's handshake in a peer's memory, in words of 64 bits. Each source alternates between two headers:
// a peer may be one exchange ahead but never two, since no rank ends an exchange before every peer has entered it.
struct Header {
  static constexpr int kEpoch = 0;  // written last
  static constexpr int kOp = 1;
  static constexpr int kHandshake = 2;
  static constexpr int kRows = kHandshake + Handshake::kWords;
  static constexpr int kChunks = kRows + 1;  // in ep::dispatch: number of flags that the reader will get
  static constexpr int kBytes = 128;
  static_assert((kChunks + 1) * 8 <= kBytes);

  // Wire rows from the writer to the reader, and back; -1: not known when the exchange begins.
  EP_HOST_DEVICE static constexpr uint64_t rows_word(int to_reader, int from_reader) {
    return static_cast<uint64_t>(static_cast<uint32_t>(from_reader)) << 32 | static_cast<uint32_t>(to_reader);
  }
  EP_HOST_DEVICE static constexpr int rows_to_reader(uint64_t word) { return static_cast<int>(word & 0xffffffff); }
  EP_HOST_DEVICE static constexpr int rows_from_reader(uint64_t word) { return static_cast<int>(word >> 32); }
};

struct Layout {
  // A block of ep::plan publishes one word per local expert, its rows, and kPlanSums more: rows of all local experts,
  // tokens of the whole rank, and a status.
  static constexpr int kPlanSums = 3;

  int world_size;
  int num_blocks;
  int num_topk;
  int num_experts;
  int64_t max_tokens;
  int64_t wire_row_bytes;  // reserved bytes per wire row, a multiple of 128

  // Derived from these.
  int64_t counts_bytes;  // of one block
  int64_t topk_bytes;    // of one rank
  int64_t rows_bytes;    // only of peers: a rank sends nothing to itself
  int64_t done_at, abort_signals_at, plan_flags_at, dispatch_flags_at, combine_flags_at, plan_counts_at, plan_topk_at,
      dispatch_rows_at, combine_rows_at, end;

  Layout() = default;
  Layout(int ranks, int blocks, int topk, int experts, int64_t tokens, int64_t row_bytes)
      : world_size(ranks),
        num_blocks(blocks),
        num_topk(topk),
        num_experts(experts),
        max_tokens(tokens),
        wire_row_bytes(row_bytes),
        counts_bytes(round_up((num_local_experts() + kPlanSums) * int64_t{8}, 16)),
        topk_bytes(round_up(tokens * topk * 4, 16)),
        rows_bytes((ranks - 1) * tokens * row_bytes),
        done_at(header(2, 0)),
        abort_signals_at(done_at + ranks * int64_t{8}),
        plan_flags_at(abort_signals_at + ranks * int64_t{8}),
        dispatch_flags_at(plan_flags_at + int64_t{ranks} * blocks * 8),
        combine_flags_at(dispatch_flags_at + ranks * tokens * 8),
        plan_counts_at(round_up(combine_flags_at + ranks * combine_chunks() * 8, 128)),
        plan_topk_at(plan_counts_at + int64_t{ranks} * blocks * counts_bytes),
        dispatch_rows_at(round_up(plan_topk_at + ranks * topk_bytes, 128)),
        combine_rows_at(dispatch_rows_at + rows_bytes),
        end(combine_rows_at + rows_bytes) {}

  int num_local_experts() const { return num_experts / world_size; }
  int64_t bytes() const { return end; }
  // Maximum number of chunks from one rank.
  EP_HOST_DEVICE int64_t combine_chunks() const {
    constexpr int64_t kMost = int64_t{kMinParts} * kMaxSplitRows;
    return max_tokens > kMost ? max_tokens : kMost;
  }

  EP_HOST_DEVICE int64_t header(int parity, int source) const {
    return (int64_t{parity} * world_size + source) * Header::kBytes;
  }
  EP_HOST_DEVICE int64_t done(int source) const { return done_at + source * int64_t{8}; }
  EP_HOST_DEVICE int64_t abort_signal(int source) const { return abort_signals_at + source * int64_t{8}; }
  EP_HOST_DEVICE int64_t plan_flag(int source, int block) const {
    return plan_flags_at + (int64_t{source} * num_blocks + block) * 8;
  }
  // Rows are sent in chunks. Each chunk has its own flag, written once per exchange when the chunk is complete.
  EP_HOST_DEVICE int64_t dispatch_flag(int source, int64_t chunk) const {
    return dispatch_flags_at + (source * max_tokens + chunk) * 8;
  }
  EP_HOST_DEVICE int64_t combine_flag(int source, int64_t chunk) const {
    return combine_flags_at + (source * combine_chunks() + chunk) * 8;
  }
  EP_HOST_DEVICE int64_t plan_counts(int source, int block) const {
    return plan_counts_at + (int64_t{source} * num_blocks + block) * counts_bytes;
  }
  EP_HOST_DEVICE int64_t plan_topk(int source) const { return plan_topk_at + source * topk_bytes; }
  EP_HOST_DEVICE int64_t dispatch_rows(int source, int reader) const {
    return dispatch_rows_at + (source - (source > reader)) * max_tokens * wire_row_bytes;
  }
  EP_HOST_DEVICE int64_t combine_rows(int source, int reader) const {
    return combine_rows_at + (source - (source > reader)) * max_tokens * wire_row_bytes;
  }
};

// The destination of a row for one top-k slot. Each wire row of ep::low_latency_dispatch holds one SlotRoute per slot.
struct alignas(16) SlotRoute {
  int expert;  // -1: none
  int index;   // among the rows that the source sends to this expert
  float weight;
  int unused;
};
constexpr int64_t kSlotRouteBytes = sizeof(SlotRoute);

// Note [LL packets]
// Small batches send rows inline, in packets of 16 bytes that are written and read as one: 12 bytes of the row and the
// number of the exchange. (NCCL's LL protocols do the same with 8 and 128 bytes.) A packet needs neither a flag nor the
// fence before it, which would cost a round trip; a third more bytes cost less. A lane sends 48 bytes of a row in four
// packets. A chunk stores packet j of all 32 lanes before packet j + 1, so a warp writes and reads whole cache lines.
// Each SlotRoute has its own packet; three scales share a packet.
constexpr int kPacketBytes = 16;
constexpr int kPacketsPerLane = 4;
constexpr int kVectorsPerLane = 3;  // of 16 bytes
constexpr int kLanesPerChunk = 32;
constexpr int kChunkVectors = kLanesPerChunk * kVectorsPerLane;
constexpr int kChunkBytes = kLanesPerChunk * kPacketsPerLane * kPacketBytes;  // in packets

constexpr int kGroupVectors = kScaleGroup / 16;  // of fp8
constexpr int kChunkGroups = kChunkVectors / kGroupVectors;
constexpr int kScalePacketsPerChunk = kChunkGroups / 3;

// Chunks of a row of `vectors` vectors of 16 bytes.
EP_HOST_DEVICE constexpr int chunks_of(int vectors) {
  return (vectors + kChunkVectors - 1) / kChunkVectors;
}

// Rows are sent in packets if the packets to all peers, and those to one peer, take at most this many bytes. Above
// these limits, the larger packets cost the links or the sending warps more time than a fence.
constexpr int64_t kMaxPacketBytes = int64_t{9} << 18, kMaxPacketBytesPerPeer = int64_t{3} << 19;

// The layout of the low-latency pair's part of the symmetric buffer, after Layout's part. Each of the two kinds of
// exchange alternates between two halves, so two exchanges may be in flight. Every token of every rank, the reader
// included, has a reserved row: nothing has to be counted before rows are sent.
struct LowLatencyLayout {
  static constexpr int kKinds = 2;  // dispatch, combine
  static constexpr int kHalves = 2;
  static constexpr int kRowFlags = 4;    // per row of combine, one per part of its columns: several warps share a row
  static constexpr int kVisitBits = 32;  // tokens per word

  int64_t begin;  // in the symmetric buffer
  int world_size;
  int max_tokens;  // per rank; 0: no low-latency pair on this communicator
  int num_topk;
  int num_local_experts;
  int64_t wire_row_bytes;  // reserved bytes per wire row, a multiple of 128
  int packet_tokens;       // per rank: rows of wire_row_bytes that fit into its packets

  // Derived from these.
  int words;  // of an announcement
  int64_t announcement_bytes;
  int64_t scale_packets_at, row_packets_at, packet_row_bytes;  // of a row in packets, which begins with its SlotRoutes
  int64_t entered_at, announcements_at, dispatch_flags_at, combine_flags_at, dispatch_rows_at, combine_rows_at,
      dispatch_packets_at, combine_packets_at, end;

  LowLatencyLayout() = default;
  // `packed`: packet_tokens; if not given, as many as the limits above allow.
  LowLatencyLayout(
      int64_t begin_at,
      int ranks,
      int tokens,
      int topk,
      int local_experts,
      int64_t row_bytes,
      int packed = -1)
      : begin(begin_at),
        world_size(ranks),
        max_tokens(tokens),
        num_topk(topk),
        num_local_experts(local_experts),
        wire_row_bytes(row_bytes),
        words(Handshake::kFields + local_experts + visit_words()),
        announcement_bytes(round_up(words * int64_t{8}, 128)),
        scale_packets_at(round_up(topk * int64_t{kPacketBytes}, 128)),
        row_packets_at(scale_packets_at + round_up(chunks_of(row_bytes) * kScalePacketsPerChunk * kPacketBytes, 128)),
        packet_row_bytes(packet_row_bytes_of(row_bytes)) {
    const int64_t share = kMaxPacketBytes / (ranks > 1 ? ranks - 1 : 1);
    const int64_t most = (share < kMaxPacketBytesPerPeer ? share : kMaxPacketBytesPerPeer) / packet_row_bytes;
    packet_tokens = packed >= 0 ? packed : static_cast<int>(most < tokens ? most : tokens);
    const int64_t sources = int64_t{kHalves} * ranks, rows = sources * tokens, packet_rows = sources * packet_tokens;
    entered_at = round_up(begin + int64_t{kKinds} * ranks * 8, kPacketBytes);
    announcements_at = round_up(entered_at + sources * kPacketBytes, 128);
    dispatch_flags_at = announcements_at + sources * announcement_bytes;
    combine_flags_at = dispatch_flags_at + rows * 8;
    dispatch_rows_at = round_up(combine_flags_at + rows * kRowFlags * 8, 128);
    combine_rows_at = dispatch_rows_at + rows * wire_row_bytes;
    dispatch_packets_at = combine_rows_at + rows * wire_row_bytes;
    combine_packets_at = dispatch_packets_at + packet_rows * packet_row_bytes;
    end = combine_packets_at + packet_rows * packet_row_bytes;
  }

  EP_HOST_DEVICE int visit_words() const { return (max_tokens + kVisitBits - 1) / kVisitBits; }
  EP_HOST_DEVICE int64_t bytes() const { return max_tokens == 0 ? 0 : end - begin; }
  // Bytes of a row of `row_bytes` in packets.
  int64_t packet_row_bytes_of(int64_t row_bytes) const { return row_packets_at + chunks_of(row_bytes) * kChunkBytes; }
  // Whether ep::low_latency_dispatch sends rows in packets: at most `tokens` rows of `row_bytes` per rank.
  // ep::low_latency_combine goes by packet_tokens.
  bool use_packets(int tokens, int64_t row_bytes) const {
    return tokens * packet_row_bytes_of(row_bytes) <= packet_tokens * packet_row_bytes;
  }

  EP_HOST_DEVICE int64_t done(int kind, int source) const { return begin + (kind * world_size + source) * 8; }
  // combine: a packet that the source publishes when it enters.
  EP_HOST_DEVICE int64_t entered(int half, int source) const {
    return entered_at + (half * world_size + source) * int64_t{kPacketBytes};
  }
  // dispatch: the fields of the handshake, the rows per local expert, and a bit per token that visits the reader. The
  // number of words does not depend on the sizes of an exchange, so ranks with different sizes do not wait for missing
  // words. Each word also holds the number of the exchange.
  EP_HOST_DEVICE int64_t announcement(int half, int source) const {
    return announcements_at + (half * world_size + source) * announcement_bytes;
  }
  EP_HOST_DEVICE int64_t dispatch_flag(int half, int source, int token) const {
    return dispatch_flags_at + row(half, source, token) * 8;
  }
  EP_HOST_DEVICE int64_t combine_flag(int half, int source, int token, int part) const {
    return combine_flags_at + (row(half, source, token) * kRowFlags + part) * 8;
  }
  EP_HOST_DEVICE int64_t dispatch_row(int half, int source, int token) const {
    return dispatch_rows_at + row(half, source, token) * wire_row_bytes;
  }
  EP_HOST_DEVICE int64_t combine_row(int half, int source, int token) const {
    return combine_rows_at + row(half, source, token) * wire_row_bytes;
  }
  // Packets have their own memory, in which the last word of every 16 bytes holds nothing but numbers of exchanges.
  // `bytes`: per row; the memory holds more rows if they are quantized.
  EP_HOST_DEVICE int64_t dispatch_packets(int half, int source, int token, int64_t bytes) const {
    // fault: low latency: two inline rows in one place
    return dispatch_packets_at + packet_row(half, source, 0) * packet_row_bytes + token * bytes;
  }
  EP_HOST_DEVICE int64_t combine_packets(int half, int source, int token) const {
    return combine_packets_at + packet_row(half, source, token) * packet_row_bytes;
  }

 private:
  static int64_t chunks_of(int64_t bytes) { return ep::nvlink::chunks_of(static_cast<int>(bytes / 16)); }
  EP_HOST_DEVICE int64_t row(int half, int source, int token) const {
    return (half * world_size + source) * max_tokens + token;
  }
  EP_HOST_DEVICE int64_t packet_row(int half, int source, int token) const {
    return (half * world_size + source) * packet_tokens + token;
  }
};

}  // namespace ep::nvlink
