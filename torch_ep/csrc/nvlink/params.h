// Host interface of the kernels: arguments and launch functions. Includes no torch header.
#pragma once

#include "core/element.h"
#include "core/op_kind.h"
#include "nvlink/layout.h"

#include <cuda_runtime_api.h>

namespace ep::nvlink {

// The failures that the device reports, with the fields of FailureReport that they set besides `peer`. After a fatal
// failure every exchange ends at once, until a reset.
enum class Failure : int64_t {
  none = 0,
  timeout,             // fatal: nothing from `peer` for too long
  peer_aborted,        // fatal: `peer` aborted this exchange, because `missing_rank` did not come
  mismatch,            // `field` of the handshake differs: `ours`, `theirs`; the results are invalid
  mismatch_of_peer,    // `peer` has a mismatch with another rank; the results are invalid
  too_many_tokens,     // `peer` has more than max_tokens_per_rank
  bad_expert,          // `peer` has expert `theirs` at `token`, `slot`, out of [-1, `ours`)
  duplicate_expert,    // `peer` has expert `theirs` twice at `token`, in `slot` and `earlier_slot`
  out_of_order,        // fatal: exchange `theirs` was to be received, where `ours` is next
  too_many_in_flight,  // fatal: a third exchange was sent before the first was received
  bad_send_row,        // send_row of the plan has `theirs`, out of [-1, `ours`) or out of order
  bad_recv_pair,       // recv_pair of the plan has `theirs`, out of [-1, `ours`)
};

constexpr bool is_fatal(Failure kind) {
  return kind == Failure::timeout || kind == Failure::peer_aborted || kind == Failure::out_of_order ||
         kind == Failure::too_many_in_flight;
}

// The phase of an exchange in which a rank waits.
enum class Phase : int64_t { handshake, credit, counts, rows, gate };

struct FailureReport {
  Failure kind;  // written last by a kernel, reset by the host
  OpKind op;
  Phase phase;
  int64_t epoch;
  int32_t peer;
  int32_t missing_rank;
  HandshakeField field;
  int32_t token, slot, earlier_slot;
  int64_t ours, theirs;
  int64_t their_epoch;  // of mismatch
};

// In page-locked host memory, written by kernels, read by the host.
struct HostReport {
  FailureReport failure;
  // The word that the host of an exact plan waits for and clears before the launch: kPlanRowsReady | number of rows.
  // With kPlanFailed, `failure` holds the reason, or will hold it.
  uint64_t plan;
  // 0, or the exchange with a fatal failure. `failure` may hold an earlier failure.
  int64_t stopped;
};

constexpr uint64_t kPlanRowsReady = uint64_t{1} << 63, kPlanFailed = uint64_t{1} << 62;

constexpr int64_t kVector = 16;  // bytes: the unit of row copies
constexpr int kMaxBlocks = 256;

// The state of one kind of low-latency exchange.
struct LowLatencyState {
  // Per half and rank: number of the exchange << 1 | whether that rank takes part in it. The first block that knows
  // decides for all blocks. Used only if timeouts mask.
  uint64_t verdict[2][kMaxRanks];
  // Number of the last exchange << kShareBits: Note [Shares].
  uint64_t sent, received;
  uint64_t wait_ns[2][kMaxRanks];  // per half: longest wait for each peer
  uint64_t reported;               // as State::reported
};

// Note [Shares]
// A block of a low-latency kernel does not find out whether it is the last one: the answer would take as long as a
// message to a peer. Instead, each block adds its share of 1 << kShareBits to the number of the exchange once it no
// longer needs the previous number. All blocks except the first add 1; the first adds the rest. The upper bits change
// with the last share.
constexpr int kShareBits = 20;

// The state of one rank, in its device memory. Kernels of one rank run one after another, so only words that the blocks
// of one kernel exchange hold an epoch.
struct State {
  uint64_t epoch;  // of the last exchange that ended
  // Epochs in which this rank last wrote into each buffer of its peers. It writes again once the peers have finished
  // these epochs.
  uint64_t last_plan, last_dispatch, last_combine;
  uint64_t aborted;          // epoch of an exchange whose waits have to end
  uint64_t reported;         // epoch of the last reported failure
  uint32_t failed;           // 1 after a fatal failure: exchanges end at once, until a reset
  uint32_t mismatched_peer;  // 1 + a peer that aborted this exchange for a mismatch
  uint32_t blocks_done;
  uint32_t gate;  // warps that have built their part of rows_of
  // WorkQueue: the next item of this exchange that no warp has taken. `chunks`, in ep::dispatch: per rank, chunks that
  // warps have taken beyond their first.
  uint32_t work_queues[2], chunks[kMaxRanks];
  // Of the current plan, per block and rank: number of the exchange << 32 | rows of the block to the rank.
  uint64_t send_rows[kMaxBlocks * kMaxRanks];
  // Ranks that the low-latency pair excludes, a bit per rank: masked by the host, or by a timeout.
  uint32_t masked_by_host[kRankSteps], masked_by_timeout[kRankSteps];
  LowLatencyState low_latency[LowLatencyLayout::kKinds];
};

struct Comm {
  char* buffers[kMaxRanks];  // every rank's symmetric buffer, as mapped here
  State* state;
  HostReport* host_report;
  // [received wire rows, num_topk] epoch << 32 | row: the inverse of recv_pair. Every exchange that needs it rebuilds
  // it.
  uint64_t* rows_of;
  Layout layout;
  LowLatencyLayout low_latency;
  int rank;
  bool shares_device;  // with other ranks
  int64_t timeout_ns;
  bool masks;  // low-latency pair: a timeout masks the peer, instead of failing
};

// Divides by a number that the host knows. It multiplies, since a division takes about thirty instructions. T. Granlund
// and P. Montgomery, "Division by Invariant Integers using Multiplication" (1994), figure 4.1.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int divisor) {
    while (uint64_t{1} << shift_ < static_cast<uint64_t>(divisor)) {
      ++shift_;
    }
    multiplier_ = static_cast<uint32_t>(
        (((uint64_t{1} << shift_) - static_cast<uint64_t>(divisor)) << 32) / static_cast<uint64_t>(divisor) + 1);
  }
  // 0 <= n < 2^31.
  EP_HOST_DEVICE int quotient(int n) const {
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(multiplier_) * static_cast<uint32_t>(n) >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift_);
  }

 private:
  uint32_t multiplier_ = 0, shift_ = 0;
};

