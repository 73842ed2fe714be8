// The plan of one rank, and the steps of a plan of several ranks that need no communication, in two kernels.
//   count_keys   each block checks its share of the tokens and counts their keys
//   assign_rows  each block sums the counts of all blocks, and assigns rows to its share of the tokens
// Entries are grouped by key: their expert, or with `route` its rank. Tokens of one key keep their order.
#include "local/permute_kernels.h"

#include "core/device/launch.cuh"
#include "core/device/warp.cuh"
#include "core/integer_math.h"

#include <algorithm>
#include <climits>

namespace ep {
namespace {

// One H200, 4096 tokens, top-8 of 256, assign_rows of 8, 16 and 32 warps: 13.6, 12.4 and 12.6 us for both kernels; 32,
// 64 and 128 blocks: 14.2, 12.4, 13.8; count_keys of 256 and 512 threads: 12.4, 11.4.
constexpr int kCountThreads = 512;
constexpr int kAssignWarps = 16;
constexpr int kAssignThreads = kAssignWarps * kWarp;
// Maximum number of counts that each block of assign_rows sums.
constexpr int kMaxCounts = 64 * 1024;
constexpr int kMaxPlanBlocks = 64;
// Maximum words of kWarp tokens per round of a block: each entry sums the words before its own.
constexpr int kMaxWords = 8;
// Shared memory of a block on sm_90 (CUDA C++ Programming Guide, table of compute capabilities: 227 KB), less the
// kernel's static variables.
constexpr int kSharedBytes = 226 * 1024;
constexpr int kKeyArrays = 3;  // of KeyWords, besides `bits`

struct PlanShape {
  int keys;  // counters: with `route` one per rank, else one per expert and, last, one for tokens with an expert
  int blocks;
  int block_words;  // words of kWarp tokens per block
  int round_words;  // words per round
};

// Per key, in shared memory.
struct KeyWords {
  int* total;
  int* begin;      // first row of its group in the result
  int* next;       // row of this block's next token
  uint32_t* bits;  // [round_words][keys] tokens with that key

  __device__ KeyWords(int* words, int keys)
      : total(words),
        begin(words + keys),
        next(words + 2 * keys),
        bits(reinterpret_cast<uint32_t*>(words + 3 * keys)) {}
};

// One thread.
template <class Int>
__device__ bool is_bad(const PermutePlanArgs& a, Int entry) {
  return entry < -1 || entry >= a.num_experts;
}

// One thread.
template <bool kRoute>
__device__ int key_of(const PermutePlanArgs& a, int expert) {
  return kRoute ? expert / a.num_local_experts : expert;
}

template <class Int, bool kRoute>
__global__ void __launch_bounds__(kCountThreads)
    count_keys(const __grid_constant__ PermutePlanArgs a, const __grid_constant__ PlanShape shape) {
  extern __shared__ int counts[];
  __shared__ int first_bad;
  await_kernels_before();
  for (int key = threadIdx.x; key < shape.keys; key += kCountThreads) {
    counts[key] = 0;
  }
  if (threadIdx.x == 0) {
    first_bad = INT_MAX;
  }
  if (!kRoute && !a.expert_major && blockIdx.x == 0) {
    for (int expert = threadIdx.x; expert < a.num_experts; expert += kCountThreads) {
      a.tokens_per_expert[expert] = 0;
    }
  }
  __syncthreads();
  const Int* topk_idx = static_cast<const Int*>(a.topk_idx);
  const int block_tokens = shape.block_words * kWarp;
  const int begin = min(static_cast<int>(blockIdx.x) * block_tokens, a.num_tokens);
  const int end = min(begin + block_tokens, a.num_tokens);
  for (int i = begin * a.num_topk + static_cast<int>(threadIdx.x); i < end * a.num_topk; i += kCountThreads) {
    const Int entry = topk_idx[i];
    if (entry == -1) {
      continue;
    }
    bool bad = is_bad(a, entry), counts_for_key = true, is_first = true;
    const int key = bad ? 0 : key_of<kRoute>(a, static_cast<int>(entry));
    for (int j = i - i % a.num_topk; j < i; ++j) {
      const Int other = topk_idx[j];
      bad = bad || other == entry;
      if (other >= 0 && other < a.num_experts) {
        is_first = false;
        counts_for_key = counts_for_key && !(kRoute && key_of<kRoute>(a, static_cast<int>(other)) == key);
      }
    }
    if (bad) {
      atomicMin(&first_bad, i);
    } else if (counts_for_key) {
      atomicAdd(&counts[key], 1);
    }
    if (!kRoute && is_first) {
      atomicAdd(&counts[a.num_experts], 1);
    }
  }
  __syncthreads();
  int* all_bad = a.scratch + shape.blocks * shape.keys;
  for (int key = threadIdx.x; key < shape.keys; key += kCountThreads) {
    a.scratch[static_cast<int>(blockIdx.x) * shape.keys + key] = counts[key];
  }
  if (threadIdx.x == 0) {
    all_bad[blockIdx.x] = first_bad;
  }
}

template <class Int, bool kRoute>
class PlanBlock {
 public:
  __device__ PlanBlock(const PermutePlanArgs& args, const PlanShape& shape, int* words)
      : a_(args), shape_(shape), s_(words, shape.keys), block_(static_cast<int>(blockIdx.x)) {}

