// Units of rows on their way in packs: Note [Packed rows] in layout.h.
#pragma once

#include "exchange.cuh"

namespace ep::cuda {

struct Unit {
  uint4 vectors[kUnitVectors];
};

// Unit `unit` of the `vectors` of 16 bytes that begin at `from`; zeros beyond them.
__device__ __forceinline__ Unit load_unit(const char* from, int unit, int vectors) {
  Unit u;
#pragma unroll
  for (int i = 0; i < kUnitVectors; ++i) {
    const int v = unit * kUnitVectors + i;
    u.vectors[i] = v < vectors ? reinterpret_cast<const uint4*>(from)[v] : uint4{0, 0, 0, 0};
  }
  return u;
}

__device__ __forceinline__ int64_t offset_of_unit(int unit) {
  return int64_t{unit / kUnitsAChunk} * kChunkBytes + unit % kUnitsAChunk * kPackBytes;
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