struct PlanArgs {
  Comm comm;
  Handshake handshake;
  const void* topk_idx;
  bool wide_idx;  // int64, not int32
  int num_tokens, num_topk, num_experts;
  bool expert_major;
  int alignment;
  int64_t capacity;  // -1: exact
  int64_t map_rows;  // allocated rows of recv_map
  // The host has refused this rank's arguments. The kernel makes a plan of no rows, so that no peer waits for this
  // rank.
  bool refused;
  int32_t* send_row;
  int32_t* send_counts;
  int32_t* recv_counts;
  void* recv_map;  // int32; recv_topk_idx has the dtype of topk_idx
  int32_t* offsets;
  int32_t* tokens_per_expert;
  int32_t* num_dropped;
};

struct PlanView {
  const int32_t* send_row;
  const int32_t* send_counts;
  const int32_t* recv_counts;
  const int32_t* recv_pair;   // expert_major
  const void* recv_topk_idx;  // rank_major
  bool wide_idx;              // of recv_topk_idx: int64, not int32
  bool expert_major;
  int num_tokens, num_topk;
  int64_t rows;
};

// The byte layout of a wire row: [row | weights | scales], each aligned to 16 bytes.
struct WireFormat {
  int row_bytes;       // in this exchange: a whole row, or some of its columns
  int64_t row_stride;  // bytes from row to row in x, y and the results
  int weight_bytes;    // of one weight; 0: none
  int scale_bytes;     // of all scales of a row; 0: none
  EP_HOST_DEVICE int weights_at() const { return row_bytes; }
  EP_HOST_DEVICE int scales_at(int num_topk) const {
    return weights_at() + static_cast<int>(round_up(int64_t{weight_bytes} * num_topk, 16));
  }
  EP_HOST_DEVICE int bytes(int num_topk) const {
    return scales_at(num_topk) + static_cast<int>(round_up(scale_bytes, 16));
  }
};

