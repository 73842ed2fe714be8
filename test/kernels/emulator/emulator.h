// Just enough of CUDA to run the kernels of torch_ep/csrc on a CPU: slowly, but where there is no GPU.
//
// Each CUDA thread is a fiber, and all fibers share one thread of the operating system. A row of a grid is a rank,
// whose kernels follow each other as if in a stream of its own.
//
// Note [Scheduler]
// The unit of scheduling is a warp: its lanes run, one after another, until each of them waits. Which warp of which
// block of which rank comes next is random, but the same in every run of a program. The scheduler also
//   - interrupts a warp at warp-collective operations and where it reads or writes words that others write, at random;
//   - holds back some kernels, blocks and warps, at random, until everything else waits for them: so a rank may be as
//     far ahead of the others as the protocol allows, or some kernels ahead of them.
// A lane that polls a word and finds what it found before sleeps until something writes a word that it has polled.
// Time passes only while everything sleeps, in steps that grow. So a timeout takes no time, and a busy machine causes
// none. What wakes nobody, such as an ordinary store to a polled word, is seen after the next step.
//
// Bulk and asynchronous copies are done at once, or as late as the waits for them allow, at random: this finds what is
// published, read or overwritten too early. It does not find what a weaker memory model would do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <type_traits>
#include <unordered_map>
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
    if (groups_.size() > pending) {
      const auto end = groups_.end() - static_cast<ptrdiff_t>(pending);
      std::for_each(groups_.begin(), end, [](Group& group) { group.write(); });
      groups_.erase(groups_.begin(), end);
    }
  }
  // At the end of the fiber.
  bool all_read() const {
    return open_.copies.empty() &&
           std::all_of(groups_.begin(), groups_.end(), [](const Group& g) { return g.is_read || g.copies.empty(); });
  }

 private:
  Group open_;
  std::vector<Group> groups_;
};

// A bulk copy into shared memory, and the barrier that counts its bytes.
struct Load {
  Copy copy;
  uint64_t* barrier;
};

struct Block;
struct Warp;

// A word that a fiber has polled, and what it found.
struct Polled {
  const void* word = nullptr;
  std::array<uint64_t, 2> value{};
};

struct Fiber {
  void* stack_pointer = nullptr;  // while another one runs
  uint3 thread_idx{};
  Groups stores, loads;        // bulk copies out of shared memory; asynchronous copies of 16 bytes
  std::vector<Polled> polled;  // since a word changed
};

struct Warp {
  Block* block = nullptr;
  Fiber* fibers = nullptr;
  char* stacks = nullptr;
  // One bit per lane: can run; wait in a warp-collective operation; sleep until a word changes. Others wait at a
  // barrier, or have ended.
  uint32_t ready = 0xffffffff, exchanging = 0, asleep = 0;
  int lane = kWarp - 1;    // that ran last
  bool is_queued = false;  // or runs
  // Warp-collective operations.
  uint64_t value[2][kWarp];
  uint32_t odd[2];  // lanes whose value is odd
  int arrived = 0;
  unsigned generation = 0;
};

struct Barrier {
  int arrived = 0;
  bool all = true, result = true;
  std::vector<std::pair<Warp*, uint32_t>> waiting;  // warps, and their lanes
};

struct Kernel {
  unsigned row;
  std::function<void()> body;
  dim3 grid, threads;
  size_t shared;
  unsigned blocks_left;
};

struct Block {
  std::shared_ptr<Kernel> kernel;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned fibers_left;
  Barrier barrier, named[16];
  std::vector<char> shared;
  std::vector<std::pair<const void*, std::unique_ptr<char[]>>> variables;  // in shared memory, by key
  std::vector<Load> bulk_loads;                                            // that are still to be done
  uint3 block_idx;
  dim3 grid_dim, block_dim;
};

inline Block* this_block = nullptr;
inline Warp* this_warp = nullptr;
inline Fiber* this_fiber = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

// Pushes the registers that a function must keep and continues on another stack. x86-64 only. Unlike swapcontext, this
// makes no system call.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
.popsection
)");

