// The operators that exchange data. Includes no torch header: kernels use it too.
#pragma once

#include <cstdint>

namespace ep {

// The operator of an exchange. Every rank issues the same sequence of operators on one group. The halves of a
// low-latency operator are one exchange, which `_send` begins.
enum class OpKind : int64_t {
  init = 0,
  plan = 1,
  dispatch = 2,
  combine = 3,
  low_latency_dispatch = 4,
  low_latency_combine = 5
};

}  // namespace ep
