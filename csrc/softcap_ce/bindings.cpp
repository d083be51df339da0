#include <pybind11/pybind11.h>

#include "softcap_ce/softcap_ce.h"

namespace pgolf {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The arguments that every function begins with.
#define PGOLF_CE_PARAMETERS                                                                        \
  uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, int dtype, uintptr_t targets, \
      int64_t ignore_index, double softcap, double temperature
#define PGOLF_CE                                                                                            \
  SoftcapCE {                                                                                               \
    at<const void>(logits), row_stride, rows, vocab, static_cast<DType>(dtype), at<const int64_t>(targets), \
        ignore_index, softcap, temperature                                                                  \
  }

int64_t forward_cpu(PGOLF_CE_PARAMETERS, uintptr_t losses, uintptr_t lse, uintptr_t hints, uintptr_t hint_log_probs,
                    int threads) {
  return softcap_ce_forward_cpu(
      PGOLF_CE, {at<void>(losses), at<void>(lse), at<const int64_t>(hints), at<void>(hint_log_probs)}, threads);
}

void backward_cpu(PGOLF_CE_PARAMETERS, uintptr_t lse, uintptr_t upstream, int64_t upstream_stride, uintptr_t dlogits,
                  int64_t dlogits_stride, int threads) {
  softcap_ce_backward_cpu(PGOLF_CE, at<const void>(lse),
                          {at<const void>(upstream), upstream_stride, at<void>(dlogits), dlogits_stride}, threads);
}

int64_t with_grad_cpu(PGOLF_CE_PARAMETERS, uintptr_t losses, uintptr_t lse, uintptr_t hints, uintptr_t hint_log_probs,
                      uintptr_t upstream, int64_t upstream_stride, uintptr_t dlogits, int64_t dlogits_stride,
                      int threads) {
  return softcap_ce_with_grad_cpu(
      PGOLF_CE, {at<void>(losses), at<void>(lse), at<const int64_t>(hints), at<void>(hint_log_probs)},
      {at<const void>(upstream), upstream_stride, at<void>(dlogits), dlogits_stride}, threads);
}

}  // namespace

void bind_softcap_ce(pybind11::module_& m) {
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("softcap_ce_forward_cpu", &forward_cpu, Guard());
  m.def("softcap_ce_backward_cpu", &backward_cpu, Guard());
  m.def("softcap_ce_with_grad_cpu", &with_grad_cpu, Guard());
}

}  // namespace pgolf
