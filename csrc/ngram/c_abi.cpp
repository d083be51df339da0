// For callers without pybind11: packed submissions ship this folder's sources and compile them where they run.
#include <exception>

#include "ngram/ngram.h"

// ngram_hints_cpu; 1 when it failed (out of memory), else 0.
extern "C" int pgolf_ngram_hints(const uint16_t* tokens, int64_t n, const pgolf::NgramSettings* settings, int threads,
                                 int32_t* hints, double* betas) noexcept {
  try {
    pgolf::ngram_hints_cpu(tokens, n, *settings, threads, hints, betas);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