void run_fiber();

// The stacks of a warp. They are reused: mapping and faulting in new ones takes longer than most of what runs on them.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) {
      constexpr int kProtection = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* stacks = mmap(nullptr, kWarp * kStackBytes, kProtection, kFlags, -1, 0);
      if (stacks == MAP_FAILED) {
        fail("no memory for stacks");
      }
      madvise(stacks, kWarp * kStackBytes, MADV_NOHUGEPAGE);
      return static_cast<char*>(stacks);
    }
    char* stacks = free_.back();
    free_.pop_back();
    return stacks;
  }
  void give_back(char* stacks) { free_.push_back(stacks); }

  // The stack pointer with which a lane begins.
  static void* prepare(char* stacks, int lane) {
    // Lanes' stacks begin at different distances from a page: otherwise they would share a few sets of the cache.
    constexpr size_t kApart = 576;  // bytes; more than what a lane uses between two waits, mostly
    char* top = stacks + (static_cast<size_t>(lane) + 1) * kStackBytes - lane * kApart;
    void** words = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) / 64 * 64);
    *--words = nullptr;
    *--words = reinterpret_cast<void*>(run_fiber);
    return words - 6;  // registers
  }

 private:
  std::vector<char*> free_;
};

class Scheduler {
 public:
  // --- the host ---

  void launch(unsigned row, std::function<void()> body, dim3 grid, dim3 threads, size_t shared) {
    if (shared > kSharedBytes || threads.x % kWarp != 0) {
      fail("launch out of bounds");
    }
    auto kernel = std::make_shared<Kernel>(row, std::move(body), grid, threads, shared, grid.x);
    auto& queue = rows_[row];
    queue.push_back(kernel);
    if (queue.size() == 1) {
      begin_kernel(kernel);
    }
  }

  // Runs until nothing is left.
  void synchronize() {
    while (true) {
      if (!runnable_.empty()) {
        Warp* warp = take_any(runnable_);
        run(*warp);
      } else if (!held_back_.empty()) {
        runnable_.push_back(take_any(held_back_));
      } else if (!late_.empty()) {
        take_any(late_)();
      } else if (!blocks_.empty()) {
        let_time_pass();
      } else {
        return;
      }
    }
  }

  // --- fibers ---

  // Runs another fiber of the warp, or another warp. The caller has said what this one waits for.
  void suspend() {
    Fiber* from = this_fiber;
    if (const uint32_t ready = this_warp->ready; ready != 0 && !is_interrupted_) {
      choose_lane(*this_warp);
      if (this_fiber != from) {
        emulator_switch(&from->stack_pointer, this_fiber->stack_pointer);
      }
    } else {
      emulator_switch(&from->stack_pointer, stack_pointer_);
    }
  }

  void interrupt() { is_interrupted_ = true; }

  // Lanes of a warp can run.
  void wake(Warp& warp, uint32_t lanes) {
    warp.ready |= lanes;
    if (!warp.is_queued && warp.ready != 0) {
      warp.is_queued = true;
      runnable_.push_back(&warp);
    }
  }

  // Until one of the words that it polled changes, or until time has passed.
  void sleep() {
    for (const Polled& p : this_fiber->polled) {
      auto& warps = sleepers_[key(p.word)];
      if (std::find(warps.begin(), warps.end(), this_warp) == warps.end()) {
        warps.push_back(this_warp);
      }
    }
    const uint32_t lane = uint32_t{1} << this_warp->lane;
    this_warp->asleep |= lane;
    this_warp->ready &= ~lane;
    suspend();
  }

  void has_written(const void* word) {
    has_progressed_ = true;
    if (const auto found = sleepers_.find(key(word)); found != sleepers_.end()) {
      for (Warp* warp : found->second) {
        wake_sleepers(*warp);
      }
      sleepers_.erase(found);
    }
  }

  uint64_t now_ns() { return now_ += kReadNs; }

