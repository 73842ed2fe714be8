// Just enough of CUDA to run the kernels of torch_ep/csrc on a CPU: slowly, but where there is no GPU.
//
// A thread block is a thread of the operating system, and each of its CUDA threads a fiber in it. So blocks run side by
// side, and shared memory is thread-local. A row of a grid is a rank, whose kernels follow each other as if in a stream
// of its own. A fiber yields where it waits for others: at barriers, at warp-collective operations, and whenever it
// polls a word that others write. Bulk and asynchronous copies are done at once, or as late as the waits for them
// allow, at random: this finds what is published, read or overwritten too early. It does not find what a weaker memory
// model would do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 227 * 1024;

// Whether the environment selects this planted fault (FAULTS of test_emulator.py).
inline const int planted_fault =
    std::getenv("EMULATOR_FAULT") != nullptr ? std::atoi(std::getenv("EMULATOR_FAULT")) : -1;
inline bool is_planted(int number) {
  return number == planted_fault;
}

struct Warp {
  uint64_t value[2][kWarp];
  int arrived = 0;
  unsigned generation = 0;
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  bool all = true, result = true;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;

  void run() const { std::memcpy(to, from, bytes); }
};

// Copies of a fiber that are waited for together.
struct Group {
  std::vector<Copy> copies;
  std::vector<char> data;  // once what is copied has been read
  bool is_read = false;

  void read() {
    for (const Copy& copy : copies) {
      const auto* from = static_cast<const char*>(copy.from);
      data.insert(data.end(), from, from + copy.bytes);
    }
    is_read = true;
  }
  void write() {
    if (!is_read) {
      read();
    }
    const char* from = data.data();
    for (const Copy& copy : copies) {
      std::memcpy(copy.to, from, copy.bytes);
      from += copy.bytes;
    }
  }
};

// Of one kind, the oldest first; the last one is still to be committed.
class Groups {
 public:
  void add(const Copy& copy) { open_.copies.push_back(copy); }
  void commit() {
    groups_.push_back(std::move(open_));
    open_ = {};
  }
  // All but the last `pending`.
  void read(size_t pending) {
    for (size_t i = 0; i + pending < groups_.size(); ++i) {
      if (!groups_[i].is_read) {
        groups_[i].read();
      }
    }
  }
  void write(size_t pending) {
    for (; groups_.size() > pending; groups_.pop_front()) {
      groups_.front().write();
    }
  }
  // At the end of the fiber.
  bool all_read() const {
    return open_.copies.empty() &&
           std::all_of(groups_.begin(), groups_.end(), [](const Group& g) { return g.is_read || g.copies.empty(); });
  }

 private:
  Group open_;
  std::deque<Group> groups_;
};

// Stacks are reused: mapping and faulting in new ones takes longer than most of what runs on them.
class Stacks {
 public:
  std::unique_ptr<char[]> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
      return std::unique_ptr<char[]>(new char[kStackBytes]);
    }
    auto stack = std::move(free_.back());
    free_.pop_back();
    return stack;
  }
  void give_back(std::unique_ptr<char[]> stack) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(stack));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<char[]>> free_;
};
inline Stacks stacks;

// A bulk copy into shared memory, and the barrier that counts its bytes.
struct Load {
  Copy copy;
  uint64_t* barrier;
};

struct Fiber {
  ucontext_t context;  // of its beginning
  jmp_buf at;          // where it gave way: unlike swapcontext, this makes no system call
  std::unique_ptr<char[]> stack;
  uint3 thread_idx;
  bool has_begun = false, done = false;
  Groups stores, loads;  // bulk copies out of shared memory; asynchronous copies of 16 bytes
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier, named[16];
  std::vector<char> shared;
  std::vector<Load> bulk_loads;  // that are still to be done
  std::minstd_rand random;
  std::function<void()> body;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  uint3 block_idx;
  dim3 grid_dim, block_dim;
};

inline thread_local Block* block = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline void yield() {
  if (_setjmp(block->current->at) == 0) {
    _longjmp(block->scheduler, 1);
  }
}

// Whether a copy waits until it must be done.
inline bool is_late() {
  return (block->random() >> 8) % 2 != 0;
}

