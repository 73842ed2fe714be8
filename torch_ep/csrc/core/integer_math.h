// Integer arithmetic on host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EP_HOST_DEVICE __host__ __device__
#else
#define EP_HOST_DEVICE
#endif

namespace ep {

EP_HOST_DEVICE constexpr int64_t ceil_div(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

EP_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

}  // namespace ep