  // Block-collective.
  __device__ void run() {
    __shared__ int first_bad;
    for (int key = thread(); key < shape_.keys; key += kAssignThreads) {
      s_.total[key] = s_.next[key] = 0;
    }
    if (thread() == 0) {
      first_bad = INT_MAX;
    }
    __syncthreads();
    await_kernels_before();
    const int* all_bad = a_.scratch + shape_.blocks * shape_.keys;
    for (int b = thread(); b < shape_.blocks; b += kAssignThreads) {
      atomicMin(&first_bad, all_bad[b]);
    }
    __syncthreads();
    has_failed_ = first_bad != INT_MAX;
    if (!has_failed_) {
      sum_counts();
    }
    __syncthreads();
    compute_group_begins();
    if (block_ == 0) {
      if (thread() == 0) {
        publish_to_host(first_bad);
      }
      write_totals();
    }
    for (int word = 0; word < shape_.block_words; word += shape_.round_words) {
      assign_round(block_ * shape_.block_words + word, min(shape_.round_words, shape_.block_words - word));
    }
    if constexpr (!kRoute) {
      fill_padding();
    }
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  // Keys that have a group in the result.
  __device__ int num_groups() const { return kRoute ? shape_.keys : a_.num_experts; }
  __device__ int padded(int count) const {
    return kRoute ? count : (count + a_.alignment - 1) / a_.alignment * a_.alignment;
  }
  // Without send_row, the input consists of wire rows. Otherwise tokens with an expert become wire rows.
  __device__ bool are_wire_rows() const { return a_.send_row == nullptr; }
  __device__ int num_wire_rows() const { return are_wire_rows() ? a_.num_tokens : s_.total[a_.num_experts]; }

  // With a bad index, the plan is computed as if the tokens had no experts.
  __device__ int entry_at(int i) const {
    return has_failed_ ? -1 : static_cast<int>(static_cast<const Int*>(a_.topk_idx)[i]);
  }

  // Block-collective. Each warp sums the counts of 32 keys over some blocks.
  __device__ void sum_counts() {
    const int chunks = (shape_.keys + kWarp - 1) / kWarp;
    const int shares = max(1, kAssignWarps / chunks);
    for (int c = warp_id(); c < chunks * shares; c += kAssignWarps) {
      const int key = c % chunks * kWarp + lane_id(), share = c / chunks;
      if (key >= shape_.keys) {
        continue;
      }
      int total = 0, before = 0;
#pragma unroll 8
      for (int b = shape_.blocks * share / shares; b < shape_.blocks * (share + 1) / shares; ++b) {
        const int count = a_.scratch[b * shape_.keys + key];
        total += count;
        // fault: permute plan: rows of earlier blocks
        before += b < block_ ? count : 0;
      }
      atomicAdd(&s_.total[key], total);
      atomicAdd(&s_.next[key], before);
    }
  }

  // Block-collective. Computes the first row of each group: exclusive prefix sums.
  __device__ void compute_group_begins() {
    __shared__ int warp_sums[kAssignWarps];
    int carry = 0;
    for (int first = 0; first < num_groups(); first += kAssignThreads) {
      const int key = first + thread();
      const int size = key < num_groups() ? padded(s_.total[key]) : 0;
      int end = size;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int left = __shfl_up_sync(kFullWarp, end, step);
        end += lane_id() >= step ? left : 0;
      }
      if (lane_id() == kWarp - 1) {
        warp_sums[warp_id()] = end;
      }
      __syncthreads();
      int before = carry;
      for (int w = 0; w < kAssignWarps; ++w) {
        before += w < warp_id() ? warp_sums[w] : 0;
        carry += warp_sums[w];
      }
      if (key < num_groups()) {
        s_.begin[key] = before + end - size;
        s_.next[key] += before + end - size;
      }
      __syncthreads();
    }
    group_rows_ = carry;
    const int needed = kRoute || a_.expert_major ? carry : num_wire_rows();
    rows_ = a_.capacity < 0 ? needed : static_cast<int>(a_.capacity);
  }