  // True in one of n cases. n: a power of two.
  bool chance(unsigned n) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return (random_ >> 32) % n == 0;
  }

 private:
  static constexpr uint64_t kReadNs = 100;  // that reading the clock takes
  static constexpr uint64_t kLeastStepNs = 1'000'000, kMostStepNs = 1'000'000'000;
  static constexpr uint64_t kHangNs = 3'600'000'000'000;  // longer than every timeout of the programs
  // One of how many is held back.
  static constexpr unsigned kLateKernels = 8, kLateBlocks = 16, kLateWarps = 64;

  static uintptr_t key(const void* word) { return reinterpret_cast<uintptr_t>(word) / 16; }

  template <class T>
  T take_any(std::vector<T>& from) {
    chance(1);
    std::swap(from[(random_ >> 32) % from.size()], from.back());
    T taken = std::move(from.back());
    from.pop_back();
    return taken;
  }

  // The next one that can run, in a circle.
  void choose_lane(Warp& warp) {
    const auto after = static_cast<unsigned>(warp.lane + 1) % kWarp;
    const uint32_t rotated = warp.ready >> after | (after == 0 ? 0 : warp.ready << (kWarp - after));
    warp.lane = static_cast<int>((after + static_cast<unsigned>(__builtin_ctz(rotated))) % kWarp);
    this_fiber = warp.fibers + warp.lane;
  }

  void run(Warp& warp) {
    is_interrupted_ = false;
    this_block = warp.block;
    this_warp = &warp;
    choose_lane(warp);
    emulator_switch(&stack_pointer_, this_fiber->stack_pointer);
    if (this_block->fibers_left == 0) {
      end_block();
    } else if (warp.ready == 0) {
      warp.is_queued = false;
    } else {
      (chance(kLateWarps) ? held_back_ : runnable_).push_back(&warp);
    }
  }

  void wake_sleepers(Warp& warp) { wake(warp, std::exchange(warp.asleep, 0)); }

  void let_time_pass() {
    step_ns_ = has_progressed_ ? kLeastStepNs : std::min(2 * step_ns_, kMostStepNs);
    has_progressed_ = false;
    now_ += step_ns_;
    sleepers_.clear();
    for (auto& [_, block] : blocks_) {
      for (Warp& warp : block->warps) {
        wake_sleepers(warp);
      }
    }
    if (runnable_.empty()) {
      fail("threads wait for each other forever");
    }
    if (now_ - begin_ns_ > kHangNs) {
      fail("a wait without end");
    }
  }

  void begin_kernel(const std::shared_ptr<Kernel>& kernel) {
    const auto begin = [this, kernel] {
      for (unsigned x = 0; x < kernel->grid.x; ++x) {
        late_or_now(kLateBlocks, [this, kernel, x] { begin_block(kernel, x); });
      }
    };
    late_or_now(kLateKernels, begin);
  }

  template <class Begin>
  void late_or_now(unsigned n, const Begin& begin) {
    if (chance(n)) {
      late_.push_back(begin);
    } else {
      begin();
    }
  }

  void begin_block(const std::shared_ptr<Kernel>& kernel, unsigned x) {
    auto block = std::make_unique<Block>();
    block->kernel = kernel;
    block->block_idx = {x, kernel->row, 0};
    block->grid_dim = kernel->grid;
    block->block_dim = kernel->threads;
    block->fibers.resize(kernel->threads.x);
    block->fibers_left = kernel->threads.x;
    block->warps.resize(kernel->threads.x / kWarp);
    block->shared.assign(kernel->shared + 128, static_cast<char>(0xcd));
    for (size_t w = 0; w < block->warps.size(); ++w) {
      Warp& warp = block->warps[w];
      warp.block = block.get();
      warp.fibers = &block->fibers[w * kWarp];
      warp.stacks = stacks_.take();
      for (int lane = 0; lane < kWarp; ++lane) {
        warp.fibers[lane].thread_idx = {static_cast<unsigned>(w * kWarp + lane), 0, 0};
        warp.fibers[lane].stack_pointer = Stacks::prepare(warp.stacks, lane);
      }
      wake(warp, 0);
    }
    begin_ns_ = now_;
    blocks_.emplace(block.get(), std::move(block));
  }

  void end_block() {
    if (!this_block->bulk_loads.empty()) {
      fail("a block ended before what was to arrive in its memory");
    }
    for (const Warp& warp : this_block->warps) {
      stacks_.give_back(warp.stacks);
    }
    for (auto& [_, warps] : sleepers_) {
      std::erase_if(warps, [](const Warp* warp) { return warp->block == this_block; });
    }
    const auto kernel = this_block->kernel;
    blocks_.erase(this_block);
    if (--kernel->blocks_left == 0) {
      auto& queue = rows_[kernel->row];
      queue.pop_front();
      if (!queue.empty()) {
        begin_kernel(queue.front());
      }
    }
  }

  std::map<unsigned, std::deque<std::shared_ptr<Kernel>>> rows_;  // the first one of each row runs
  std::unordered_map<const Block*, std::unique_ptr<Block>> blocks_;
  std::vector<Warp*> runnable_, held_back_;
  std::vector<std::function<void()>> late_;                     // kernels and blocks that are held back
  std::unordered_map<uintptr_t, std::vector<Warp*>> sleepers_;  // by word
  Stacks stacks_;
  void* stack_pointer_ = nullptr;
  bool is_interrupted_ = false, has_progressed_ = false;
  uint64_t random_ = 0x9e3779b97f4a7c15;
  uint64_t now_ = 1'000'000'000, begin_ns_ = 0, step_ns_ = kLeastStepNs;
};
inline Scheduler scheduler;

