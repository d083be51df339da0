// What this build and this processor can do, as `pgolf doctor` shows it.
#include "common/system.h"

#include <pybind11/pybind11.h>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace pgolf {

void bind_system(pybind11::module_& m) {
  m.def("has_cuda", [] {
#ifdef PGOLF_CUDA
    return true;
#else
    return false;
#endif
  });
  m.def("has_openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  });
  m.def("isa", [] {
    switch (detect_isa()) {
      case Isa::avx512:
        return "avx512";
      case Isa::avx2:
        return "avx2";
      default:
        return "baseline";
    }
  });
}

}  // namespace pgolf
