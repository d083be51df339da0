#include <pybind11/pybind11.h>

#include "ngram/ngram.h"

namespace pgolf {

namespace py = pybind11;

void bind_ngram(py::module_& m) {
  m.def(
      "ngram_hints_cpu",
      [](uintptr_t tokens, int64_t n, uintptr_t orders, int order_count, int table_bits, int token_bits,
         double threshold_scale, double base_beta, double agree_bonus, double within_threshold, double within_beta,
         double word_threshold, double word_beta, uintptr_t has_leading_space, uintptr_t is_boundary, bool full_hash,
         int threads, uintptr_t hints, uintptr_t betas) {
        const NgramSettings settings{reinterpret_cast<const int64_t*>(orders),
                                     order_count,
                                     table_bits,
                                     token_bits,
                                     threshold_scale,
                                     base_beta,
                                     agree_bonus,
                                     within_threshold,
                                     within_beta,
                                     word_threshold,
                                     word_beta,
                                     reinterpret_cast<const uint8_t*>(has_leading_space),
                                     reinterpret_cast<const uint8_t*>(is_boundary),
                                     full_hash};
        ngram_hints_cpu(reinterpret_cast<const uint16_t*>(tokens), n, settings, threads,
                        reinterpret_cast<int32_t*>(hints), reinterpret_cast<double*>(betas));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace pgolf
