// The steps of each operator that need no communication: count, permute, pad, expand, reduce. Each kind of device has
// one table of functions. A composed backend combines them with an exchange.
//
// Vocabulary. A rank sends one *wire row* per (token, destination rank). The sender orders wire rows by destination,
// then token; the receiver orders them by source, then token. Dispatch returns *rows*.
#pragma once

#include "core/checks.h"
#include "core/types.h"

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <optional>
#include <vector>

namespace ep {

// The wire rows that a rank sends.
struct SendPlan {
  at::Tensor send_row;     // int32 [num_tokens, num_topk]: the wire row that carries the token for this slot, or -1
  at::Tensor send_counts;  // int32 [world_size]: wire rows to each rank
  at::Tensor wire_topk;    // int32 [wire rows, num_topk]: local expert on the destination rank, or -1
};

// Maps received wire rows to rows of the result.
struct RecvPlan {
  at::Tensor recv_map;           // rank_major: recv_topk_idx [rows, num_topk]; expert_major: recv_pair int32 [rows]
  at::Tensor offsets;            // int32: end of the group of each local expert (rank_major: source rank)
  at::Tensor tokens_per_expert;  // int32 [num_local_experts]: rows of each local expert, without padding
  at::Tensor num_dropped;        // int32 []
};

struct RecvPlanOptions {
  bool expert_major;
  int64_t num_local_experts;
  int64_t alignment;
  std::optional<int64_t> capacity;
  at::ScalarType index_dtype;
};

// recv_pair[row] = wire row * num_topk + slot, or -1 for a row of padding. `*_rows` copy or sum whole rows; `*_slots`
// copy one number per (token, slot). Sums accumulate in float32 (float64 for float64), in the order of the slots.
//
// Allocate: allocates the tensor of wire rows. Kernels of some devices ignore it and allocate their own.
using Allocate = std::function<at::Tensor(at::IntArrayRef sizes, const at::TensorOptions& options)>;

struct PermuteKernels {
  // Throws ValueError on a bad index. The message names `op`, the token, the slot and the value.
  SendPlan (*plan_send)(const char* op, const at::Tensor& topk_idx, int64_t num_experts, int64_t world_size);
  RecvPlan (*plan_recv)(const at::Tensor& wire_topk, const std::vector<int64_t>& recv_rows, const RecvPlanOptions&);

  // The functions below rely on the values of a plan, which may come from a file. These two check them and throw
  // ValueError in the name of `op`.
  // Each entry of send_row is -1 or a wire row, and each wire row has exactly one token.
  void (*check_send_row)(const char* op, const at::Tensor& send_row, int64_t wire_rows);
  // Each entry of recv_pair is -1 or a (wire row, slot) pair.
  void (*check_recv_pair)(const char* op, const at::Tensor& recv_pair, int64_t pairs);

  // Sender, before dispatch: [num_tokens, ...] to [wire_rows, ...].
  at::Tensor (*pack_rows)(const at::Tensor& x, const at::Tensor& send_row, int64_t wire_rows, const Allocate& allocate);
  at::Tensor (*pack_slots)(const at::Tensor& w, const at::Tensor& send_row, int64_t wire_rows);
  // Receiver, after dispatch, expert_major: [wire rows, ...] to [rows, ...], zero where recv_pair is -1.
  at::Tensor (*expand_rows)(const at::Tensor& wire, const at::Tensor& recv_pair, int64_t num_topk);
  at::Tensor (*expand_slots)(const at::Tensor& wire, const at::Tensor& recv_pair);
  // Receiver, before combine, expert_major: the transposes of the two above.
  at::Tensor (*reduce_rows)(
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const at::Tensor& recv_pair,
      int64_t wire_rows,
      int64_t num_topk,
      const Allocate& allocate);
  at::Tensor (*return_slots)(const at::Tensor& w, const at::Tensor& recv_pair, int64_t wire_rows, int64_t num_topk);
  // Sender, after combine: the transposes of pack_rows and pack_slots.
  at::Tensor (*sum_rows)(const at::Tensor& wire, const at::Tensor& send_row);
  at::Tensor (*gather_slots)(const at::Tensor& wire, const at::Tensor& send_row);
};

// For `plan_recv`, whose results are int32. `indexed`: the number of different values in recv_map.
inline void check_num_rows(int64_t rows, int64_t indexed) {
  check_at_most("ep::plan", "rows on one rank, padding included,", rows, kMaxSize);
  check_at_most("ep::plan", "received (row, slot) pairs on one rank", indexed, kMaxSize);
}

// Whole operators of one rank, each in one pass over its rows. They do not wait for the device, except that an exact
// plan waits for its number of rows. The next call raises the errors that only the device can detect.
struct OneRankKernels {
  // Throws as PermuteKernels::plan_send does.
  PlanResult (*plan)(const at::Tensor& topk_idx, const RecvPlanOptions&);
  Payloads (*dispatch)(
      const PlanTensors&,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales);
  Payloads (*combine)(
      const PlanTensors&,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales);
};

extern const PermuteKernels cpu_kernels;   // threads of torch
extern const PermuteKernels aten_kernels;  // any device, composed of torch's own operators

// The kernels for CUDA, in a build with CUDA.
struct CudaKernels {
  PermuteKernels parts;
  OneRankKernels one_rank;
  bool (*run_on)(const at::Tensor& t);  // whether they were built for the device of t, a CUDA tensor
};
inline const CudaKernels* cuda_kernels = nullptr;

// Rows of a result on the CPU. Each row may be a part of a longer row: stride(0) counts.
struct RowsOut {
  at::Tensor rows;
  // Rows [own_begin, own_begin + own.size(0)) go to `own` instead, if it is defined: wire rows that stay on this rank.
  at::Tensor own = {};
  int64_t own_begin = 0;
};

// As the functions of cpu_kernels, for columns of rows: x, y and wire may have a stride(0) above their width.
void pack_columns(const RowsOut& wire, const at::Tensor& x, const at::Tensor& send_row);
void expand_columns(const RowsOut& rows, const at::Tensor& wire, const at::Tensor& recv_pair, int64_t num_topk);
void reduce_columns(
    const RowsOut& wire,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const at::Tensor& recv_pair,
    int64_t num_topk);
void sum_columns(const RowsOut& tokens, const at::Tensor& wire, const at::Tensor& send_row);

// For tests. force_aten: tensors of any device use aten_kernels. force_parts: one rank runs the steps of several ranks.
inline std::atomic<bool> force_aten{false}, force_parts{false};

inline const CudaKernels* cuda_kernels_for(const at::Tensor& t) {
  return cuda_kernels != nullptr && !force_aten && t.is_cuda() && cuda_kernels->run_on(t) ? cuda_kernels : nullptr;
}

inline const PermuteKernels& permute_kernels(const at::Tensor& t) {
  if (const auto* cuda = cuda_kernels_for(t)) {
    return cuda->parts;
  }
  return t.is_cpu() && !force_aten ? cpu_kernels : aten_kernels;
}

// nullptr: an operator is composed of permute_kernels.
inline const OneRankKernels* one_rank_kernels(const at::Tensor& t) {
  const auto* cuda = force_parts ? nullptr : cuda_kernels_for(t);
  return cuda != nullptr ? &cuda->one_rank : nullptr;
}

}  // namespace ep
