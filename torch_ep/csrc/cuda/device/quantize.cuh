// Rows to fp8, with a scale for each group of channels: docstring of torch_ep.low_latency_dispatch.
#pragma once

#include "exchange.cuh"
#include "sums.cuh"

#include <cuda_fp8.h>

#include <cmath>
#include <type_traits>

namespace ep::cuda {

constexpr int kGroup = 128;      // channels that share a scale
constexpr float kLargest = 448;  // of e4m3
constexpr float kLeastMaximum = 1e-4F;

// Four channels.
template <class T>
using Four = std::conditional_t<sizeof(T) == 4, float4, uint2>;

__device__ inline float4 widen_four(const float4& four, const float*) {
  return four;
}

template <class T>
__device__ float4 widen_four(const uint2& four, const T*) {
  const T* v = reinterpret_cast<const T*>(&four);
  return {widen(v[0]), widen(v[1]), widen(v[2]), widen(v[3])};
}

// The bits of absolute values are ordered as these are, with NaN above all.
__device__ inline uint32_t magnitude(float v) {
  return __float_as_uint(v) & 0x7fffffff;
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

// Rows of T, each by a whole block of kWarps warps, into shared memory.
template <class T, int kWarps>
class Quantizer {
 public:
  // Groups of a row that a warp has on their way at once; each lane has four channels of each.
  static constexpr int kGroupsAhead = 4;
  using Ahead = Four<T>[kGroupsAhead];

  // `scales_at`: in the result, behind the row. `num_scales`: words of four bytes.
  __device__ Quantizer(Quantize quantize, int hidden, int scales_at, int num_scales)
      : quantize_(quantize), hidden_(hidden), scales_at_(scales_at), num_scales_(num_scales) {}

  // From group `first` on, every kWarps-th.
  __device__ void load(const T* x, int first, Ahead& groups) const {
#pragma unroll
    for (int i = 0; i < kGroupsAhead; ++i) {
      const int channel = (first + i * kWarps) * kGroup + lane_id() * 4;
      groups[i] = channel < hidden_ ? *reinterpret_cast<const Four<T>*>(x + channel) : Four<T>{};
    }
  }

  // Of a whole block. `ahead`: the first that `load` gives this warp.
  __device__ void run(const T* x, char* stage, Ahead& ahead) const {
    const int groups = (hidden_ + kGroup - 1) / kGroup;
#pragma unroll 1
    for (int first = warp_id(); first < groups; first += kGroupsAhead * kWarps) {
      if (first != warp_id()) {
        load(x, first, ahead);
      }
      float4 four[kGroupsAhead];
      uint32_t maximum = 0;  // lane i: of group i
#pragma unroll
      for (int i = 0; i < kGroupsAhead; ++i) {
        four[i] = widen_four(ahead[i], x);
        const uint32_t most =
            max(max(magnitude(four[i].x), magnitude(four[i].y)), max(magnitude(four[i].z), magnitude(four[i].w)));
        const uint32_t of_group = __reduce_max_sync(kFullWarp, most);
        maximum = lane_id() == i ? of_group : maximum;
      }
      const Scale scale = scale_of(__uint_as_float(max(maximum, magnitude(kLeastMaximum))), quantize_);
#pragma unroll
      for (int i = 0; i < kGroupsAhead; ++i) {
        const Scale s{__shfl_sync(kFullWarp, scale.scale, i), __shfl_sync(kFullWarp, scale.inverse, i)};
        if (const int g = first + i * kWarps; g < groups) {
          quantize_group(g, four[i], s, stage);
        }
      }
    }
    // Exponents of groups that are not there.
    const auto tid = static_cast<int>(threadIdx.x);
    if (quantize_ == Quantize::fp8_ue8m0 && tid < 4 && groups + tid < num_scales_ * 4) {
      stage[scales_at_ + groups + tid] = 0;
    }
  }

 private:
  __device__ void quantize_group(int g, const float4& v, const Scale& s, char* stage) const {
    const int channel = g * kGroup + lane_id() * 4;
    if (channel < hidden_) {
      const auto low =
          __nv_cvt_float2_to_fp8x2({multiply(v.x, s.inverse), multiply(v.y, s.inverse)}, __NV_SATFINITE, __NV_E4M3);
      const auto high =
          __nv_cvt_float2_to_fp8x2({multiply(v.z, s.inverse), multiply(v.w, s.inverse)}, __NV_SATFINITE, __NV_E4M3);
      *reinterpret_cast<uint32_t*>(stage + channel) = static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
    }
    if (lane_id() == 0) {
      if (quantize_ == Quantize::fp8_ue8m0) {
        stage[scales_at_ + g] = static_cast<char>(__float_as_uint(s.scale) >> 23);
      } else {
        reinterpret_cast<float*>(stage + scales_at_)[g] = s.scale;
      }
    }
  }

  const Quantize quantize_;
  const int hidden_, scales_at_, num_scales_;
};

}  // namespace ep::cuda
