// Units of rows on their way in packs: Note [Packed rows] in layout.h.
#pragma once

#include "nvlink/device/exchange.cuh"

namespace ep::nvlink {

struct Unit {
  uint4 vectors[kUnitVectors];
};

// Which vectors of 16 bytes of a row of `vectors` are in this lane's unit of a chunk: every step-th, so that lanes next
// to each other have vectors next to each other. Steps are of whole groups of channels.
class UnitVectors {
 public:
  __device__ __forceinline__ UnitVectors(int chunk, int vectors) {
    const int begin = chunk * kChunkVectors, lane = lane_id();
    end_ = min(begin + kChunkVectors, vectors);
    constexpr int kRound = kUnitVectors * kGroupVectors;
    step_ = (max(end_ - begin, 0) + kRound - 1) / kRound * kGroupVectors;
    first_ = lane < step_ ? begin + lane : end_;
  }

  __device__ __forceinline__ bool any() const { return first_ < end_; }
  __device__ __forceinline__ bool has(int i) const { return at(i) < end_; }
  __device__ __forceinline__ int at(int i) const { return first_ + i * step_; }
  __device__ __forceinline__ int step() const { return step_; }

 private:
  int first_, step_, end_;
};

// Of the row at `from`; zeros where it has no vectors.
__device__ __forceinline__ Unit load_unit(const char* from, const UnitVectors& v) {
  Unit u;
#pragma unroll
  for (int i = 0; i < kUnitVectors; ++i) {
    u.vectors[i] = v.has(i) ? reinterpret_cast<const uint4*>(from)[v.at(i)] : uint4{0, 0, 0, 0};
  }
  return u;
}

__device__ __forceinline__ void store_unit(char* to, const Unit& u, const UnitVectors& v) {
#pragma unroll
  for (int i = 0; i < kUnitVectors; ++i) {
    if (v.has(i)) {
      reinterpret_cast<uint4*>(to)[v.at(i)] = u.vectors[i];
    }
  }
}

// What is stored more than once is put together once, in registers that nothing else is put into meanwhile: to do so
// for each store would be to wait for the one before.
__device__ __forceinline__ void keep_together(uint4& v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}

// Of this lane's.
__device__ __forceinline__ int64_t offset_of_unit(int chunk) {
  return int64_t{chunk} * kChunkBytes + lane_id() * kPackBytes;
}
constexpr int kPackStride = kUnitsAChunk * kPackBytes;  // from one pack of a unit to the next

// A unit on its way; `arrived` once all of it is there.
struct Packs {
  uint4 packs[kUnitPacks];

  Packs() = default;
  __device__ __forceinline__ Packs(const Unit& u, uint32_t number) {
    const uint4 &a = u.vectors[0], &b = u.vectors[1], &c = u.vectors[2];
    packs[0] = {a.x, a.y, a.z, number};
    packs[1] = {a.w, b.x, b.y, number};
    // fault: low latency: contents of a packet
    packs[2] = {b.z, b.w, c.x, number};
    packs[3] = {c.y, c.z, c.w, number};
  }

  __device__ __forceinline__ void send(char* to) const {
#pragma unroll
    for (int i = 0; i < kUnitPacks; ++i) {
      store_relaxed_system_16(to + i * kPackStride, packs[i]);
    }
  }
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

}  // namespace ep::nvlink
