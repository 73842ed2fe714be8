// Sums of rows: in float32 (float64 for float64), in the order of the token's slots, without contraction.
#pragma once

#include "exchange.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace ep::cuda {

// --- sixteen bytes of a row, and the numbers in them ---

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
  Wide value[Vector<T>::kSize];

  // The first term is taken as it is: 0 + -0 would be another number.
  template <bool weighted>
  __device__ __forceinline__ void add_term(const uint4& packed, Wide weight, bool first) {
    const T* numbers = reinterpret_cast<const T*>(&packed);
    if (first) {
#pragma unroll
      for (int i = 0; i < Vector<T>::kSize; ++i) {
        value[i] = weighted ? multiply(weight, widen(numbers[i])) : widen(numbers[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Vector<T>::kSize; ++i) {
        value[i] = add(value[i], weighted ? multiply(weight, widen(numbers[i])) : widen(numbers[i]));
      }
    }
  }

  __device__ __forceinline__ uint4 rounded() const {
    uint4 packed;
    T* numbers = reinterpret_cast<T*>(&packed);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      numbers[i] = narrow<T>(value[i]);
    }
    return packed;
  }
};

// --- sums of rows ---

// Rows are read in pieces, each of kBatch vectors a lane, through a ring in shared memory: what is in flight there
// hides the latency of device memory, which the registers of so few warps could not.
constexpr int kBatch = 4;
constexpr int kPieceVectors = kBatch * kWarp;
constexpr int kPieceBytes = kPieceVectors * 16;

// What is summed, as masks of lanes that have one row each. Terms are added in the order of their lanes. One of them
// may stand for rows of this rank, which are added up, in the order of their lanes, and rounded first.
struct Terms {
  uint32_t all;
  uint32_t own;       // none, or one of them
  uint32_t own_rows;  // whose rows that term stands for

  __device__ int count() const { return __popc(all & ~own) + (own != 0 ? __popc(own_rows) : 0); }
};

// The rows of `Terms` one after the other.
class Cursor {
 public:
  __device__ explicit Cursor(const Terms& terms) : terms_(terms), left_(terms.all) { enter(); }
  // The lane whose row is next; rows have to be left.
  __device__ int lane() const { return __ffs(static_cast<int>(own_left_ != 0 ? own_left_ : left_)) - 1; }
  __device__ void advance() {
    if (own_left_ != 0) {
      own_left_ &= own_left_ - 1;
    }
    if (own_left_ == 0) {
      left_ &= left_ - 1;
      enter();
    }
  }
  // Whether the pass over all rows is over; the next one begins at once.
  __device__ bool wraps() {
    if (left_ != 0) {
      return false;
    }
    left_ = terms_.all;
    enter();
    return true;
  }

 private:
  // Steps over a term of own rows that has none, and into one that has.
  __device__ void enter() {
    if ((left_ & -left_ & terms_.own) != 0) {
      own_left_ = terms_.own_rows;
      if (own_left_ == 0) {
        left_ &= left_ - 1;
      }
    }
  }
  const Terms& terms_;
  uint32_t left_, own_left_ = 0;
};

// Of a whole warp: the sum of `terms`, whose rows are at the lanes' addresses `row`; own ones are multiplied by the
// lanes' `weight`. sink(piece, vectors): takes this lane's part of each piece of the result.
template <class T, bool weighted, int kDepth, class Sink>
__device__ __forceinline__ void sum_rows(
    const Terms& terms,
    const char* row,
    typename Vector<T>::Wide weight,
    int vectors,
    char* ring,
    const Sink& sink) {
  using Wide = typename Vector<T>::Wide;
  const int pieces = (vectors + kPieceVectors - 1) / kPieceVectors;
  char* own_ring = ring + lane_id() * 16;  // what a lane copies it alone reads: no barrier
  Cursor to_load(terms);
  int load_piece = terms.count() > 0 ? 0 : pieces, loaded = 0, taken = 0;
  const auto load_next = [&] {
    if (load_piece < pieces) {
      const auto* from =
          reinterpret_cast<const char*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(row), to_load.lane()));
      char* slot = own_ring + loaded * kPieceBytes;
      const int first = load_piece * kPieceVectors + lane_id();
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * kWarp < vectors) {
          copy_async(slot + b * kWarp * 16, from + int64_t{first + b * kWarp} * 16);
        }
      }
      loaded = loaded + 1 == kDepth ? 0 : loaded + 1;
      to_load.advance();
      if (to_load.wraps()) {
        ++load_piece;
      }
    }
    copy_commit();
  };
  const auto take = [&](uint4(&vectors_of_row)[kBatch]) {
    copy_wait<kDepth - 1>();
    const char* slot = own_ring + taken * kPieceBytes;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      vectors_of_row[b] = *reinterpret_cast<const uint4*>(slot + b * kWarp * 16);
    }
    taken = taken + 1 == kDepth ? 0 : taken + 1;
    load_next();
  };

  const auto add_own = [&](uint4(&result)[kBatch]) {
    Sum<T> own[kBatch] = {};
    for (uint32_t rows = terms.own_rows; rows != 0; rows &= rows - 1) {
      uint4 part[kBatch];
      take(part);
      const Wide w = weighted ? shuffle(weight, __ffs(static_cast<int>(rows)) - 1) : weight;
      if (rows == terms.own_rows) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          own[b].template add_term<weighted>(part[b], w, true);
        }
      } else {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          own[b].template add_term<weighted>(part[b], w, false);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      result[b] = own[b].rounded();
    }
  };

  __syncwarp();
  for (int i = 0; i < kDepth; ++i) {
    load_next();
  }
  // A lone row is passed on as it is.
  const bool lone = terms.count() == 1 && __popc(terms.all) == 1 && !(weighted && terms.own != 0);
  for (int piece = 0; piece < pieces; ++piece) {
    uint4 part[kBatch];
    if (lone) {
      take(part);
      sink(piece, part);
      continue;
    }
    Sum<T> total[kBatch] = {};
    for (uint32_t left = terms.all; left != 0; left &= left - 1) {
      if ((left & -left & terms.own) != 0) {
        add_own(part);
      } else {
        take(part);
      }
      if (__popc(terms.all) == 1) {
        break;  // the sum of own rows, rounded already
      }
      if (left == terms.all) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          total[b].template add_term<false>(part[b], Wide{1}, true);
        }
      } else {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          total[b].template add_term<false>(part[b], Wide{1}, false);
        }
      }
    }
    if (__popc(terms.all) != 1) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        part[b] = total[b].rounded();
      }
    }
    sink(piece, part);
  }
  copy_wait<0>();
}

}  // namespace ep::cuda
