#include <cstring>

#include "adapter_adamw/adapter_adamw.h"
#include "common/parallel.h"
#include "common/system.h"

namespace pgolf {
namespace {

// Elements [begin, end) of one document. Inlined into a function for each instruction set.
template <bool kMoment>
inline __attribute__((always_inline)) void step_run(const AdapterAdamW& s, int64_t begin, int64_t end,
                                                    const float* factors) {
  float* __restrict p = s.p;
  float* __restrict v = s.v;
  float* __restrict m = s.m;
  const float* __restrict g = s.g;
  const float rate = s.lr * factors[0], inverse2 = factors[1], eps = s.eps, keep = s.keep;
  const float beta1 = s.beta1, beta2 = s.beta2, rest1 = s.rest1, rest2 = s.rest2;
  for (int64_t i = begin; i < end; ++i) {
    const float square = beta2 * v[i] + rest2 * (g[i] * g[i]);
    float mean = g[i];
    if (kMoment) {
      mean = beta1 * m[i] + rest1 * g[i];
      m[i] = mean;
    }
    v[i] = square;
    p[i] = keep * p[i] - rate * mean / (__builtin_sqrtf(square) * inverse2 + eps);
  }
}

inline __attribute__((always_inline)) void step_any(const AdapterAdamW& s, int64_t begin, int64_t end,
                                                    const float* factors) {
  if (s.m)
    step_run<true>(s, begin, end, factors);
  else
    step_run<false>(s, begin, end, factors);
}

using StepFunction = void(const AdapterAdamW&, int64_t, int64_t, const float*);

void step_baseline(const AdapterAdamW& s, int64_t begin, int64_t end, const float* factors) {
  step_any(s, begin, end, factors);
}
#if defined(__x86_64__)
__attribute__((target("avx2"))) void step_avx2(const AdapterAdamW& s, int64_t begin, int64_t end,
                                               const float* factors) {
  step_any(s, begin, end, factors);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void step_avx512(
    const AdapterAdamW& s, int64_t begin, int64_t end, const float* factors) {
  step_any(s, begin, end, factors);
}
#endif

StepFunction* step_function() {
#if defined(__x86_64__)
  if (detect_isa() == Isa::avx512) return step_avx512;
  if (detect_isa() == Isa::avx2) return step_avx2;
#endif
  return step_baseline;
}

}  // namespace

void adapter_adamw_cpu(const AdapterAdamW& s, int threads) {
  constexpr int64_t kGrain = 16384;  // elements a thread should have at least
  StepFunction* step = step_function();
  parallel_for(s.slots * s.documents * s.inner, kGrain, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // one document's part of the range at a time
      const int64_t segment = begin / s.inner;
      const int64_t document = segment % s.documents;
      const int64_t stop = (segment + 1) * s.inner < end ? (segment + 1) * s.inner : end;
      const float* factors = s.factors + 2 * document;
      if (s.reset && s.reset[document]) {
        const size_t bytes = size_t(stop - begin) * sizeof(float);
        std::memset(s.v + begin, 0, bytes);
        if (s.m) std::memset(s.m + begin, 0, bytes);
        if (s.zero) std::memset(s.p + begin, 0, bytes);
      } else if (factors[1] > 0) {
        step(s, begin, stop, factors);
      }
      begin = stop;
    }
  });
}

}  // namespace pgolf
