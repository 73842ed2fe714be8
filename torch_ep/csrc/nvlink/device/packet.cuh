// Rows in packets: Note [LL packets] in layout.h.
#pragma once

#include "nvlink/device/exchange.cuh"

namespace ep::nvlink {

struct LanePayload {
  uint4 vectors[kVectorsPerLane];
};

// The vectors of 16 bytes that this lane handles in a chunk: every step-th, so that neighboring lanes have neighboring
// vectors. The step is a multiple of a group of channels. `vectors`: of the whole row.
class LaneVectors {
 public:
  __device__ __forceinline__ LaneVectors(int chunk, int vectors) {
    const int begin = chunk * kChunkVectors, lane = lane_id();
    end_ = min(begin + kChunkVectors, vectors);
    constexpr int kRound = kVectorsPerLane * kGroupVectors;
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

// One thread. Zeros where the row at `from` has no vectors.
__device__ __forceinline__ LanePayload load_payload(const char* from, const LaneVectors& v) {
  LanePayload u;
#pragma unroll
  for (int i = 0; i < kVectorsPerLane; ++i) {
    u.vectors[i] = v.has(i) ? reinterpret_cast<const uint4*>(from)[v.at(i)] : uint4{0, 0, 0, 0};
  }
  return u;
}

// One thread. Stores only the vectors that the row at `to` has.
__device__ __forceinline__ void store_payload(char* to, const LanePayload& u, const LaneVectors& v) {
#pragma unroll
  for (int i = 0; i < kVectorsPerLane; ++i) {
    if (v.has(i)) {
      reinterpret_cast<uint4*>(to)[v.at(i)] = u.vectors[i];
    }
  }
}

// One thread. Keeps a value that is stored more than once in its own registers. Otherwise the compiler assembles it
// again for every store, which then waits for the previous store.
__device__ __forceinline__ void keep_together(uint4& v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}

// One thread. The offset of this lane's first packet of a chunk in a row.
__device__ __forceinline__ int64_t packet_offset(int chunk) {
  return int64_t{chunk} * kChunkBytes + lane_id() * kPacketBytes;
}
constexpr int kPacketStride = kLanesPerChunk * kPacketBytes;  // between the packets of a lane

// One thread's LanePayload in packets. It has `arrived` once every packet holds the number of the exchange.
struct Packets {
  uint4 packets[kPacketsPerLane];

  Packets() = default;
  __device__ __forceinline__ Packets(const LanePayload& u, uint32_t number) {
    const uint4 &a = u.vectors[0], &b = u.vectors[1], &c = u.vectors[2];
    packets[0] = {a.x, a.y, a.z, number};
    packets[1] = {a.w, b.x, b.y, number};
    // fault: low latency: contents of a packet
    packets[2] = {b.z, b.w, c.x, number};
    packets[3] = {c.y, c.z, c.w, number};
  }

  __device__ __forceinline__ void send(const Peer& peer, int64_t offset) const {
#pragma unroll
    for (int i = 0; i < kPacketsPerLane; ++i) {
      peer.put_packet(offset + i * kPacketStride, packets[i]);
    }
  }
  __device__ __forceinline__ void poll(const Inbox& inbox, int64_t offset) {
#pragma unroll
    for (int i = 0; i < kPacketsPerLane; ++i) {
      packets[i] = inbox.poll_packet(offset + i * kPacketStride);
    }
  }
  __device__ __forceinline__ bool arrived(uint32_t number) const {
    return packets[0].w == number && packets[1].w == number && packets[2].w == number && packets[3].w == number;
  }
  __device__ __forceinline__ LanePayload payload() const {
    const uint4 &a = packets[0], &b = packets[1], &c = packets[2], &d = packets[3];
    return {{{a.x, a.y, a.z, b.x}, {b.y, b.z, c.x, c.y}, {c.z, d.x, d.y, d.z}}};
  }
};

}  // namespace ep::nvlink
