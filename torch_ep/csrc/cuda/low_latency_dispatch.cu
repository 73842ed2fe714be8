// ep::low_latency_dispatch: rows to the ranks that need them, with their plan, in one exchange.
//   announce   the first block: which tokens go where and how many rows each expert gets, to every peer
//   send       the other blocks, a token each: row (quantised here) and where its copies belong -> every rank it visits
//   receive    warps of all blocks, a token each: arrived row -> its places in the result
// Where a row belongs among those of its source and expert is counted by the source; the receiver adds what the ranks
// before it send, so it has to wait for nothing but the announcements.
#include "device/low_latency.cuh"
#include "device/rows.cuh"
#include "device/sums.cuh"

#include <cuda_fp8.h>

#include <algorithm>

namespace ep::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxWarps = kThreads / kWarp;
constexpr int kSendStages = 2;
// Of what a block may ask for, less its variables.
constexpr int kSharedBytes = kStageMemory - 3 * 1024;
constexpr int kGroup = 128;      // channels that share a scale
constexpr float kLargest = 448;  // of e4m3
constexpr float kLeastMaximum = 1e-4F;

// Of the launch.
struct LowLatencyShape {
  int stage_bytes;  // a record, padded
  int receive_warps;
};

// --- quantisation: docstring of torch_ep.low_latency_dispatch ---

__device__ inline float4 load_four(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}

template <class T>
__device__ float4 load_four(const T* from) {
  const uint2 packed = *reinterpret_cast<const uint2*>(from);
  const T* v = reinterpret_cast<const T*>(&packed);
  return {widen(v[0]), widen(v[1]), widen(v[2]), widen(v[3])};
}

// NaN if one of them is.
__device__ inline float larger(float a, float b) {
  return a > b || a != a ? a : b;
}

struct Scale {
  float scale, inverse;
};

__device__ inline Scale scale_of(float maximum, Quantize quantize) {
  if (quantize == Quantize::fp8) {
    return {__fdiv_rn(maximum, kLargest), __fdiv_rn(kLargest, maximum)};
  }
  // The next power of two: of numbers with a fraction, one exponent more. At most that of infinity, also for NaN.
  const uint32_t bits = __float_as_uint(__fdiv_rn(maximum, kLargest));
  const uint32_t exponent = min((bits + 0x7fffff) >> 23, 255U);
  const float scale = __uint_as_float(exponent << 23);
  return {scale, __fdiv_rn(1, scale)};
}

class LowLatencyDispatch {
 public:
  __device__ LowLatencyDispatch(const LowLatencyDispatchArgs& args, const LowLatencyShape& shape)
      : a_(args),
        f_(args.comm, kDispatchKind, args.part, args.ticket),
        entries_{args.topk_idx, args.wide_idx, args.num_topk, args.num_experts},
        num_local_(args.num_experts / args.comm.low_latency.world_size),
        scales_at_(static_cast<int>(args.scales_at())),
        places_at_(static_cast<int>(args.places_at())),
        record_bytes_(static_cast<int>(args.record_bytes())),
        receive_warps_(shape.receive_warps) {
    extern __shared__ __align__(128) char shared[];
    stages_ = shared;
    stage_bytes_ = shape.stage_bytes;
    barriers_ = reinterpret_cast<uint64_t*>(stages_ + int64_t{stage_bytes_} * max(receive_warps_, kSendStages));
    words_ = reinterpret_cast<int*>(barriers_ + kMaxWarps);
  }

  static int64_t shared_bytes(const LowLatencyShape& shape, int num_experts, int words) {
    return int64_t{shape.stage_bytes} * std::max(shape.receive_warps, kSendStages) +
           kMaxWarps * static_cast<int64_t>(sizeof(uint64_t)) + (int64_t{2} * num_experts + words) * 4;
  }