  // One thread. Publishes the number of rows of an exact plan, or reports a bad index.
  __device__ void publish_to_host(int first_bad) const {
    if (a_.reply != nullptr) {
      const PlanReply reply = kPlanReady | (has_failed_ ? kPlanBad : static_cast<PlanReply>(rows_));
      *static_cast<volatile PlanReply*>(a_.reply) = reply;
    } else if (has_failed_ && atomicCAS(a_.reporter.claimed, 0U, 1U) == 0) {
      report_bad_index(*a_.reporter.report, first_bad);
    }
  }

  // One thread.
  __device__ void report_bad_index(PermuteReport& report, int index) const {
    const Int* topk_idx = static_cast<const Int*>(a_.topk_idx);
    const int token = index / a_.num_topk, slot = index % a_.num_topk;
    const Int value = topk_idx[index];
    report.bound = a_.num_experts;
    report.value = value;
    report.token = token;
    report.slot = slot;
    report.earlier_slot = -1;
    for (int k = 0; k < slot && !is_bad(a_, value); ++k) {
      if (topk_idx[token * a_.num_topk + k] == value) {
        report.earlier_slot = k;
        break;
      }
    }
    __threadfence_system();
    *const_cast<volatile int64_t*>(&report.kind) = PermuteReport::bad_topk;
  }

  // Block-collective, in the first block.
  __device__ void write_totals() {
    if constexpr (kRoute) {
      for (int rank = thread(); rank < shape_.keys; rank += kAssignThreads) {
        a_.send_counts[rank] = s_.total[rank];
      }
      return;
    }
    __shared__ int dropped;
    if (thread() == 0) {
      dropped = a_.expert_major ? 0 : max(num_wire_rows() - rows_, 0);
      if (a_.send_counts != nullptr) {
        *a_.send_counts = *a_.recv_counts = num_wire_rows();
      }
      if (!a_.expert_major && a_.offsets != nullptr) {
        *a_.offsets = min(num_wire_rows(), rows_);
      }
    }
    __syncthreads();
    for (int expert = thread(); expert < a_.num_experts; expert += kAssignThreads) {
      const int total = s_.total[expert], begin = s_.begin[expert];
      if (a_.expert_major) {
        const int kept = min(max(rows_ - begin, 0), total);
        a_.offsets[expert] = min(begin + padded(total), rows_);
        a_.tokens_per_expert[expert] = kept;
        if (kept != total) {
          atomicAdd(&dropped, total - kept);
        }
      } else {
        atomicAdd(&a_.tokens_per_expert[expert], total);  // blocks that drop rows subtract them
      }
    }
    __syncthreads();
    if (thread() == 0) {
      *a_.num_dropped = dropped;
    }
  }

