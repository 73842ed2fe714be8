// Host interface of the CUDA kernels behind permute.h: arguments and launch functions. Includes no torch header.
#pragma once

#include "core/element.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ep {

// --- kernel error reports ---

// One per device, in page-locked host memory. Holds the first failure since the host last read it. A kernel writes
// `kind` last; the host resets it to `none`.
struct PermuteReport {
  enum Kind : int64_t { none, bad_topk, bad_plan };
  enum PlanTensor : int64_t { send_row, recv_pair };
  int64_t kind;
  int64_t is_combine;  // bad_plan: 1 for combine, 0 for dispatch
  int64_t tensor;      // bad_plan: which PlanTensor
  int64_t bound;       // exclusive upper bound of the value
  int64_t value;
  int64_t token, slot;   // bad_topk: position in topk_idx
  int64_t earlier_slot;  // bad_topk: the slot of the token with the same value, or -1 if the value is out of range
};

struct Reporter {
  PermuteReport* report;
  unsigned* claimed;  // on the device: 1 once a thread has claimed the report
};

// --- plan ---

// The word that the host of an exact plan waits for, in page-locked host memory: kPlanReady | rows, or kPlanReady |
// kPlanBad for bad indices. The host clears it before the launch.
using PlanReply = uint64_t;
constexpr PlanReply kPlanReady = PlanReply{1} << 63, kPlanBad = PlanReply{1} << 62;

// With `route`: computes the wire rows of each token, in the order of the destination ranks. Otherwise: computes the
// row of each (wire row, slot) pair in the result. The input is then the tokens of a single rank or, without send_row,
// wire rows from any ranks. Results that are nullptr are not written.
struct PermutePlanArgs {
  const void* topk_idx;  // [num_tokens, num_topk] int32, int64 if wide_idx
  bool wide_idx;
  bool route;
  bool expert_major;
  int num_tokens, num_topk;
  int num_experts;        // indices are in [-1, num_experts)
  int num_local_experts;  // per rank; num_experts unless `route`
  int alignment;
  int64_t capacity;  // -1: exact
  int32_t* scratch;  // permute_plan_scratch(args) elements
  PlanReply* reply;  // of an exact plan
  Reporter reporter;
  int32_t* send_row;           // [num_tokens, num_topk]
  int32_t* send_counts;        // [ranks]
  int32_t* recv_counts;        // [1], equal to send_counts
  int32_t* wire_topk;          // `route`: [wire rows, num_topk]
  void* recv_map;              // expert_major: int32 [rows]; else topk_idx's dtype [rows, num_topk]
  int32_t* offsets;            // expert_major: [num_experts]; else [1]
  int32_t* tokens_per_expert;  // [num_experts]
  int32_t* num_dropped;        // []
};

// Call once per device, before any other function. Fails if the kernels were not built for the device.
cudaError_t prepare_permute_plan();
// Size of `scratch` in int32 elements; 0 if the kernels do not support so many experts or ranks.
int64_t permute_plan_scratch(const PermutePlanArgs& args);
cudaError_t launch_permute_plan(const PermutePlanArgs& args, cudaStream_t stream);

// --- rows ---

// Maps each item (a token or a wire row) to its rows in the result of dispatch.
struct RowMap {
  const int32_t* send_row;   // [items, num_topk] wire row, or -1; nullptr: item i is wire row i
  const int32_t* recv_pair;  // [rows] wire row * num_topk + slot, or -1; nullptr: row i is wire row i
  int32_t* row_of;           // [wire_rows * num_topk], with recv_pair: Note [Inverse of recv_pair]
  // On the device: the actual number of wire rows, which bounds send_row and recv_pair. nullptr: `wire_rows`.
  const int32_t *send_count, *recv_count;
  int items, wire_rows, rows, num_topk;
  Reporter reporter;
  bool is_combine;  // for the report
};

// Fills map.row_of. Call it before launch_permute_rows and launch_unpermute_rows with the same recv_pair, in the same
// stream.
cudaError_t launch_invert_recv_pair(const RowMap& map, cudaStream_t stream);

// Dispatch: out[row] = x[item] for every row of the item. Rows without a wire row are zero.
struct PermuteArgs {
  RowMap map;
  const char* x;  // [items, row_bytes]
  char* out;      // [rows, row_bytes]
  int64_t row_bytes;
  // If out_weights, permutes weights too: [items, num_topk] to [rows] with recv_pair, to [rows, num_topk] without.
  const char* weights;
  char* out_weights;
  int weight_bytes;  // 1, 2, 4 or 8
};
cudaError_t launch_permute_rows(const PermuteArgs& args, cudaStream_t stream);

// Combine: out[item] = sum of weight * y[row] over the rows of the item, in the order of the slots, accumulated in
// float32 (float64 for float64) without contraction and rounded once.
struct UnpermuteArgs {
  RowMap map;
  Element element;
  const char* y;  // [rows, hidden]
  char* out;      // [items, hidden]
  int64_t hidden;
  const void* row_weights;  // [rows] float32, float64 for f64; nullptr: no weights
  // If out_weights, unpermutes weights too: the transpose of PermuteArgs.
  const char* weights;
  char* out_weights;
  int weight_bytes;
};
cudaError_t launch_unpermute_rows(const UnpermuteArgs& args, cudaStream_t stream);

}  // namespace ep
