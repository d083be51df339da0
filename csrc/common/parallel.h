#pragma once
#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace pgolf {

// Calls body(begin, end) on contiguous parts of [0, n), each at least `grain` long, on up to `threads` threads.
// Results must not depend on where the parts begin: callers promise it, so that output is the same on every machine.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1)));
#ifdef _OPENMP
  if (parts > 1) {
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) body(n * part / parts, n * (part + 1) / parts);
    return;
  }
#endif
  body(int64_t{0}, n);
}

}  // namespace pgolf