  template <class T>
  __device__ void run() {
    if (lane_id() == 0) {
      barrier_init(&barriers_[warp_id()]);
      fence_barrier_init();
    }
    __syncthreads();
    if (a_.part != Part::send && !f_.is_next()) {
      return;
    }
    if (a_.part != Part::receive) {
      if (blockIdx.x == 0) {
        announce();
      } else {
        send<T>();
      }
      f_.end_send(a_.part, a_.ticket);
    }
    if (a_.part != Part::send) {
      receive();
      f_.end_receive(a_.wait_ns);
    }
  }

 private:
  __device__ int rank_of(int expert) const { return expert / num_local_; }

  // --- announce ---

  __device__ void announce() {
    __shared__ int tile[kThreads];
    const auto tid = static_cast<int>(threadIdx.x);
    const int words = f_.layout().visit_words(), world_size = f_.world_size();
    int* counts = words_;                                                 // [experts]
    auto* visits = reinterpret_cast<uint32_t*>(words_ + a_.num_experts);  // [world_size][words]
    for (int i = tid; i < a_.num_experts + world_size * words; i += kThreads) {
      words_[i] = 0;
    }
    __syncthreads();
    const int tile_tokens = kThreads / a_.num_topk;
    for (int first = 0; first < a_.num_tokens; first += tile_tokens) {
      const int begin = first * a_.num_topk, count = min(tile_tokens, a_.num_tokens - first) * a_.num_topk;
      if (tid < count) {
        tile[tid] = entries_[begin + tid];
      }
      __syncthreads();
      if (tid < count) {
        const int slot = tid % a_.num_topk, token = first + tid / a_.num_topk, expert = tile[tid];
        const int fault = entries_.fault(tile + tid - slot, slot);
        if (fault == Entries::kGood && expert >= 0) {
          atomicAdd(&counts[expert], 1);
          atomicOr(&visits[rank_of(expert) * words + token / 32], 1U << token % 32);
        } else if (fault != Entries::kGood) {
          const int64_t cause = fault == Entries::kOutside ? kOutOfRange : fault;
          const int64_t shape = int64_t{a_.num_topk} << 32 | a_.num_experts;
          f_.record({Failure::bad_topk, Phase::counts, f_.me(), begin + tid, cause, expert, shape});
        }
      }
      __syncthreads();
    }
    __shared__ bool may_write[kWarp];
    if (!__syncthreads_and(warp_id() != 0 || f_.wait_for_credits(may_write[lane_id()]))) {
      return;
    }
    for (int i = tid; i < world_size * (num_local_ + words); i += kThreads) {
      const int p = i / (num_local_ + words), word = i % (num_local_ + words);
      if (!may_write[p]) {
        continue;
      }
      auto* to = reinterpret_cast<int*>(f_.peer(p, f_.layout().header(f_.half(), f_.me())) + sizeof(Header));
      to[word] =
          word < num_local_ ? counts[p * num_local_ + word] : static_cast<int>(visits[p * words + word - num_local_]);
    }
    const bool tells = tid < world_size && may_write[tid % kWarp];
    if (tells) {
      auto* header = reinterpret_cast<Header*>(f_.peer(tid, f_.layout().header(f_.half(), f_.me())));
      header->op = static_cast<int64_t>(Op::low_latency_dispatch);
      for (int i = 0; i < kNumAgreed; ++i) {
        header->agreed[i] = agreed(i);
      }
    }
    __syncthreads();
    if (tells) {
      // Releases what the whole block wrote: it is ordered before this by the barrier.
      store_release_system(f_.peer(tid, f_.layout().header(f_.half(), f_.me())), f_.number());
    }
  }

  __device__ int64_t agreed(int i) const {
    const int64_t words[kNumAgreed] = {
        int64_t{a_.num_topk} << 32 | a_.num_experts,
        a_.hidden,
        a_.max_tokens,
        int64_t{static_cast<int>(a_.element)} << 32 | static_cast<int>(a_.quantize)};
    return words[i];
  }

