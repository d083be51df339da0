// Picks the instruction set at run time and splits the rows over threads.
#include <atomic>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/parallel.h"
#include "common/system.h"
#include "softcap_ce/softcap_ce.h"

namespace pgolf {

using RowsFunction = int64_t(const SoftcapCE&, const SoftcapCELosses*, const void*, const SoftcapCEGradient*, float*,
                             int64_t, int64_t);
namespace baseline {
RowsFunction softcap_ce_rows;
}
#if defined(__x86_64__)
namespace avx2 {
RowsFunction softcap_ce_rows;
}
namespace avx512 {
RowsFunction softcap_ce_rows;
}
#endif

namespace {

RowsFunction* rows_function() {
#if defined(__x86_64__)
  if (detect_isa() == Isa::avx512) return avx512::softcap_ce_rows;
  if (detect_isa() == Isa::avx2) return avx2::softcap_ce_rows;
#endif
  return baseline::softcap_ce_rows;
}

// Asks for large pages under a big output that nobody has touched yet: faulting in 4 KiB pages takes as long as the
// rest.
void prefer_large_pages(const SoftcapCE& ce, const SoftcapCEGradient& gradient) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const int64_t element = ce.dtype == DType::f64 ? 8 : ce.dtype == DType::f32 ? 4 : 2;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(gradient.dlogits) + kPage - 1) / kPage * kPage;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(gradient.dlogits) + ce.rows * gradient.row_stride * element) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing is no error
#endif
}

int64_t run(const SoftcapCE& ce, const SoftcapCELosses* losses, const void* lse, const SoftcapCEGradient* gradient,
            int threads) {
  constexpr int64_t kGrain = 32768;  // elements: some 20 microseconds of work
  RowsFunction* rows = rows_function();
  if (gradient) prefer_large_pages(ce, *gradient);
  std::atomic<int64_t> first_bad{ce.rows};
  parallel_for(ce.rows, kGrain / ce.vocab + 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> kept(losses && gradient ? 2 * ce.vocab : 0);
    const int64_t bad = rows(ce, losses, lse, gradient, kept.empty() ? nullptr : kept.data(), begin, end);
    int64_t seen = first_bad.load();
    while (bad >= 0 && bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  return first_bad.load() == ce.rows ? -1 : first_bad.load();
}

}  // namespace

int64_t softcap_ce_forward_cpu(const SoftcapCE& ce, const SoftcapCELosses& out, int threads) {
  return run(ce, &out, nullptr, nullptr, threads);
}

void softcap_ce_backward_cpu(const SoftcapCE& ce, const void* lse, const SoftcapCEGradient& out, int threads) {
  run(ce, nullptr, lse, &out, threads);
}

int64_t softcap_ce_with_grad_cpu(const SoftcapCE& ce, const SoftcapCELosses& out, const SoftcapCEGradient& gradient,
                                 int threads) {
  return run(ce, &out, out.lse, &gradient, threads);
}

}  // namespace pgolf