struct DispatchArgs {
  Comm comm;
  PlanView plan;
  WireFormat format;
  Handshake handshake;
  const char* x;
  const char* weights;
  const char* scales;
  char* out;
  char* out_weights;
  char* out_scales;
};

struct CombineArgs {
  Comm comm;
  PlanView plan;
  WireFormat format;
  Handshake handshake;
  Element element;
  const char* y;
  const void* row_weights;  // float32 (float64 for float64), or null
  const char* weights;
  char* out;
  char* out_weights;
};

// --- the low-latency pair ---

// The part of an operator that a kernel runs.
enum class Part : int { both, send, receive };

struct LowLatencyDispatchArgs {
  Comm comm;
  Handshake handshake;
  Part part;
  int64_t* status;  // for the halves: the number of the exchange
  // To send.
  const char* x;
  const void* topk_idx;
  bool wide_idx;              // int64, not int32
  const float* topk_weights;  // or null: all 1
  int num_tokens;
  Element element;  // of x
  // To receive. C = world_size * max_tokens rows of each local expert.
  char* rows;          // [L, C] of row_bytes
  void* scales;        // [L, num_scales, scale_rows] float32, or int32 of four exponents
  int64_t scale_rows;  // C, padded
  int32_t* tokens_per_expert;
  int32_t* source_offsets;
  int32_t* recv_pair;
  int32_t* recv_row;
  float* row_weights;
  int64_t* wait_ns;
  // Both.
  Quantize quantize;
  int max_tokens;  // of the operator: determines the shape of `rows`
  int num_topk, num_experts;
  int hidden;
  int row_bytes;   // of a row, sent and received
  int num_scales;  // per row, in words of four bytes
  // A wire row: [row | scales | a SlotRoute per slot].
  EP_HOST_DEVICE int64_t scales_at() const { return round_up(row_bytes, 16); }
  EP_HOST_DEVICE int64_t routes_at() const { return scales_at() + round_up(int64_t{num_scales} * 4, 16); }
  EP_HOST_DEVICE int64_t wire_row_bytes() const { return routes_at() + num_topk * kSlotRouteBytes; }
};

struct LowLatencyCombineArgs {
  Comm comm;
  Handshake handshake;  // without max_tokens, which a separate receive reads from `status`
  Part part;
  int64_t* status;  // the number of the exchange, and max_tokens
  // To send.
  const char* y;
  const float* row_weights;
  const int32_t* recv_row;
  int max_tokens;  // of the dispatch
  // To receive.
  char* out;
  const void* topk_idx;
  bool wide_idx;
  int num_tokens;
  int64_t* wait_ns;
  // Both.
  Element element;
  int num_topk, num_experts;
  int row_bytes;
};

// The widest wire row of one exchange.
int max_wire_row_bytes();
// Shared memory of ep::plan, in bytes. With too many experts it exceeds the device's limit.
int64_t plan_shared_bytes(int num_experts, int world_size);

// Call once per device, before the first launch: kernels cannot be loaded or set up while a graph is captured. Fails if
// the kernels were not built for the device.
cudaError_t prepare_plan();
cudaError_t prepare_dispatch();
cudaError_t prepare_combine();
cudaError_t prepare_low_latency_dispatch();
cudaError_t prepare_low_latency_combine();

cudaError_t launch_plan(const PlanArgs& args, cudaStream_t stream);
cudaError_t launch_dispatch(const DispatchArgs& args, cudaStream_t stream);
cudaError_t launch_combine(const CombineArgs& args, cudaStream_t stream);
// `multiprocessors`: maximum number of thread blocks, which wait for each other.
cudaError_t launch_low_latency_dispatch(const LowLatencyDispatchArgs& args, int multiprocessors, cudaStream_t stream);
cudaError_t launch_low_latency_combine(const LowLatencyCombineArgs& args, int multiprocessors, cudaStream_t stream);

}  // namespace ep::nvlink
