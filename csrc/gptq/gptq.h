#pragma once
#include <cstdint>

namespace pgolf {

// One matrix of a GPTQ column pass; every address lies on the device that runs it. See pgolf_kernels/gptq.py for the
// formula.
struct GptqMatrix {
  const void* weight;     // [rows, cols], contiguous
  const void* factor;     // [cols, cols], contiguous; the part below the diagonal and the diagonal are read
  const int32_t* order;   // [cols]: weight column of each factor row; ~c names a dead column c
  const void* scales;     // [rows], positive
  const int32_t* status;  // one number; not zero: the factor is unusable, round without feedback
  int8_t* codes;          // [rows, cols], in the order of the weight's columns
  int32_t rows;
  int32_t cols;
  int32_t max_code;
};

// `residual`: the error of a column is taken against the corrected weight, else against the original one.
void gptq_columns_cpu(const GptqMatrix& matrix, bool is_double, bool residual, int64_t block, int threads);

}  // namespace pgolf
