// Quantizes rows to fp8, with one scale per group of channels. Formulas: docstring of torch_ep.low_latency_dispatch.
#pragma once

#include "nvlink/device/exchange.cuh"
#include "nvlink/device/reduce.cuh"

#include <cuda_fp8.h>

namespace ep::nvlink {

// The bits of absolute values are ordered as the values are, NaN above all.
__device__ inline uint32_t magnitude(float v) {
  return __float_as_uint(v) & 0x7fffffff;
}

struct Scale {
  float scale, inverse;
};

__device__ inline Scale scale_of(float maximum, Quantize quantize) {
  if (quantize == Quantize::fp8) {
    return {__fdiv_rn(maximum, kMaxFp8), __fdiv_rn(kMaxFp8, maximum)};
  }
  // Rounds up to a power of two: the exponent grows by one if there is a fraction. It is at most that of infinity, also
  // for NaN.
  const uint32_t bits = __float_as_uint(__fdiv_rn(maximum, kMaxFp8));
  // fault: low latency: scale not rounded up
  const uint32_t exponent = min((bits + 0x7fffff) >> 23, 255U);
  const float scale = __uint_as_float(exponent << 23);
  return {scale, __fdiv_rn(1, scale)};
}

// The byte of ue8m0.
__device__ inline uint32_t exponent_of(float scale) {
  return __float_as_uint(scale) >> 23;
}

// Sixteen channels of T, to be quantized.
template <class T>
class Channels {
 public:
  static constexpr int kLoads = sizeof(T);

  // Vector `v` of the quantized row; zeros unless `has`.
  __device__ void load(const T* x, int v, bool has) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      vectors_[i] = has ? reinterpret_cast<const uint4*>(x)[v * kLoads + i] : uint4{0, 0, 0, 0};
    }
  }

  __device__ uint32_t greatest_magnitude() const {
    uint32_t most = 0;  // bits of T, which have the same order; two numbers of two bytes at once
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      for (const uint32_t word : {vectors_[i].x, vectors_[i].y, vectors_[i].z, vectors_[i].w}) {
        most = sizeof(T) == 2 ? __vmaxu2(most, word & 0x7fff7fff) : max(most, word & 0x7fffffff);
      }
    }
    if constexpr (sizeof(T) == 2) {
      const auto bits = static_cast<uint16_t>(max(most & 0xffff, most >> 16));
      return magnitude(widen(*reinterpret_cast<const T*>(&bits)));
    } else {
      return most;
    }
  }

  __device__ uint4 multiplied(float inverse) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float wide[kSize];
      unpack<T>(vectors_[i], wide);
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        words[(i * kSize + j) / 4] = pair(wide[j], wide[j + 1], inverse) | pair(wide[j + 2], wide[j + 3], inverse)
                                                                               << 16;
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

 private:
  static constexpr int kSize = Vector<T>::kSize;

  __device__ static uint32_t pair(float a, float b, float inverse) {
    return __nv_cvt_float2_to_fp8x2({multiply(a, inverse), multiply(b, inverse)}, __NV_SATFINITE, __NV_E4M3);
  }

  uint4 vectors_[kLoads];
};

// Warp-collective. kGroupVectors neighboring lanes have the i-th vectors of one group. Returns these vectors,
// quantized, and their scales.
template <class T, int kVectors>
__device__ void
quantize(const Channels<T> (&channels)[kVectors], Quantize how, uint4 (&vectors)[kVectors], float (&scales)[kVectors]) {
  static_assert(kVectors <= kGroupVectors);
  const int lane = lane_id();
  uint32_t maximum = magnitude(kMinAmax);  // lane i of a group: the maximum of its i-th vectors
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    uint32_t most = channels[i].greatest_magnitude();
#pragma unroll
    for (int mask = 1; mask < kGroupVectors; mask *= 2) {
      most = max(most, __shfl_xor_sync(kFullWarp, most, mask));
    }
    maximum = lane % kGroupVectors == i ? max(maximum, most) : maximum;
  }
  const Scale scale = scale_of(__uint_as_float(maximum), how);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int from = lane / kGroupVectors * kGroupVectors + i;
    scales[i] = __shfl_sync(kFullWarp, scale.scale, from);
    vectors[i] = channels[i].multiplied(__shfl_sync(kFullWarp, scale.inverse, from));
  }
}

}  // namespace ep::nvlink