inline void run_fiber() {
  block->body();
  Fiber& fiber = *block->current;
  if (!fiber.stores.all_read() || !fiber.loads.all_read()) {
    fail("a thread ended before its copies had been read");
  }
  fiber.stores.write(0);
  fiber.done = true;
  yield();
}

inline int thread() {
  return static_cast<int>(block->current->thread_idx.x);
}
inline int lane() {
  return thread() % kWarp;
}

// The values of all lanes; they stay until the warp's operation after the next.
inline const uint64_t* exchange(uint64_t mine) {
  Warp& warp = block->warps[thread() / kWarp];
  const unsigned generation = warp.generation;
  uint64_t* values = warp.value[generation % 2];
  values[lane()] = mine;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == generation) {
      yield();
    }
  }
  return values;
}

inline bool meet(Barrier& barrier, int count, bool value = true) {
  const unsigned generation = barrier.generation;
  barrier.all = barrier.all && value;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.result = barrier.all;
    barrier.all = true;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) {
      yield();
    }
  }
  return barrier.result;
}

inline void run_block(const std::function<void()>& body, uint3 index, dim3 grid, dim3 threads, size_t shared) {
  Block own;
  block = &own;
  own.body = body;
  own.block_idx = index;
  static std::atomic<unsigned> seed{1};
  own.random.seed(seed++);
  own.grid_dim = grid;
  own.block_dim = threads;
  own.fibers.resize(threads.x);
  own.warps.resize(threads.x / kWarp);
  own.shared.assign(kSharedBytes + 128, static_cast<char>(0xcd));
  if (shared > kSharedBytes || threads.x % kWarp != 0) {
    fail("launch out of bounds");
  }
  for (unsigned i = 0; i < threads.x; ++i) {
    Fiber& fiber = own.fibers[i];
    fiber.stack = stacks.take();
    fiber.thread_idx = {i, 0, 0};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (size_t left = own.fibers.size(); left > 0;) {
    for (Fiber& fiber : own.fibers) {
      if (!fiber.done) {
        own.current = &fiber;
        if (_setjmp(own.scheduler) == 0) {
          if (fiber.has_begun) {
            _longjmp(fiber.at, 1);
          }
          fiber.has_begun = true;
          setcontext(&fiber.context);
        }
        if (own.current->done) {
          stacks.give_back(std::move(own.current->stack));
          --left;
        }
      }
    }
    std::this_thread::yield();
  }
  if (!own.bulk_loads.empty()) {
    fail("a block ended before what was to arrive in its memory");
  }
  block = nullptr;
}

// Kernels in each row of a grid, a rank, run one after another. Rows run side by side, so a rank may be some kernels
// ahead.
class Device {
 public:
  void launch(unsigned row, std::function<void()> kernel) {
    std::thread& last = last_[row];
    last = std::thread([before = std::move(last), kernel = std::move(kernel), late = random_() % 8 == 0]() mutable {
      if (before.joinable()) {
        before.join();
      }
      if (late) {
        std::this_thread::sleep_for(kDelay);
      }
      kernel();
    });
  }
  void synchronize() {
    for (auto& [row, last] : last_) {
      if (last.joinable()) {
        last.join();
      }
    }
  }

 private:
  static constexpr std::chrono::milliseconds kDelay{20};  // as long as some kernels take
  std::map<unsigned, std::thread> last_;
  std::minstd_rand random_;
};
inline Device device;

template <class Body>
void launch(const Body& body, dim3 grid, dim3 threads, size_t shared = 0, cudaStream_t = nullptr) {
  for (unsigned y = 0; y < grid.y; ++y) {
    device.launch(y, [=] {
      std::vector<std::thread> blocks;
      for (unsigned x = 0; x < grid.x; ++x) {
        blocks.emplace_back([&, x] { run_block(body, {x, y, 0}, grid, threads, shared); });
      }
      for (auto& b : blocks) {
        b.join();
      }
    });
  }
}

inline char* shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(block->shared.data());
  return reinterpret_cast<char*>((address + 127) / 128 * 128);
}

inline void named_barrier(int id, int count) {
  meet(block->named[id], count);
}

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#undef __device__
#undef __host__
#undef __global__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __device__
#define __host__
#define __global__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (emulator::block->current->thread_idx)
#define blockIdx (emulator::block->block_idx)
#define gridDim (emulator::block->grid_dim)
#define blockDim (emulator::block->block_dim)

using std::max;
using std::min;

