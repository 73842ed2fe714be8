// What the programs that run several ranks on one GPU share: errors, memory, random numbers.
#pragma once

#include "core/device/launch.cuh"
#include "nvlink/device/counter.cuh"
#include "nvlink/device/low_latency_receive.cuh"
#include "nvlink/device/quantize.cuh"
#include "nvlink/device/reduce.cuh"
#include "nvlink/device/rows.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace ranks {

using namespace ep;
using namespace ep::nvlink;
using std::vector;

// --- the program's own errors ---

inline std::string now_running = "virtual_ranks";
inline bool has_differences = false;
inline bool fills_bulk_results = false;
inline int timeout_s = 120;  // of an exchange: kernels are slow under a sanitizer
inline int64_t default_timeout_ns() {
  return timeout_s * int64_t{1'000'000'000};
}

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("%s: %s\n", now_running.c_str(), what.c_str());
  std::exit(1);
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    fail(cudaGetErrorString(error));
  }
}

// Only once the device is idle.
inline std::string failure_of(const Comm& comm) {
  const FailureReport& f = comm.host_report->failure;
  const auto number = [](auto value) { return std::to_string(static_cast<int64_t>(value)); };
  return "rank " + number(comm.rank) + " reported failure " + number(f.kind) + " in op " + number(f.op) + ", phase " +
         number(f.phase) + ", exchange " + number(f.epoch) + ", peer " + number(f.peer) + ", missing rank " +
         number(f.missing_rank) + ", field " + number(f.field) + ", token " + number(f.token) + ", slot " +
         number(f.slot) + ", ours " + number(f.ours) + ", theirs " + number(f.theirs);
}

template <class T>
void expect(const std::string& name, int rank, const vector<T>& got, const vector<T>& want) {
  if (got.size() != want.size()) {
    fail(name + ": expected " + std::to_string(want.size()) + " numbers, got " + std::to_string(got.size()));
  }
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) {
      std::printf(
          "%s: %s of rank %d: element %zu of %zu: expected %g, got %g\n",
          now_running.c_str(),
          name.c_str(),
          rank,
          i,
          want.size(),
          static_cast<double>(want[i]),
          static_cast<double>(got[i]));
      has_differences = true;
      return;
    }
  }
}

// --- device memory ---

// Freed with its owner. Nothing is allocated beyond what is asked for, so that memcheck sees the first byte too many.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* block : blocks_) {
      check(cudaFree(block));
    }
  }

  // Not initialized.
  template <class T>
  T* make(size_t n) {
    void* block = nullptr;
    check(cudaMalloc(&block, std::max<size_t>(n * sizeof(T), 1)));
    blocks_.push_back(block);
    return static_cast<T*>(block);
  }

  // Not initialized, unless initcheck could not know that it was.
  char* make_for_bulk(size_t bytes) {
    char* result = make<char>(bytes);
    if (fills_bulk_results) {
      check(cudaMemset(result, 0x7f, bytes));
    }
    return result;
  }

  template <class T>
  T* zeros(size_t n) {
    T* result = make<T>(n);
    check(cudaMemset(result, 0, n * sizeof(T)));
    return result;
  }

  template <class T>
  T* copy(const vector<T>& values) {
    T* result = make<T>(values.size());
    if (!values.empty()) {
      check(cudaMemcpy(result, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    return result;
  }

 private:
  vector<void*> blocks_;
};

template <class T>
vector<T> fetch(const T* on_device, size_t n) {
  vector<T> result(n);
  if (n != 0) {
    check(cudaMemcpy(result.data(), on_device, n * sizeof(T), cudaMemcpyDeviceToHost));
  }
  return result;
}

// --- random numbers ---

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int below(int n) { return static_cast<int>(engine_() % static_cast<uint64_t>(n)); }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int>(choices.size()))];
  }
  vector<char> bytes(size_t n) {
    vector<char> result(n);
    for (char& b : result) {
      b = static_cast<char>(engine_());
    }
    return result;
  }
  // Between -8 and 8, with zeros of either sign among them.
  double number() {
    const double sign = below(2) != 0 ? -1 : 1;
    return below(16) == 0 ? sign * 0.0 : sign * below(1 << 20) / (1 << 17);
  }

 private:
  std::mt19937_64 engine_;
};

// --- numbers of rows ---

inline double to_wide(double v) {
  return v;
}
inline float to_wide(float v) {
  return v;
}
inline float to_wide(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
inline float to_wide(__half v) {
  return __half2float(v);
}

template <class T, class Wide>
T rounded(Wide v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(v));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(v));
  } else {
    return static_cast<T>(v);
  }
}

template <class T>
using WideOf = decltype(to_wide(T{}));

inline int number_after(const char* name, const std::string& value) {
  char* end = nullptr;
  const long number = std::strtol(value.c_str(), &end, 10);
  if (value.empty() || *end != '\0' || number < 0) {
    std::fprintf(stderr, "%s: expected a number, got '%s'\n", name, value.c_str());
    std::exit(2);
  }
  return static_cast<int>(number);
}

// The command line.
struct Options {
  int cases = 24, seed = 1;

  Options(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
      if (name == "--fill") {
        fills_bulk_results = true;
      } else if (name == "--cases" || name == "--seed" || name == "--timeout") {
        (name == "--cases" ? cases : name == "--seed" ? seed : timeout_s) = number_after(name.c_str(), value);
        ++i;
      } else {
        std::fprintf(stderr, "usage: %s [--cases N] [--seed N] [--timeout SECONDS] [--fill]\n", argv[0]);
        std::exit(2);
      }
    }
  }
};

}  // namespace ranks

using namespace ranks;
