// Stands in for torch_ep/csrc/nvlink/device/memory.cuh under the emulator: the same functions.
#pragma once

#include <cstdint>

namespace ep::nvlink {

template <class T>
T load_word(const void* p) {
  return emulator::poll(static_cast<const volatile T*>(p));
}
template <class T>
void store_word(void* p, T v) {
  *static_cast<volatile T*>(p) = v;
  emulator::has_written(p);
  emulator::may_interrupt();
}

inline uint64_t load_acquire_system(const void* p) {
  return load_word<uint64_t>(p);
}
inline uint64_t load_relaxed_system(const void* p) {
  return load_word<uint64_t>(p);
}
inline uint32_t load_acquire_device(const uint32_t* p) {
  return load_word<uint32_t>(p);
}

inline void store_release_system(void* p, uint64_t v) {
  store_word(p, v);
}
inline void store_relaxed_system(void* p, uint64_t v) {
  store_release_system(p, v);
}

inline uint4 load_relaxed_system_16(const void* p) {
  return emulator::poll(static_cast<const uint4*>(p));
}
inline void store_relaxed_system_16(void* p, const uint4& v) {
  *static_cast<uint4*>(p) = v;
  emulator::has_written(p);
  emulator::may_interrupt();
}

inline void fence_system() {
  __threadfence_system();
}

inline void add_release_device(uint32_t* p, uint32_t v) {
  atomicAdd(p, v);
}
inline void add_relaxed_device(uint64_t* p, uint64_t v) {
  atomicAdd(p, v);
}
inline uint32_t fetch_add_acq_rel_device(uint32_t* p, uint32_t v) {
  return atomicAdd(p, v);
}

// A copy that the hardware would refuse ends the program.
inline void check_copy(const void* a, const void* b, uint32_t bytes) {
  if ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | bytes) % 16 != 0 || bytes == 0) {
    emulator::fail("copy of an odd size or address");
  }
}

template <int kOffset>
void copy_async_if(bool copies, void* shared, const void* global) {
  if (copies) {
    const emulator::Copy copy{static_cast<char*>(shared) + kOffset, static_cast<const char*>(global) + kOffset, 16};
    check_copy(copy.to, copy.from, copy.bytes);
    if (emulator::is_late()) {
      emulator::this_fiber->loads.add(copy);
    } else {
      copy.run();
    }
  }
}
inline void copy_commit() {
  emulator::this_fiber->loads.commit();
}
template <int kPending>
void copy_wait() {
  emulator::this_fiber->loads.write(kPending);
}

// Counts phases: a phase ends when as many bytes have come as were expected.
inline void barrier_init(uint64_t* barrier) {
  *barrier = 0;
}
inline void fence_barrier_init() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  // Low half: bytes still to come; high half: phases that have ended.
  *barrier += bytes;
  if (bytes == 0) {
    *barrier += uint64_t{1} << 32;
    emulator::has_written(barrier);
  }
}
inline void complete(const emulator::Load& load) {
  load.copy.run();
  uint64_t& barrier = *load.barrier;
  if ((barrier & 0xffffffff) < load.copy.bytes) {
    emulator::fail("bulk_load of more bytes than were expected");
  }
  barrier -= load.copy.bytes;
  if ((barrier & 0xffffffff) == 0) {
    barrier += uint64_t{1} << 32;
    emulator::has_written(&barrier);
  }
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while ((emulator::poll(static_cast<volatile uint64_t*>(barrier)) >> 32) % 2 == parity) {
    auto& loads = emulator::this_block->bulk_loads;
    const auto found = std::find_if(loads.begin(), loads.end(), [&](const auto& l) { return l.barrier == barrier; });
    if (found != loads.end()) {
      complete(*found);
      loads.erase(found);
    }
  }
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_copy(shared, global, bytes);
  const emulator::Load load{{shared, global, bytes}, barrier};
  if (emulator::is_late()) {
    emulator::this_block->bulk_loads.push_back(load);
  } else {
    complete(load);
  }
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  check_copy(shared, global, bytes);
  const emulator::Copy copy{global, shared, bytes};
  if (emulator::is_late()) {
    emulator::this_fiber->stores.add(copy);
  } else {
    copy.run();
  }
}
inline void bulk_commit() {
  emulator::this_fiber->stores.commit();
}
template <int kPending>
void bulk_wait_read() {
  emulator::this_fiber->stores.read(kPending);
}
template <int kPending>
void bulk_wait() {
  emulator::this_fiber->stores.write(kPending);
}
inline void fence_async_shared() {}
inline void fence_async_global() {
  __threadfence_system();
}

inline uint64_t global_timer_ns() {
  return emulator::scheduler.now_ns();
}

}  // namespace ep::nvlink
