#include <pybind11/pybind11.h>

#include <vector>

#include "gptq/gptq.h"

namespace pgolf {
namespace {

namespace py = pybind11;

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Matrices from a table of int64 rows: weight, factor, order, scales, status, codes (addresses), rows, cols, max_code.
std::vector<GptqMatrix> matrices(uintptr_t table, int64_t count) {
  std::vector<GptqMatrix> result;
  for (const int64_t* row = at<const int64_t>(table); count > 0; --count, row += 9)
    result.push_back({at<const void>(row[0]), at<const void>(row[1]), at<const int32_t>(row[2]), at<const void>(row[3]),
                      at<const int32_t>(row[4]), at<int8_t>(row[5]), static_cast<int32_t>(row[6]),
                      static_cast<int32_t>(row[7]), static_cast<int32_t>(row[8]), 0});
  return result;
}

}  // namespace

void bind_gptq(py::module_& m) {
  using Guard = py::call_guard<py::gil_scoped_release>;
  m.def(
      "gptq_factor_cpu",
      [](uintptr_t hessian, uintptr_t diagonal, uintptr_t order, uintptr_t factor, int32_t size, bool is_double,
         int threads) {
        const GptqHessian job{at<const void>(hessian), at<const void>(diagonal), at<const int32_t>(order),
                              at<void>(factor), size};
        return gptq_factor_cpu(job, is_double, threads);
      },
      Guard());
  m.def(
      "gptq_columns_cpu",
      [](uintptr_t table, int64_t count, bool is_double, bool residual, int64_t block, int threads) {
        gptq_columns_cpu(matrices(table, count).data(), count, is_double, residual, block, threads);
      },
      Guard());
#ifdef PGOLF_CUDA
  m.def("gptq_scratch", &gptq_scratch);
  m.def(
      "gptq_columns_cuda",
      [](uintptr_t table, int64_t count, bool residual, uintptr_t scratch, int device, uintptr_t stream) {
        gptq_columns_cuda(matrices(table, count).data(), count, residual, at<float>(scratch), device, at<void>(stream));
      },
      Guard());
#endif
}

}  // namespace pgolf
