// Units of rows on their way in packs: Note [Packed rows] in layout.h.
#pragma once

#include "exchange.cuh"

namespace ep::cuda {

struct Unit {
  uint4 vectors[kUnitVectors];
};

// Which vectors of 16 bytes of a row of `vectors` are in this lane's unit of a chunk: every step-th, so that lanes next to
// each other have vectors next to each other. Steps are of whole groups of channels.
class UnitVectors {
 public:
  __device__ __forceinline__ UnitVectors(int chunk, int vectors) {
    const int begin = chunk * kChunkVectors, lane = lane_id();
    end_ = min(begin + kChunkVectors, vectors);
    constexpr int kRound = kUnitVectors * kGroupVectors;
    step_ = (max(end_ - begin, 0) + kRound - 1) / kRound * kGroupVectors;
    first_ = lane < step_ ? begin + lane : end_;
    is_whole_ = end_ - begin == kChunkVectors;
  }

  __device__ __forceinline__ bool any() const { return first_ < end_; }
  __device__ __forceinline__ bool has(int i) const { return at(i) < end_; }
  __device__ __forceinline__ int at(int i) const { return first_ + i * step_; }
  __device__ __forceinline__ int step() const { return step_; }

  // Calls f(i, vector) for each, `row` being where the row is. Of a whole chunk, all from one address.
  template <class Vector, class F>
  __device__ __forceinline__ void each(Vector* row, const F& f) const {
    Vector* first = row + first_;
#pragma unroll
    for (int i = 0; i < kUnitVectors; ++i) {
      if (is_whole_) {
        f(i, first[i * kUnitsAChunk]);
      } else if (has(i)) {
        f(i, row[at(i)]);
      }
    }
  }

 private:
  int first_, step_, end_;
  bool is_whole_;
};

// Of the row at `from`; zeros where it has no vectors.
__device__ __forceinline__ Unit load_unit(const char* from, const UnitVectors& v) {
  Unit u{};
  v.each(reinterpret_cast<const uint4*>(from), [&](int i, const uint4& vector) { u.vectors[i] = vector; });
  return u;
}

__device__ __forceinline__ void store_unit(char* to, const Unit& u, const UnitVectors& v) {
  v.each(reinterpret_cast<uint4*>(to), [&](int i, uint4& vector) { vector = u.vectors[i]; });
}

// Of this lane's.
__device__ __forceinline__ int64_t offset_of_unit(int chunk) {
  return int64_t{chunk} * kChunkBytes + lane_id() * kPackBytes;
}
constexpr int kPackStride = kUnitsAChunk * kPackBytes;  // from one pack of a unit to the next

__device__ __forceinline__ void send_unit(char* to, const Unit& u, uint32_t number) {
  const uint4 &a = u.vectors[0], &b = u.vectors[1], &c = u.vectors[2];
  store_relaxed_system_16(to, {a.x, a.y, a.z, number});
  store_relaxed_system_16(to + kPackStride, {a.w, b.x, b.y, number});
  store_relaxed_system_16(to + 2 * kPackStride, {b.z, b.w, c.x, number});
  store_relaxed_system_16(to + 3 * kPackStride, {c.y, c.z, c.w, number});
}

// A look at a unit on its way; `arrived` once all of it is there.
struct Packs {
  uint4 packs[kUnitPacks];

  __device__ __forceinline__ void look(const char* from) {
#pragma unroll
    for (int i = 0; i < kUnitPacks; ++i) {
      packs[i] = load_relaxed_system_16(from + i * kPackStride);
    }
  }
  __device__ __forceinline__ bool arrived(uint32_t number) const {
    return packs[0].w == number && packs[1].w == number && packs[2].w == number && packs[3].w == number;
  }
  __device__ __forceinline__ Unit unit() const {
    const uint4 &a = packs[0], &b = packs[1], &c = packs[2], &d = packs[3];
    return {{{a.x, a.y, a.z, b.x}, {b.y, b.z, c.x, c.y}, {c.z, d.x, d.y, d.z}}};
  }
};

}  // namespace ep::cuda