  // --- send ---

  template <class T>
  __device__ void send() {
    __shared__ int entries[kMaxTopk], experts[kMaxTopk], indices[kMaxTopk];
    const auto tid = static_cast<int>(threadIdx.x), lane = lane_id();
    int untold = -1;  // the token of this lane's last copy, whose flag is still to be written
    const auto tell = [&](int token) {
      if (token >= 0) {
        fence_async_global();
        store_release_system(f_.peer(lane, f_.layout().dispatch_flag(f_.half(), f_.me(), token)), f_.number());
      }
    };
    int n = 0;
    bool has_credit = false, may = false, may_write = false;  // the latter two: of this lane's rank
    const auto blocks = static_cast<int>(gridDim.x) - 1;
    for (int token = static_cast<int>(blockIdx.x) - 1; token < a_.num_tokens; token += blocks, ++n) {
      char* stage = stages_ + n % kSendStages * stage_bytes_;
      const int first = token * a_.num_topk;
      if (tid < a_.num_topk) {
        entries[tid] = entries_[first + tid];
        indices[tid] = 0;
      }
      __syncthreads();
      if (a_.quantize == Quantize::none && tid == 0) {
        barrier_expect(&barriers_[0], a_.row_bytes);
        bulk_load(stage, a_.x + int64_t{token} * a_.row_bytes, a_.row_bytes, &barriers_[0]);
      }
      if (tid < a_.num_topk) {
        experts[tid] = entries_.fault(entries, tid) == Entries::kGood ? entries[tid] : -1;
      }
      for (int i = tid; i < first; i += kThreads) {
        const int other = entries_[i];
        for (int k = 0; k < a_.num_topk; ++k) {
          if (other == entries[k]) {
            atomicAdd(&indices[k], 1);
          }
        }
      }
      if (a_.quantize != Quantize::none) {
        quantize_row(reinterpret_cast<const T*>(a_.x) + int64_t{token} * a_.hidden, stage);
      }
      __syncthreads();
      if (tid < a_.num_topk) {
        const float weight = a_.topk_weights == nullptr ? 1 : a_.topk_weights[first + tid];
        reinterpret_cast<Place*>(stage + places_at_)[tid] = {experts[tid], indices[tid], weight, 0};
      }
      fence_async_shared();
      __syncthreads();
      if (warp_id() != 0) {
        continue;
      }
      if (a_.quantize == Quantize::none) {
        barrier_wait(&barriers_[0], n % 2);
      }
      if (!has_credit) {
        has_credit = true;
        may = f_.wait_for_credits(may_write) && may_write;
      }
      bool visits = false;
      for (int k = 0; may && k < a_.num_topk; ++k) {
        visits = visits || (experts[k] >= 0 && rank_of(experts[k]) == lane);
      }
      if (visits) {
        bulk_store(f_.peer(lane, f_.layout().dispatch_row(f_.half(), f_.me(), token)), stage, record_bytes_);
      }
      bulk_commit();
      bulk_wait<1>();  // all but this token's
      tell(untold);
      untold = visits ? token : -1;
    }
    if (warp_id() == 0) {
      bulk_wait<0>();
      tell(untold);
    }
    __syncthreads();
    fence_async_shared();  // this memory is for what arrives next
  }

