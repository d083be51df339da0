#include <pybind11/pybind11.h>

#include "fused_mlp/fused_mlp.h"

namespace pgolf {

void bind_fused_mlp([[maybe_unused]] pybind11::module_& m) {
#ifdef PGOLF_SM90A
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def(
      "fused_mlp_up_cuda",
      [](uintptr_t x, uintptr_t w_up, uintptr_t out, int32_t rows, int32_t columns, int32_t depth, float slope,
         int device, uintptr_t stream) {
        fused_mlp_up_cuda({reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(w_up), nullptr,
                           reinterpret_cast<void*>(out), rows, columns, depth, slope},
                          device, reinterpret_cast<void*>(stream));
      },
      Guard());
  m.def(
      "fused_mlp_grad_pre_cuda",
      [](uintptr_t grad, uintptr_t w_down_t, uintptr_t hidden, uintptr_t out, int32_t rows, int32_t columns,
         int32_t depth, float slope, int device, uintptr_t stream) {
        fused_mlp_grad_pre_cuda(
            {reinterpret_cast<const void*>(grad), reinterpret_cast<const void*>(w_down_t),
             reinterpret_cast<const void*>(hidden), reinterpret_cast<void*>(out), rows, columns, depth, slope},
            device, reinterpret_cast<void*>(stream));
      },
      Guard());
#endif
}

}  // namespace pgolf
