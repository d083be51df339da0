#define PGOLF_ISA avx2
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#pragma GCC target("avx2,fma")
#include "softcap_ce/rows.h"
#endif