  // Block-collective. Assigns rows to `words` words of tokens from word `first` on.
  __device__ void assign_round(int first, int words) {
    const int keys = shape_.keys;
    for (int i = thread(); i < words * keys; i += kAssignThreads) {
      s_.bits[i] = 0;
    }
    __syncthreads();
    const int begin = min(first * kWarp, a_.num_tokens), end = min((first + words) * kWarp, a_.num_tokens);
    each_entry(begin, end, [&](int, int token, int entry) {
      if (entry >= 0) {
        const int word = (token - begin) / kWarp * keys;
        const uint32_t bit = 1U << (token - begin) % kWarp;
        atomicOr(&s_.bits[word + key_of<kRoute>(a_, entry)], bit);
        if (!kRoute) {
          atomicOr(&s_.bits[word + a_.num_experts], bit);
        }
      }
    });
    __syncthreads();
    each_entry(begin, end, [&](int i, int token, int entry) { assign_entry(i, token, token - begin, entry); });
    __syncthreads();
    for (int key = thread(); key < keys; key += kAssignThreads) {
      int count = 0;
      for (int word = 0; word < words; ++word) {
        count += __popc(s_.bits[word * keys + key]);
      }
      s_.next[key] += count;
    }
    __syncthreads();
  }

  // Block-collective. Calls f(index, token, entry) for each entry of the tokens in [begin, end).
  template <class F>
  __device__ void each_entry(int begin, int end, const F& f) const {
    for (int i = begin * a_.num_topk + thread(); i < end * a_.num_topk; i += kAssignThreads) {
      f(i, i / a_.num_topk, entry_at(i));
    }
  }

  // One thread. The row of the round's n-th token in the group of `key`.
  __device__ int position(int n, int key) const {
    const int word = n / kWarp;
    int result = s_.next[key];
    // fault: permute plan: tokens of earlier words
    for (int w = 0; w < word; ++w) {
      result += __popc(s_.bits[w * shape_.keys + key]);
    }
    return result + __popc(s_.bits[word * shape_.keys + key] & ((1U << n % kWarp) - 1));
  }

  // One thread. Entry `i`, of the round's n-th token.
  __device__ void assign_entry(int i, int token, int n, int entry) const {
    const int slot = i - token * a_.num_topk;
    if constexpr (kRoute) {
      a_.send_row[i] = entry >= 0 ? position(n, key_of<true>(a_, entry)) : -1;
      if (entry >= 0) {
        write_wire_topk(i - slot, slot, entry, a_.send_row[i]);
      }
      return;
    }
    int wire_row = token;
    if (!are_wire_rows()) {
      const bool has_expert = (s_.bits[n / kWarp * shape_.keys + a_.num_experts] >> n % kWarp & 1) != 0;
      wire_row = has_expert ? position(n, a_.num_experts) : -1;
      a_.send_row[i] = entry >= 0 ? wire_row : -1;
    }
    if (a_.expert_major) {
      const int row = entry >= 0 ? position(n, entry) : rows_;
      if (row < rows_) {
        static_cast<int32_t*>(a_.recv_map)[row] = wire_row * a_.num_topk + slot;
      }
    } else if (wire_row >= 0 && wire_row < rows_) {
      static_cast<Int*>(a_.recv_map)[int64_t{wire_row} * a_.num_topk + slot] = entry;
    } else if (entry >= 0) {
      atomicAdd(&a_.tokens_per_expert[entry], -1);
    }
  }

  // One thread. The first slot of a rank writes the experts of the wire row.
  __device__ void write_wire_topk(int first, int slot, int entry, int row) const {
    const int rank = key_of<true>(a_, entry);
    const auto is_here = [&](int other) { return other >= 0 && key_of<true>(a_, other) == rank; };
    for (int k = 0; k < slot; ++k) {
      if (is_here(entry_at(first + k))) {
        return;
      }
    }
    for (int k = 0; k < a_.num_topk; ++k) {
      const int other = entry_at(first + k);
      a_.wire_topk[int64_t{row} * a_.num_topk + k] = is_here(other) ? other - rank * a_.num_local_experts : -1;
    }
  }

