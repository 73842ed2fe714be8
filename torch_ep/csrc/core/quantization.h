// Quantization of rows in ep::low_latency_dispatch. Includes no torch header: kernels use it too. Formulas: docstring
// of torch_ep.low_latency_dispatch.
#pragma once

namespace ep {

enum class Quantize : int { none, fp8, fp8_pow2, fp8_ue8m0 };

constexpr int kScaleGroup = 128;   // channels that share a scale
constexpr float kMaxFp8 = 448;     // largest number of float8_e4m3fn
constexpr float kMinAmax = 1e-4F;  // lower bound of a group's maximum, so that zeros have a positive scale too

}  // namespace ep
