#include <cstdlib>
#include <string>

#include "common/system.h"

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

}  // namespace pgolf
