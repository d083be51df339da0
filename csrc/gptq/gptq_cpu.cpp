// The GPTQ column pass on CPU: rows are independent given the factor, so threads take groups of rows.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/parallel.h"
#include "common/system.h"
#include "gptq/gptq.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own AVX-512 intrinsics
#endif
#include <immintrin.h>
#endif

namespace pgolf {
namespace {

// Uninitialised memory on a cache line's boundary.
template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count)
      : data_(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64}))) {}
  ~AlignedBuffer() { ::operator delete[](data_, std::align_val_t{64}); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

namespace baseline {

#define PGOLF_TARGET
template <class T>
struct Vector {
  using Scalar = T;
  static constexpr int kLanes = 16 / sizeof(T), kVectors = 2, kGroup = 4;
  struct Reg {
    T lane[kLanes];
  };
  static Reg load(const T* p) {
    Reg out;
    std::copy_n(p, kLanes, out.lane);
    return out;
  }
  static void store(T* p, Reg x) { std::copy_n(x.lane, kLanes, p); }
  static Reg broadcast(T x) {
    Reg out;
    std::fill_n(out.lane, kLanes, x);
    return out;
  }
  static Reg add(Reg a, Reg b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Reg sub(Reg a, Reg b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static Reg mul(Reg a, Reg b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Reg div(Reg a, Reg b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] /= b.lane[i];
    return a;
  }
  static Reg fma(Reg a, Reg b, Reg c) { return add(mul(a, b), c); }
  static Reg clamp(Reg x, Reg low, Reg high) {
    for (int i = 0; i < kLanes; ++i) x.lane[i] = std::min(std::max(x.lane[i], low.lane[i]), high.lane[i]);
    return x;
  }
};
using Float = Vector<float>;
using Double = Vector<double>;
#include "gptq/columns_tile.inl"
#undef PGOLF_TARGET

}  // namespace baseline

#if defined(__x86_64__)

// The operations that the pass needs of one register type.
#define PGOLF_VECTOR(NAME, TYPE, REG, PREFIX, SUFFIX, LANES, VECTORS, GROUP)                      \
  struct NAME {                                                                                   \
    using Scalar = TYPE;                                                                          \
    using Reg = REG;                                                                              \
    static constexpr int kLanes = LANES, kVectors = VECTORS, kGroup = GROUP;                      \
    PGOLF_TARGET static Reg load(const TYPE* p) { return PREFIX##_loadu_##SUFFIX(p); }            \
    PGOLF_TARGET static void store(TYPE* p, Reg x) { PREFIX##_storeu_##SUFFIX(p, x); }            \
    PGOLF_TARGET static Reg broadcast(TYPE x) { return PREFIX##_set1_##SUFFIX(x); }               \
    PGOLF_TARGET static Reg add(Reg a, Reg b) { return PREFIX##_add_##SUFFIX(a, b); }             \
    PGOLF_TARGET static Reg sub(Reg a, Reg b) { return PREFIX##_sub_##SUFFIX(a, b); }             \
    PGOLF_TARGET static Reg mul(Reg a, Reg b) { return PREFIX##_mul_##SUFFIX(a, b); }             \
    PGOLF_TARGET static Reg div(Reg a, Reg b) { return PREFIX##_div_##SUFFIX(a, b); }             \
    PGOLF_TARGET static Reg fma(Reg a, Reg b, Reg c) { return PREFIX##_fmadd_##SUFFIX(a, b, c); } \
    PGOLF_TARGET static Reg clamp(Reg x, Reg low, Reg high) {                                     \
      return PREFIX##_min_##SUFFIX(PREFIX##_max_##SUFFIX(x, low), high);                          \
    }                                                                                             \
  }

namespace avx2 {
#define PGOLF_TARGET __attribute__((target("avx2,fma")))
PGOLF_VECTOR(Float, float, __m256, _mm256, ps, 8, 3, 4);  // 12 sums, 3 errors, 1 broadcast: all 16 registers
PGOLF_VECTOR(Double, double, __m256d, _mm256, pd, 4, 3, 4);
#include "gptq/columns_tile.inl"
#undef PGOLF_TARGET
}  // namespace avx2

namespace avx512 {
#define PGOLF_TARGET __attribute__((target("avx512f")))
PGOLF_VECTOR(Float, float, __m512, _mm512, ps, 16, 3, 8);  // 24 sums, 3 errors of 32 registers; broadcasts from memory
PGOLF_VECTOR(Double, double, __m512d, _mm512, pd, 8, 3, 8);
#include "gptq/columns_tile.inl"
#undef PGOLF_TARGET
}  // namespace avx512

#undef PGOLF_VECTOR
#endif

using RowsFunction = void (*)(const GptqMatrix&, bool, int64_t, int64_t, int64_t);

RowsFunction rows_function(bool is_double) {
  switch (detect_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return is_double ? avx512::quantize_rows<avx512::Double> : avx512::quantize_rows<avx512::Float>;
    case Isa::avx2:
      return is_double ? avx2::quantize_rows<avx2::Double> : avx2::quantize_rows<avx2::Float>;
#endif
    default:
      return is_double ? baseline::quantize_rows<baseline::Double> : baseline::quantize_rows<baseline::Float>;
  }
}

}  // namespace

void gptq_columns_cpu(const GptqMatrix& matrix, bool is_double, bool residual, int64_t block, int threads) {
  const RowsFunction quantize = rows_function(is_double);
  constexpr int64_t grain = 48;
  parallel_for(matrix.rows, grain, threads,
               [&](int64_t begin, int64_t end) { quantize(matrix, residual, block, begin, end); });
}

}  // namespace pgolf