inline void __syncthreads() {
  emulator::meet(emulator::block->barrier, static_cast<int>(blockDim.x));
}
inline int __syncthreads_and(int value) {
  return emulator::meet(emulator::block->barrier, static_cast<int>(blockDim.x), value != 0);
}
inline int __syncthreads_or(int value) {
  return !__syncthreads_and(value == 0);
}
inline void __syncwarp() {
  emulator::exchange(0);
}
inline void __threadfence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
}
inline void __threadfence_system() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::unpack<T>(emulator::exchange(emulator::pack(value))[source % emulator::kWarp]);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  const uint64_t* values = emulator::exchange(emulator::pack(value));
  return emulator::lane() < step ? value : emulator::unpack<T>(values[emulator::lane() - step]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::unpack<T>(emulator::exchange(emulator::pack(value))[emulator::lane() ^ mask]);
}
inline unsigned __ballot_sync(unsigned, int value) {
  const uint64_t* values = emulator::exchange(value != 0);
  unsigned mask = 0;
  for (int i = 0; i < emulator::kWarp; ++i) {
    mask |= static_cast<unsigned>(values[i]) << i;
  }
  return mask;
}
inline int __any_sync(unsigned mask, int value) {
  return __ballot_sync(mask, value) != 0;
}
inline int __all_sync(unsigned mask, int value) {
  return __ballot_sync(mask, value) == 0xffffffff;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a & 0xffff, b & 0xffff) | std::max(a >> 16, b >> 16) << 16;
}
inline unsigned __match_any_sync(unsigned, int value) {
  const uint64_t* values = emulator::exchange(emulator::pack(value));
  unsigned mask = 0;
  for (int i = 0; i < emulator::kWarp; ++i) {
    mask |= static_cast<unsigned>(values[i] == emulator::pack(value)) << i;
  }
  return mask;
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  const uint64_t* values = emulator::exchange(value);
  unsigned sum = 0;
  for (int i = 0; i < emulator::kWarp; ++i) {
    sum += static_cast<unsigned>(values[i]);
  }
  return sum;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const uint64_t* values = emulator::exchange(value);
  unsigned most = 0;
  for (int i = 0; i < emulator::kWarp; ++i) {
    most = std::max(most, static_cast<unsigned>(values[i]));
  }
  return most;
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  const uint64_t* values = emulator::exchange(value);
  unsigned all = 0;
  for (int i = 0; i < emulator::kWarp; ++i) {
    all |= static_cast<unsigned>(values[i]);
  }
  return all;
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}

template <class T, class U>
T atomicAdd(T* p, U value) {
  return std::atomic_ref<T>(*p).fetch_add(static_cast<T>(value));
}
template <class T, class U>
T atomicOr(T* p, U value) {
  return std::atomic_ref<T>(*p).fetch_or(static_cast<T>(value));
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  std::atomic_ref<T>(*p).compare_exchange_strong(expected, value);
  return expected;
}
template <class T, class U>
T atomicMin(T* p, U value) {
  std::atomic_ref<T> word(*p);
  T old = word.load();
  while (static_cast<T>(value) < old && !word.compare_exchange_weak(old, static_cast<T>(value))) {
  }
  return old;
}
template <class T, class U>
T atomicMax(T* p, U value) {
  std::atomic_ref<T> word(*p);
  T old = word.load();
  while (static_cast<T>(value) > old && !word.compare_exchange_weak(old, static_cast<T>(value))) {
  }
  return old;
}

// Without contraction (-ffp-contract=off) these are what the operators do.
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline uint32_t __float_as_uint(float v) {
  return emulator::unpack<uint32_t>(emulator::pack(v));
}
inline float __uint_as_float(uint32_t v) {
  return emulator::unpack<float>(v);
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}

// --- the host's part: "device" memory is the host's, filled with a pattern ---

extern "C" {
cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*p, 0xab, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  emulator::device.synchronize();
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  return cudaMalloc(p, bytes);
}
cudaError_t cudaFreeHost(void* p) {
  return cudaFree(p);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (kind != cudaMemcpyHostToDevice) {
    emulator::device.synchronize();
  }
  if (bytes != 0) {
    std::memcpy(to, from, bytes);
  }
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  emulator::device.synchronize();
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
  return "an error of the emulator";
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1000;
  return cudaSuccess;
}
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
