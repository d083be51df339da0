#include <pybind11/pybind11.h>

#include "softcap_ce/softcap_ce.h"

namespace pgolf {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

SoftcapCE problem(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, int dtype, uintptr_t targets,
                  int64_t ignore_index, double softcap, double temperature) {
  return {at<const void>(logits),     row_stride,   rows,    vocab,      static_cast<DType>(dtype),
          at<const int64_t>(targets), ignore_index, softcap, temperature};
}

SoftcapCELosses losses(uintptr_t losses, uintptr_t lse, uintptr_t hints, uintptr_t hint_log_probs) {
  return {at<void>(losses), at<void>(lse), at<const int64_t>(hints), at<void>(hint_log_probs)};
}

SoftcapCEGradient gradient(uintptr_t upstream, int64_t upstream_stride, uintptr_t dlogits, int64_t row_stride) {
  return {at<const void>(upstream), upstream_stride, at<void>(dlogits), row_stride};
}

}  // namespace

void bind_softcap_ce(pybind11::module_& m) {
  namespace py = pybind11;
  using Guard = py::call_guard<py::gil_scoped_release>;
  py::class_<SoftcapCE>(m, "SoftcapCE").def(py::init(&problem));
  py::class_<SoftcapCELosses>(m, "SoftcapCELosses").def(py::init(&losses));
  py::class_<SoftcapCEGradient>(m, "SoftcapCEGradient").def(py::init(&gradient));
  m.def("softcap_ce_forward_cpu", &softcap_ce_forward_cpu, Guard());
  m.def(
      "softcap_ce_backward_cpu",
      [](const SoftcapCE& ce, uintptr_t lse, const SoftcapCEGradient& out, int threads) {
        softcap_ce_backward_cpu(ce, at<const void>(lse), out, threads);
      },
      Guard());
  m.def("softcap_ce_with_grad_cpu", &softcap_ce_with_grad_cpu, Guard());
#ifdef PGOLF_CUDA
  m.def("softcap_ce_forward_cuda", &softcap_ce_forward_cuda, Guard());
  m.def(
      "softcap_ce_backward_cuda",
      [](const SoftcapCE& ce, uintptr_t lse, const SoftcapCEGradient& out, uintptr_t claimed, int device,
         uintptr_t stream) {
        softcap_ce_backward_cuda(ce, at<const void>(lse), out, at<void>(claimed), device, stream);
      },
      Guard());
  m.def(
      "softcap_ce_with_grad_cuda",
      [](const SoftcapCE& ce, const SoftcapCELosses& out, const SoftcapCEGradient& gradient, uintptr_t claimed,
         int device,
         uintptr_t stream) { softcap_ce_with_grad_cuda(ce, out, gradient, at<void>(claimed), device, stream); },
      Guard());
  m.def(
      "softcap_ce_mean_cuda",
      [](uintptr_t losses, uintptr_t targets, int64_t rows, int64_t ignore_index, uintptr_t mean, uintptr_t weight,
         int device, uintptr_t stream) {
        softcap_ce_mean_cuda(at<const void>(losses), at<const int64_t>(targets), rows, ignore_index, at<void>(mean),
                             at<void>(weight), device, stream);
      },
      Guard());
#endif
}

}  // namespace pgolf
