#pragma once

namespace pgolf {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The widest instruction set of this processor that the kernels have code for.
Isa detect_isa();

}  // namespace pgolf
