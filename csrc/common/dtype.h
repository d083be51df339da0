#pragma once
#include <cstdint>

namespace pgolf {

// Codes shared with pgolf_kernels/_native_op.py (DTYPE_CODES).
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

}  // namespace pgolf