  // Of a whole block: each warp some groups, each lane four channels of a group.
  template <class T>
  __device__ void quantize_row(const T* x, char* stage) const {
    const int groups = (a_.hidden + kGroup - 1) / kGroup;
    for (int g = warp_id(); g < groups; g += kMaxWarps) {
      const int channel = g * kGroup + lane_id() * 4;
      const bool has = channel < a_.hidden;
      const float4 v = has ? load_four(x + channel) : float4{0, 0, 0, 0};
      float maximum = larger(larger(fabsf(v.x), fabsf(v.y)), larger(fabsf(v.z), fabsf(v.w)));
      for (int step = kWarp / 2; step > 0; step /= 2) {
        maximum = larger(maximum, __shfl_xor_sync(kFullWarp, maximum, step));
      }
      const Scale s = scale_of(larger(maximum, kLeastMaximum), a_.quantize);
      if (has) {
        const auto low =
            __nv_cvt_float2_to_fp8x2({multiply(v.x, s.inverse), multiply(v.y, s.inverse)}, __NV_SATFINITE, __NV_E4M3);
        const auto high =
            __nv_cvt_float2_to_fp8x2({multiply(v.z, s.inverse), multiply(v.w, s.inverse)}, __NV_SATFINITE, __NV_E4M3);
        *reinterpret_cast<uint32_t*>(stage + channel) = static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
      }
      if (lane_id() == 0) {
        if (a_.quantize == Quantize::fp8_ue8m0) {
          stage[scales_at_ + g] = static_cast<char>(__float_as_uint(s.scale) >> 23);
        } else {
          reinterpret_cast<float*>(stage + scales_at_)[g] = s.scale;
        }
      }
    }
    // Exponents of groups that are not there.
    const auto tid = static_cast<int>(threadIdx.x);
    if (a_.quantize == Quantize::fp8_ue8m0 && tid < 4 && groups + tid < a_.num_scales * 4) {
      stage[scales_at_ + groups + tid] = 0;
    }
  }

  // --- receive ---

  __device__ const Header* header_of(int source) const {
    return reinterpret_cast<const Header*>(f_.own(f_.layout().header(f_.half(), source)));
  }

  // Of one warp: false if it failed, or not all announced the same exchange. `is_there`: whether the lane's rank did.
  __device__ bool hear(bool& is_there) const {
    const int s = lane_id(), world_size = f_.world_size();
    const Header* header = header_of(s % world_size);
    const bool came = f_.wait_lanes(
        Phase::header,
        s < world_size && f_.is_active(s),
        [&] { return load_acquire_system(&header->epoch) == f_.number(); },
        is_there);
    is_there = s < world_size && f_.decide(s, is_there);
    bool same = true;
    for (int i = 0; came && same && is_there && i < kNumAgreed; ++i) {
      same = header->agreed[i] == agreed(i);
      if (!same && blockIdx.x == 0) {
        f_.record(
            {Failure::mismatch,
             Phase::header,
             s,
             1 + i,
             agreed(i),
             header->agreed[i],
             static_cast<int64_t>(f_.number())});
      }
    }
    return __all_sync(kFullWarp, came && same) != 0;
  }

  __device__ void receive() {
    __shared__ bool is_there[kWarp];
    const auto tid = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const int world_size = f_.world_size(), words = f_.layout().visit_words();
    const int rows_of_expert = world_size * a_.max_tokens;  // C
    int* counts = words_;                                   // [world_size][local experts]
    int* begins = counts + a_.num_experts;                  // likewise: rows that come before those of the source
    auto* visits = reinterpret_cast<uint32_t*>(begins + a_.num_experts);  // [world_size][words]
    if (!__syncthreads_and(warp_id() != 0 || hear(is_there[lane_id()]))) {
      return;
    }
    for (int i = tid; i < world_size * (num_local_ + words); i += kThreads) {
      const int s = i / (num_local_ + words), word = i % (num_local_ + words);
      const int value = is_there[s] ? reinterpret_cast<const int*>(header_of(s) + 1)[word] : 0;
      if (word < num_local_) {
        counts[s * num_local_ + word] = min(max(value, 0), a_.max_tokens);
      } else {
        visits[s * words + word - num_local_] = static_cast<uint32_t>(value);
      }
    }
    __syncthreads();
    for (int e = tid; e < num_local_; e += kThreads) {
      int end = 0;
      for (int s = 0; s < world_size; ++s) {
        begins[s * num_local_ + e] = end;
        end += counts[s * num_local_ + e];
        if (block == 0) {
          a_.source_offsets[e * world_size + s] = end;
        }
      }
      if (block == 0) {
        a_.tokens_per_expert[e] = end;
      }
    }
    __syncthreads();
    const int last = (world_size - 1) * num_local_;
    for (int e = block; e < num_local_; e += static_cast<int>(gridDim.x)) {
      for (int i = begins[last + e] + counts[last + e] + tid; i < rows_of_expert; i += kThreads) {
        a_.recv_slot[int64_t{e} * rows_of_expert + i] = -1;
      }
    }
    if (warp_id() < receive_warps_) {
      receive_rows(counts, begins, visits);
    }
  }

