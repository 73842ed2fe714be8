// Number types of rows that are summed.
#pragma once

namespace ep {

enum class Element : int { f64, f32, bf16, f16 };

}  // namespace ep