// Whether a copy waits until it must be done.
inline bool is_late() {
  return scheduler.chance(2);
}

inline void run_fiber() {
  this_block->kernel->body();
  if (!this_fiber->stores.all_read() || !this_fiber->loads.all_read()) {
    fail("a thread ended before its copies had been read");
  }
  this_fiber->stores.write(0);
  --this_block->fibers_left;
  this_warp->ready &= ~(uint32_t{1} << this_warp->lane);
  scheduler.suspend();
  fail("a thread that has ended runs");
}

inline int thread() {
  return static_cast<int>(this_fiber->thread_idx.x);
}
inline int lane() {
  return this_warp->lane;
}

// Other warps may run now.
inline void may_interrupt() {
  if (scheduler.chance(4)) {
    scheduler.interrupt();
    scheduler.suspend();
  }
}

inline void has_written(const void* word) {
  scheduler.has_written(word);
}

// Loads a word that others write.
template <class T>
std::remove_cv_t<T> poll(T* word) {
  using Value = std::remove_cv_t<T>;
  constexpr size_t kMostPolled = 64;
  const auto load = [word] {
    if constexpr (std::is_scalar_v<Value>) {
      return *static_cast<const volatile Value*>(word);
    } else {
      return *const_cast<const Value*>(word);
    }
  };
  may_interrupt();
  Value value = load();
  auto& polled = this_fiber->polled;
  const auto bits = [&value] {
    std::array<uint64_t, 2> result{};
    std::memcpy(result.data(), &value, sizeof(Value));
    return result;
  };
  const auto find = [&] {
    return std::find_if(polled.begin(), polled.end(), [word](const Polled& p) { return p.word == word; });
  };
  auto found = find();
  if (found != polled.end() && found->value == bits()) {
    scheduler.sleep();
    asm volatile("" ::: "memory");
    value = load();
    if (found->value == bits()) {
      return value;
    }
  }
  if (found != polled.end() || polled.size() == kMostPolled) {
    polled.clear();
  }
  polled.push_back({const_cast<const void*>(static_cast<const volatile void*>(word)), bits()});
  return value;
}

// The values of all lanes; they stay until the warp's operation after the next.
inline const uint64_t* exchange(uint64_t mine) {
  Warp& warp = *this_warp;
  uint64_t* values = warp.value[warp.generation % 2];
  uint32_t& odd = warp.odd[warp.generation % 2];
  values[warp.lane] = mine;
  odd = (warp.arrived == 0 ? 0 : odd) | static_cast<uint32_t>(mine & 1) << warp.lane;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
    warp.ready |= std::exchange(warp.exchanging, 0);
    if (scheduler.chance(16)) {
      scheduler.interrupt();
    }
  } else {
    const uint32_t lane = uint32_t{1} << warp.lane;
    warp.exchanging |= lane;
    warp.ready &= ~lane;
    scheduler.suspend();
  }
  return values;
}

