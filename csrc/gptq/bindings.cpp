#include <pybind11/pybind11.h>

#include "gptq/gptq.h"

namespace pgolf {

namespace py = pybind11;

void bind_gptq(py::module_& m) {
  m.def(
      "gptq_columns_cpu",
      [](uintptr_t weight, uintptr_t factor, uintptr_t order, uintptr_t scales, uintptr_t status, uintptr_t codes,
         int32_t rows, int32_t cols, int32_t max_code, bool is_double, bool residual, int64_t block, int threads) {
        const GptqMatrix matrix{reinterpret_cast<const void*>(weight),
                                reinterpret_cast<const void*>(factor),
                                reinterpret_cast<const int32_t*>(order),
                                reinterpret_cast<const void*>(scales),
                                reinterpret_cast<const int32_t*>(status),
                                reinterpret_cast<int8_t*>(codes),
                                rows,
                                cols,
                                max_code};
        gptq_columns_cpu(matrix, is_double, residual, block, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace pgolf
