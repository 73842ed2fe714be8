// The CUDA kernels of permute.h as the host sees them: their arguments, and functions that launch them. No torch header
// here.
#pragma once

#include "core/element.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ep::nvlink {

inline int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// --- kernel error reports ---

// In page-locked host memory, one per device. Holds the first failure since the host last read it. A kernel writes
// `kind` last; the host sets it back to `none`.
struct PermuteReport {
  enum Kind : int64_t { none, bad_topk, bad_plan };
  enum PlanTensor : int64_t { send_row, recv_pair };
  int64_t kind;
  int64_t is_combine;  // bad_plan: of dispatch or combine
  int64_t tensor;      // bad_plan: which PlanTensor
  int64_t bound;       // exclusive upper bound of the value
  int64_t value;
  int64_t token, slot;   // bad_topk: where
  int64_t earlier_slot;  // bad_topk: the slot of the token with the same value, or -1 if the value is out of range
};

struct Reporter {
  PermuteReport* report;
  unsigned* claimed;  // on the device: 1 once a thread has claimed the report
};

// --- plan ---

// What the host of an exact plan waits for, in page-locked host memory: kPlanReady | rows, or kPlanReady | kPlanBad for
// bad indices. The host sets it to 0 before.
using PlanReply = uint64_t;
constexpr PlanReply kPlanReady = PlanReply{1} << 63, kPlanBad = PlanReply{1} << 62;

// With `route`: the wire rows of each token, by destination rank. Otherwise the place of each (wire row, slot) pair in
// the result, of tokens of one rank, or without send_row of wire rows from any. A result that is nullptr is not
// wanted.
struct PermutePlanArgs {
  const void* topk_idx;  // [num_tokens, num_topk] int32, int64 if wide_idx
  bool wide_idx;
  bool route;
  bool expert_major;
  int num_tokens, num_topk;
  int num_experts;        // indices are in [-1, num_experts)
  int num_local_experts;  // of a rank: num_experts unless `route`
  int alignment;
  int64_t capacity;  // -1: exact
  int32_t* scratch;  // permute_plan_scratch(args) of them
  PlanReply* reply;  // of an exact plan
  Reporter reporter;
  int32_t* send_row;           // [num_tokens, num_topk]
  int32_t* send_counts;        // [ranks]
  int32_t* recv_counts;        // [1], as send_counts: one rank
  int32_t* wire_topk;          // `route`: [wire rows, num_topk]
  void* recv_map;              // expert_major: int32 [rows]; else topk_idx's dtype [rows, num_topk]
  int32_t* offsets;            // expert_major: [num_experts]; else [1]
  int32_t* tokens_per_expert;  // [num_experts]
  int32_t* num_dropped;        // []
};

// Once per device, before any other call: an error if the kernels were not built for it.
cudaError_t prepare_permute_plan();
// int32 elements of `scratch`; 0 if the kernels cannot take so many experts or ranks.
int64_t permute_plan_scratch(const PermutePlanArgs& args);
cudaError_t launch_permute_plan(const PermutePlanArgs& args, cudaStream_t stream);

// --- rows ---

// Where the row of an item (a token or a wire row) is in the result of dispatch.
struct RowMap {
  const int32_t* send_row;   // [items, num_topk] wire row, or -1; nullptr: item i is wire row i
  const int32_t* recv_pair;  // [rows] wire row * num_topk + slot, or -1; nullptr: row i is wire row i
  int32_t* row_of;           // [wire_rows * num_topk], with recv_pair: Note [Inverse of recv_pair]
  // On the device: how many of `wire_rows` there are, by which send_row and recv_pair are checked. nullptr: all.
  const int32_t *send_count, *recv_count;
  int items, wire_rows, rows, num_topk;
  Reporter reporter;
  bool is_combine;  // for the report
};

// Fills map.row_of. Before permute_rows and unpermute_rows with the same recv_pair, in the same stream.
cudaError_t launch_invert_recv_pair(const RowMap& map, cudaStream_t stream);

// Dispatch: out[row] = x[item] for every row of the item; zero for a row of no wire row.
struct PermuteArgs {
  RowMap map;
  const char* x;  // [items, row_bytes]
  char* out;      // [rows, row_bytes]
  int64_t row_bytes;
  // Weights go along if out_weights: [items, num_topk] to [rows] with recv_pair, to [rows, num_topk] without.
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
  // If out_weights: the transpose of PermuteArgs'.
  const char* weights;
  char* out_weights;
  int weight_bytes;
};
cudaError_t launch_unpermute_rows(const UnpermuteArgs& args, cudaStream_t stream);

}  // namespace ep::nvlink
