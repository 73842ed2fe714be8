// What a rank does to a peer: put bytes, put words that are complete in themselves, signal. And the own buffer, where
// what peers put arrives. No kernel computes with the address of a peer's memory.
//
// Both sides name a place by its offset in the symmetric buffer (layout.h), which is the same in every rank's.
#pragma once

#include "nvlink/device/memory.cuh"

namespace ep::nvlink {

class Peer {
 public:
  Peer() = default;
  __device__ __forceinline__ explicit Peer(char* buffer) : buffer_(buffer) {}

  // One thread. Starts a bulk copy out of shared memory; bulk_commit and bulk_wait of this thread complete it.
  __device__ __forceinline__ void put(int64_t offset, const void* shared, int bytes) const {
    bulk_store(buffer_ + offset, shared, bytes);
  }
  // One thread. A plain store of the lowest 2, 4 or 8 bytes of a value, which a later signal publishes.
  __device__ __forceinline__ void put_value(int64_t offset, uint64_t value, int bytes) const {
    char* to = buffer_ + offset;
    if (bytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(value);
    } else if (bytes == 8) {
      *reinterpret_cast<uint64_t*>(to) = value;
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(value);
    }
  }
  // One thread. A word that its reader can tell from an older one: it needs no signal.
  __device__ __forceinline__ void put_word(int64_t offset, uint64_t word) const {
    store_relaxed_system(buffer_ + offset, word);
  }
  // One thread. Sixteen bytes, written as one: Note [LL packets].
  __device__ __forceinline__ void put_packet(int64_t offset, const uint4& packet) const {
    store_relaxed_system_16(buffer_ + offset, packet);
  }
  // One thread. Publishes what is ordered before it: stores of this thread, and of others before a barrier.
  __device__ __forceinline__ void signal(int64_t offset, uint64_t word) const {
    store_release_system(buffer_ + offset, word);
  }
  // One thread. Publishes the bulk copies of this thread that bulk_wait has seen complete.
  __device__ __forceinline__ void signal_copies(int64_t offset, uint64_t word) const {
    fence_async_global();
    signal(offset, word);
  }

 private:
  char* buffer_ = nullptr;
};

// The own symmetric buffer.
class Inbox {
 public:
  __device__ __forceinline__ explicit Inbox(const char* buffer) : buffer_(buffer) {}

  // One thread. Acquires what the signal publishes. Bulk copies of it need fence_async_global too.
  __device__ __forceinline__ uint64_t poll_signal(int64_t offset) const {
    return load_acquire_system(buffer_ + offset);
  }
  // One thread. A word that is complete in itself, or one that a signal has published.
  __device__ __forceinline__ uint64_t poll_word(int64_t offset) const { return load_relaxed_system(buffer_ + offset); }
  __device__ __forceinline__ uint4 poll_packet(int64_t offset) const {
    return load_relaxed_system_16(buffer_ + offset);
  }
  // Where published bytes are.
  __device__ __forceinline__ const char* data(int64_t offset) const { return buffer_ + offset; }

 private:
  const char* buffer_;
};

}  // namespace ep::nvlink