inline bool meet(Barrier& barrier, int count, bool value = true) {
  barrier.all = barrier.all && value;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.result = barrier.all;
    barrier.all = true;
    for (const auto& [warp, lanes] : std::exchange(barrier.waiting, {})) {
      scheduler.wake(*warp, lanes);
    }
  } else {
    const uint32_t lane = uint32_t{1} << this_warp->lane;
    if (barrier.waiting.empty() || barrier.waiting.back().first != this_warp) {
      barrier.waiting.emplace_back(this_warp, 0);
    }
    barrier.waiting.back().second |= lane;
    this_warp->ready &= ~lane;
    scheduler.suspend();
  }
  return barrier.result;
}

template <class Body>
void launch(const Body& body, dim3 grid, dim3 threads, size_t shared = 0, cudaStream_t = nullptr) {
  for (unsigned y = 0; y < grid.y; ++y) {
    scheduler.launch(y, body, grid, threads, shared);
  }
}

// A variable in the block's shared memory. `key`: one per variable.
template <class T>
T& shared_variable(const void* key) {
  auto& variables = this_block->variables;
  auto found = std::find_if(variables.begin(), variables.end(), [key](const auto& v) { return v.first == key; });
  if (found == variables.end()) {
    std::unique_ptr<char[]> memory(new char[sizeof(T)]);
    std::memset(memory.get(), 0xcd, sizeof(T));
    variables.emplace_back(key, std::move(memory));
    found = variables.end() - 1;
  }
  return *reinterpret_cast<T*>(found->second.get());
}

inline char* shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(this_block->shared.data());
  return reinterpret_cast<char*>((address + 127) / 128 * 128);
}

inline void named_barrier(int id, int count) {
  meet(this_block->named[id], count);
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
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (emulator::this_fiber->thread_idx)
#define blockIdx (emulator::this_block->block_idx)
#define gridDim (emulator::this_block->grid_dim)
#define blockDim (emulator::this_block->block_dim)

using std::max;
using std::min;

inline void __syncthreads() {
  emulator::meet(emulator::this_block->barrier, static_cast<int>(blockDim.x));
}
inline int __syncthreads_and(int value) {
  return emulator::meet(emulator::this_block->barrier, static_cast<int>(blockDim.x), value != 0);
}
inline int __syncthreads_or(int value) {
  return !__syncthreads_and(value == 0);
}
inline void __syncwarp() {
  emulator::exchange(0);
}
inline void __threadfence() {
  std::atomic_signal_fence(std::memory_order_seq_cst);
}
inline void __threadfence_system() {
  std::atomic_signal_fence(std::memory_order_seq_cst);
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
  return emulator::this_warp->odd[values == emulator::this_warp->value[1]];
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

// Of fibers that share a thread, nothing comes between a load and a store.
template <class T>
T exchange_word(T* p, T value) {
  const T old = *p;
  *p = value;
  emulator::has_written(p);
  return old;
}
template <class T, class U>
T atomicAdd(T* p, U value) {
  return exchange_word(p, static_cast<T>(*p + static_cast<T>(value)));
}
template <class T, class U>
T atomicOr(T* p, U value) {
  return exchange_word(p, static_cast<T>(*p | static_cast<T>(value)));
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  return exchange_word(p, *p == expected ? value : *p);
}
template <class T, class U>
T atomicMin(T* p, U value) {
  return exchange_word(p, std::min(*p, static_cast<T>(value)));
}
template <class T, class U>
T atomicMax(T* p, U value) {
  return exchange_word(p, std::max(*p, static_cast<T>(value)));
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
  emulator::scheduler.synchronize();
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
    emulator::scheduler.synchronize();
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
  emulator::scheduler.synchronize();
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