  __device__ void receive_rows(const int* counts, const int* begins, const uint32_t* visits) {
    const int lane = lane_id(), words = f_.layout().visit_words(), rows_of_expert = f_.world_size() * a_.max_tokens;
    char* stage = stages_ + int64_t{warp_id()} * stage_bytes_;
    uint64_t* barrier = &barriers_[warp_id()];
    // Loads that the barrier has counted: warp 0 of a block that sent has used it before.
    int n = a_.part == Part::both && warp_id() == 0 ? sent_here() : 0;
    const auto stride = static_cast<int>(gridDim.x) * receive_warps_;
    for (int i = static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) * warp_id(); i < rows_of_expert;
         i += stride) {
      const int source = i / a_.max_tokens, token = i % a_.max_tokens;
      int64_t row = -1;
      if ((visits[source * words + token / 32] >> token % 32 & 1) != 0) {
        const char* flag = f_.own(f_.layout().dispatch_flag(f_.half(), source, token));
        auto outcome = Outcome::there;
        if (lane == 0) {
          outcome = f_.wait(Phase::rows, source, [&] { return load_acquire_system(flag) == f_.number(); });
        }
        if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
          break;
        }
        if (__all_sync(kFullWarp, outcome == Outcome::there)) {
          bulk_wait_read<0>();  // of what left from this stage
          __syncwarp();
          if (lane == 0) {
            fence_async_global();  // between the flag and the bulk copy of what it tells of
            fence_async_shared();
            barrier_expect(barrier, record_bytes_);
            bulk_load(stage, f_.own(f_.layout().dispatch_row(f_.half(), source, token)), record_bytes_, barrier);
          }
          barrier_wait(barrier, n++ % 2);
          row = place_row(stage, i, source, counts, begins);
        }
      }
      if (lane < a_.num_topk) {
        a_.recv_row[int64_t{i} * a_.num_topk + lane] = static_cast<int>(row);
      }
    }
    bulk_wait<0>();
  }

  // Rows that this block has sent, by the first of its warps' barriers.
  __device__ int sent_here() const {
    const int first = static_cast<int>(blockIdx.x) - 1, blocks = static_cast<int>(gridDim.x) - 1;
    return a_.quantize != Quantize::none || first < 0 || first >= a_.num_tokens
               ? 0
               : (a_.num_tokens - first + blocks - 1) / blocks;
  }

  // Of a whole warp. `i`: source * max_tokens + token. Returns the row of this lane's slot, or -1.
  __device__ int64_t place_row(const char* stage, int i, int source, const int* counts, const int* begins) const {
    const int lane = lane_id(), rows_of_expert = f_.world_size() * a_.max_tokens;
    Place place{-1, 0, 0, 0};
    if (lane < a_.num_topk) {
      place = reinterpret_cast<const Place*>(stage + places_at_)[lane];
    }
    int64_t row = -1;
    const int expert = place.expert - f_.me() * num_local_;
    if (place.expert >= 0 && expert >= 0 && expert < num_local_) {
      const int at = source * num_local_ + expert;
      if (place.index >= 0 && place.index < counts[at]) {
        row = int64_t{expert} * rows_of_expert + begins[at] + place.index;
        a_.recv_slot[row] = i * a_.num_topk + lane;
        a_.row_weights[row] = place.weight;
        bulk_store(a_.rows + row * a_.row_bytes, stage, a_.row_bytes);
      }
    }
    bulk_commit();
    for (uint32_t left = a_.num_scales != 0 ? __ballot_sync(kFullWarp, row >= 0) : 0; left != 0; left &= left - 1) {
      const int64_t to = __shfl_sync(kFullWarp, row, __ffs(static_cast<int>(left)) - 1);
      const int64_t first = to / rows_of_expert * a_.num_scales * a_.scale_rows + to % rows_of_expert;
      for (int j = lane; j < a_.num_scales; j += kWarp) {
        static_cast<int*>(a_.scales)[first + j * a_.scale_rows] = reinterpret_cast<const int*>(stage + scales_at_)[j];
      }
    }
    __syncwarp();  // all have read the stage
    return row;
  }

  const LowLatencyDispatchArgs& a_;
  const Flight f_;
  const Entries entries_;
  const int num_local_;
  const int scales_at_, places_at_, record_bytes_;
  const int receive_warps_;
  char* stages_;
  int stage_bytes_;
  uint64_t* barriers_;  // of each warp
  int* words_;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) low_latency_dispatch_kernel(
    const __grid_constant__ LowLatencyDispatchArgs args,
    const __grid_constant__ LowLatencyShape shape) {
  if (fresh(args.comm.state->failed) == 0) {
    LowLatencyDispatch(args, shape).run<T>();
  }
}

