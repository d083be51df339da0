#include <pybind11/pybind11.h>

#include "adapter_adamw/adapter_adamw.h"

namespace pgolf {

void bind_adapter_adamw(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "adapter_adamw_cpu",
      [](uintptr_t p, uintptr_t g, uintptr_t v, uintptr_t m, int64_t slots, int64_t documents, int64_t inner,
         uintptr_t factors, uintptr_t reset, bool zero, double lr, double beta1, double beta2, double eps,
         double weight_decay, int threads) {
        const AdapterAdamW step{reinterpret_cast<float*>(p),
                                reinterpret_cast<const float*>(g),
                                reinterpret_cast<float*>(v),
                                reinterpret_cast<float*>(m),
                                slots,
                                documents,
                                inner,
                                reinterpret_cast<const float*>(factors),
                                reinterpret_cast<const bool*>(reset),
                                zero,
                                float(lr),
                                float(beta1),
                                float(beta2),
                                float(1 - beta1),
                                float(1 - beta2),
                                float(eps),
                                float(1 - lr * weight_decay)};
        adapter_adamw_cpu(step, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace pgolf