  // Grid-wide. Writes -1 to every element of recv_map without an entry.
  __device__ void fill_padding() const {
    if (a_.expert_major) {
      auto* recv_pair = static_cast<int32_t*>(a_.recv_map);
      // fault: permute plan: expert without padding
      const int most = a_.alignment - 1;  // rows of padding per expert
      const int64_t step = int64_t{shape_.blocks} * kAssignThreads;
      for (int64_t i = block_ * kAssignThreads + thread(); i < int64_t{a_.num_experts} * most; i += step) {
        const auto expert = static_cast<int>(i / most);
        const int total = s_.total[expert], begin = s_.begin[expert];
        const int row = begin + total + static_cast<int>(i % most);
        if (row < min(begin + padded(total), rows_)) {
          recv_pair[row] = -1;
        }
      }
      fill_tail(recv_pair, group_rows_, rows_);
    } else {
      fill_tail(static_cast<Int*>(a_.recv_map), int64_t{num_wire_rows()} * a_.num_topk, int64_t{rows_} * a_.num_topk);
    }
  }

  // Grid-wide. Writes -1 to values[begin:end].
  template <class T>
  __device__ void fill_tail(T* values, int64_t begin, int64_t end) const {
    for (int64_t i = begin + block_ * kAssignThreads + thread(); i < end;
         i += int64_t{shape_.blocks} * kAssignThreads) {
      values[i] = -1;
    }
  }

  const PermutePlanArgs& a_;
  const PlanShape& shape_;
  const KeyWords s_;
  const int block_;
  bool has_failed_ = false;
  int group_rows_ = 0;  // rows of all groups, padding included
  int rows_ = 0;        // of the result
};

template <class Int, bool kRoute>
__global__ void __launch_bounds__(kAssignThreads)
    assign_rows(const __grid_constant__ PermutePlanArgs a, const __grid_constant__ PlanShape shape) {
  extern __shared__ int words[];
  PlanBlock<Int, kRoute>(a, shape, words).run();
}

PlanShape shape_of(const PermutePlanArgs& args) {
  PlanShape shape{};
  shape.keys = args.route ? args.num_experts / args.num_local_experts : args.num_experts + 1;
  const auto words = static_cast<int>(std::max<int64_t>(1, ceil_div(args.num_tokens, kWarp)));
  const int most_blocks = std::clamp(kMaxCounts / shape.keys, 1, kMaxPlanBlocks);
  shape.block_words = static_cast<int>(ceil_div(words, most_blocks));
  shape.blocks = static_cast<int>(ceil_div(words, shape.block_words));
  const int most_words = kSharedBytes / static_cast<int>(sizeof(int)) / shape.keys - kKeyArrays;
  shape.round_words = std::min({shape.block_words, kMaxWords, most_words});
  return shape;
}

template <class Int, bool kRoute>
cudaError_t prepare() {
  constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const auto error = cudaFuncSetAttribute(count_keys<Int, kRoute>, kAttribute, kSharedBytes);
  return error != cudaSuccess ? error : cudaFuncSetAttribute(assign_rows<Int, kRoute>, kAttribute, kSharedBytes);
}

template <class Int, bool kRoute>
cudaError_t launch(const PermutePlanArgs& args, const PlanShape& shape, cudaStream_t stream) {
  const int bytes = shape.keys * static_cast<int>(sizeof(int));
  const auto error =
      launch_kernel(Launch::plain, count_keys<Int, kRoute>, shape.blocks, kCountThreads, bytes, stream, args, shape);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_kernel(
      Launch::overlapped,
      assign_rows<Int, kRoute>,
      shape.blocks,
      kAssignThreads,
      (kKeyArrays + shape.round_words) * bytes,
      stream,
      args,
      shape);
}

}  // namespace

cudaError_t prepare_permute_plan() {
  for (const auto prepare_one :
       {prepare<int32_t, false>, prepare<int64_t, false>, prepare<int32_t, true>, prepare<int64_t, true>}) {
    if (const auto error = prepare_one(); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

int64_t permute_plan_scratch(const PermutePlanArgs& args) {
  const PlanShape shape = shape_of(args);
  return shape.round_words < 1 ? 0 : int64_t{shape.blocks} * (shape.keys + 1);
}

cudaError_t launch_permute_plan(const PermutePlanArgs& args, cudaStream_t stream) {
  const PlanShape shape = shape_of(args);
  if (args.route) {
    return args.wide_idx ? launch<int64_t, true>(args, shape, stream) : launch<int32_t, true>(args, shape, stream);
  }
  return args.wide_idx ? launch<int64_t, false>(args, shape, stream) : launch<int32_t, false>(args, shape, stream);
}

}  // namespace ep