int words_of(const LowLatencyDispatchArgs& args) {
  return args.comm.low_latency.world_size * args.comm.low_latency.visit_words();
}

LowLatencyShape shape_of(const LowLatencyDispatchArgs& args) {
  LowLatencyShape shape{static_cast<int>(round_up(args.record_bytes(), 128)), 0};
  const int64_t rest = kSharedBytes - LowLatencyDispatch::shared_bytes({0, 0}, args.num_experts, words_of(args));
  shape.receive_warps = static_cast<int>(std::clamp<int64_t>(rest / shape.stage_bytes, 1, kMaxWarps));
  return shape;
}

// A block more than there are tokens, which announces them; and enough for a warp to each row that may come.
int blocks_of(const LowLatencyDispatchArgs& args, const LowLatencyShape& shape, int multiprocessors) {
  const int64_t rows = int64_t{args.comm.low_latency.world_size} * args.max_tokens;
  const int64_t to_receive = (rows + shape.receive_warps - 1) / shape.receive_warps;
  const int64_t to_send = args.part == Part::receive ? 0 : args.num_tokens + 1;
  const int64_t wanted = std::max({args.part == Part::send ? 0 : to_receive, to_send, int64_t{2}});
  return static_cast<int>(std::min<int64_t>(wanted, multiprocessors));
}

template <class T>
cudaError_t launch(const LowLatencyDispatchArgs& args, int multiprocessors, cudaStream_t stream) {
  const LowLatencyShape shape = shape_of(args);
  const auto shared = static_cast<int>(LowLatencyDispatch::shared_bytes(shape, args.num_experts, words_of(args)));
  const int blocks = blocks_of(args, shape, multiprocessors);
  const auto kernel = low_latency_dispatch_kernel<T>;
  kernel<<<blocks, kThreads, shared, stream>>>(args, shape);
  return cudaGetLastError();
}

}  // namespace

cudaError_t prepare_low_latency_dispatch() {
  constexpr auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  for (const auto kernel :
       {low_latency_dispatch_kernel<float>,
        low_latency_dispatch_kernel<__nv_bfloat16>,
        low_latency_dispatch_kernel<__half>}) {
    if (const auto error = cudaFuncSetAttribute(kernel, attribute, kSharedBytes); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_low_latency_dispatch(const LowLatencyDispatchArgs& args, int multiprocessors, cudaStream_t stream) {
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
