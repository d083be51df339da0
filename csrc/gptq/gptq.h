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
  int64_t scratch;  // used by the CUDA pass itself
};

// A Hessian to factorise; its rows and columns are taken in the order given and its diagonal is replaced.
struct GptqHessian {
  const void* hessian;   // [size, size], contiguous, symmetric
  const void* diagonal;  // [size], in the given order
  const int32_t* order;  // [size]
  void* factor;          // [size, size], lower triangular
  int32_t size;
};

// The lower Cholesky factor. Returns 0, or the number of the first pivot that is not positive (the factor is then
// unusable).
int32_t gptq_factor_cpu(const GptqHessian& hessian, bool is_double, int threads);

// Codes of all `count` matrices. `residual`: the error of a column is taken against the corrected weight and spread by
// factor[k][j] / factor[k][k] (k: its own column), else against the original weight and by factor[k][j] / factor[j][j].
// `block`: columns of a lazy update.
void gptq_columns_cpu(const GptqMatrix* matrices, int64_t count, bool is_double, bool residual, int64_t block,
                      int threads);

#ifdef PGOLF_CUDA
// Floats of scratch memory that one matrix needs.
int64_t gptq_scratch(int32_t rows, int32_t cols);

void gptq_columns_cuda(const GptqMatrix* matrices, int64_t count, bool residual, float* scratch, int device,
                       void* stream);
#endif

}  // namespace pgolf
