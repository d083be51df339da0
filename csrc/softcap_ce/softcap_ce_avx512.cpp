#define PGOLF_ISA avx512
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#include "softcap_ce/rows.h"
#endif
