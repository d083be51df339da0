#include <pybind11/pybind11.h>

#include "linear_softcap_ce/linear_softcap_ce.h"

namespace pgolf {

void bind_linear_softcap_ce([[maybe_unused]] pybind11::module_& m) {
#ifdef PGOLF_SM90A
  m.def(
      "linear_softcap_ce_powers_cuda",
      [](uintptr_t x, uintptr_t w, uintptr_t g, uintptr_t sums, int32_t rows, int32_t columns, float inverse_softcap,
         float height, int device, uintptr_t stream) {
        linear_softcap_ce_powers_cuda(
            {reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(w), reinterpret_cast<void*>(g),
             reinterpret_cast<float*>(sums), rows, columns, inverse_softcap, height},
            device, reinterpret_cast<void*>(stream));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
#endif
}

}  // namespace pgolf
