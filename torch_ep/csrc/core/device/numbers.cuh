// The numbers in a 16-byte vector of a row, and their sums: in float32 (float64 for float64), without contraction.
#pragma once

#include "core/device/warp.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace ep {

template <class T>
struct Vector {
  using Wide = float;
  static constexpr int kSize = 16 / sizeof(T);
};

template <>
struct Vector<double> {
  using Wide = double;
  static constexpr int kSize = 2;
};

__device__ __forceinline__ float widen(float v) {
  return v;
}
__device__ __forceinline__ double widen(double v) {
  return v;
}
__device__ __forceinline__ float widen(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float widen(__half v) {
  return __half2float(v);
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& packed, typename Vector<T>::Wide (&wide)[Vector<T>::kSize]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // One instruction per number. The intrinsic takes two for the upper number of a word.
    const uint32_t words[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wide[2 * i] = __uint_as_float(words[i] << 16);
      wide[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
    }
  } else {
    const T* numbers = reinterpret_cast<const T*>(&packed);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      wide[i] = widen(numbers[i]);
    }
  }
}

template <class T>
__device__ __forceinline__ T narrow(typename Vector<T>::Wide v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

__device__ __forceinline__ float add(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ __forceinline__ double add(double a, double b) {
  return __dadd_rn(a, b);
}
__device__ __forceinline__ float multiply(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double multiply(double a, double b) {
  return __dmul_rn(a, b);
}

__device__ __forceinline__ double shuffle(double v, int lane) {
  return __shfl_sync(kFullWarp, v, lane);
}
__device__ __forceinline__ float shuffle(float v, int lane) {
  return __shfl_sync(kFullWarp, v, lane);
}

template <class T>
struct Sum {
  using Wide = typename Vector<T>::Wide;
  static constexpr int kSize = Vector<T>::kSize;
  Wide value[kSize];

  // Minus zero: adding it leaves every first term unchanged.
  __device__ __forceinline__ Sum() {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      value[i] = -Wide{0};
    }
  }

  template <bool weighted>
  __device__ __forceinline__ void add_term(const uint4& packed, Wide weight) {
    Wide term[kSize];
    unpack<T>(packed, term);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      value[i] = add(value[i], weighted ? multiply(weight, term[i]) : term[i]);
    }
  }

  __device__ __forceinline__ uint4 rounded() const {
    uint4 packed;
    T* numbers = reinterpret_cast<T*>(&packed);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      numbers[i] = narrow<T>(value[i]);
    }
    return packed;
  }
};

}  // namespace ep
