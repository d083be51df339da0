// What this build and this processor can do; `pgolf doctor` shows it and kernels dispatch on it.
#include "common/system.h"

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace pgolf {

Isa detect_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    const char* limit = std::getenv("PGOLF_ISA");  // for tests: "avx2" or "baseline" leaves wider code unused
    const std::string wanted = limit == nullptr ? "avx512" : limit;
    __builtin_cpu_init();
    if (wanted == "baseline") return Isa::baseline;
    if (wanted != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
    return Isa::baseline;
  }();
  return isa;
#else
  return Isa::baseline;
#endif
}

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
