// Access to symmetric memory. Peer writes into a peer's buffer: it puts bytes, puts self-contained words and packets,
// and signals. Inbox reads this rank's own buffer. No kernel computes with the address of a peer's memory.
//
// Both take offsets in the symmetric buffer (layout.h), which are the same on every rank.
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
  // One thread. A self-contained word: its reader can distinguish it from an older one, so it needs no signal.
  __device__ __forceinline__ void put_word(int64_t offset, uint64_t word) const {
    store_relaxed_system(buffer_ + offset, word);
  }
  // One thread. Sixteen bytes, written as one: Note [LL packets].
  __device__ __forceinline__ void put_packet(int64_t offset, const uint4& packet) const {
    store_relaxed_system_16(buffer_ + offset, packet);
  }
  // One thread. Publishes all stores before it: those of this thread, and those of other threads before a barrier.
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

// This rank's own symmetric buffer.
class Inbox {
 public:
  __device__ __forceinline__ explicit Inbox(const char* buffer) : buffer_(buffer) {}

  // One thread. Acquires the data that the signal publishes. Bulk copies of that data need fence_async_global too.
  __device__ __forceinline__ uint64_t poll_signal(int64_t offset) const {
    return load_acquire_system(buffer_ + offset);
  }
  // One thread. A self-contained word, or a word that a signal has published.
  __device__ __forceinline__ uint64_t poll_word(int64_t offset) const { return load_relaxed_system(buffer_ + offset); }
  // One thread.
  __device__ __forceinline__ uint4 poll_packet(int64_t offset) const {
    return load_relaxed_system_16(buffer_ + offset);
  }
  // The address of published bytes.
  __device__ __forceinline__ const char* data(int64_t offset) const { return buffer_ + offset; }

 private:
  const char* buffer_;
};

}  // namespace ep::nvlink
