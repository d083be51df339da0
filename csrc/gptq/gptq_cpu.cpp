// The GPTQ column pass on CPU: rows are independent given the factor, so threads take groups of rows.
#include <algorithm>
#include <cmath>
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
#include "gptq/factor_tile.inl"
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
#include "gptq/factor_tile.inl"
#undef PGOLF_TARGET
}  // namespace avx2

namespace avx512 {
#define PGOLF_TARGET __attribute__((target("avx512f")))
PGOLF_VECTOR(Float, float, __m512, _mm512, ps, 16, 3, 8);  // 24 sums, 3 errors of 32 registers; broadcasts from memory
PGOLF_VECTOR(Double, double, __m512d, _mm512, pd, 8, 3, 8);
#include "gptq/columns_tile.inl"
#include "gptq/factor_tile.inl"
#undef PGOLF_TARGET
}  // namespace avx512

#undef PGOLF_VECTOR
#endif

// What the two passes need of one instruction set and precision.
template <class T>
struct Kernels {
  void (*quantize_rows)(const GptqMatrix&, bool, int64_t, int64_t, int64_t);
  int32_t (*factor_diagonal)(T*, int64_t, int64_t, int64_t);
  void (*factor_right)(T*, int64_t, int64_t, int64_t, int64_t, int64_t);
  void (*factor_below)(T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
  int64_t rows, group;
};

#define PGOLF_KERNELS(ISA, V)                                                                                       \
  Kernels<ISA::V::Scalar> {                                                                                         \
    ISA::quantize_rows<ISA::V>, ISA::factor_diagonal<ISA::V>, ISA::factor_right<ISA::V>, ISA::factor_below<ISA::V>, \
        ISA::V::kLanes *ISA::V::kVectors, ISA::V::kGroup                                                            \
  }

template <class T>
Kernels<T> kernels() {
  constexpr bool is_float = sizeof(T) == 4;
  switch (detect_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      if constexpr (is_float)
        return PGOLF_KERNELS(avx512, Float);
      else
        return PGOLF_KERNELS(avx512, Double);
    case Isa::avx2:
      if constexpr (is_float)
        return PGOLF_KERNELS(avx2, Float);
      else
        return PGOLF_KERNELS(avx2, Double);
#endif
    default:
      if constexpr (is_float)
        return PGOLF_KERNELS(baseline, Float);
      else
        return PGOLF_KERNELS(baseline, Double);
  }
}

#undef PGOLF_KERNELS

template <class T>
int32_t factor(const GptqHessian& h, int threads) {
  const Kernels<T> kernel = kernels<T>();
  const auto* hessian = static_cast<const T*>(h.hessian);
  const auto* diagonal = static_cast<const T*>(h.diagonal);
  auto* out = static_cast<T*>(h.factor);
  const int64_t n = h.size;
  const int64_t wide = (n + kernel.rows - 1) / kernel.rows * kernel.rows;
  const int64_t tall = (n + kernel.group - 1) / kernel.group * kernel.group;
  const int64_t stride = wide + 64 / sizeof(T);  // rows that start in different cache sets
  AlignedBuffer<T> buffer(tall * stride);
  T* work = buffer.get();
  parallel_for(tall, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T* row = work + j * stride;
      std::fill_n(row, stride, T(0));
      if (j >= n) continue;
      const T* source = hessian + int64_t{h.order[j]} * n;
      row[j] = -diagonal[j];
      for (int64_t i = j + 1; i < n; ++i) row[i] = -source[h.order[i]];
    }
  });
  int32_t failed = 0;
  for (int64_t b0 = 0; b0 < n && failed == 0; b0 += baseline::kFactorBlock) {
    const int64_t b1 = std::min(n, b0 + baseline::kFactorBlock);
    failed = kernel.factor_diagonal(work, stride, b0, b1);
    if (failed != 0 || b1 == n) break;
    parallel_for((wide - b1) / kernel.rows, 2, threads, [&](int64_t begin, int64_t end) {
      kernel.factor_right(work, stride, b0, b1, b1 + begin * kernel.rows, b1 + end * kernel.rows);
    });
    // Rows further down are shorter: pieces from both ends keep the threads even.
    const int64_t pieces = (tall - b1 + baseline::kFactorBlock - 1) / baseline::kFactorBlock;
    parallel_for((pieces + 1) / 2, 1, threads, [&](int64_t begin, int64_t end) {
      const auto update = [&](int64_t piece) {
        const int64_t first = b1 + piece * baseline::kFactorBlock;
        kernel.factor_below(work, stride, wide, b0, b1, first, std::min(tall, first + baseline::kFactorBlock));
      };
      for (int64_t piece = begin; piece < end; ++piece) {
        update(piece);
        if (pieces - 1 - piece != piece) update(pieces - 1 - piece);
      }
    });
  }
  // The lower factor is the transpose; squares of 16 keep both sides in the cache.
  parallel_for((n + 15) / 16, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i0 = begin * 16; i0 < std::min(n, end * 16); i0 += 16)
      for (int64_t j0 = 0; j0 < n; j0 += 16)
        for (int64_t i = i0; i < std::min(n, i0 + 16); ++i)
          for (int64_t j = j0; j < std::min(n, j0 + 16); ++j) out[i * n + j] = j <= i ? work[j * stride + i] : T(0);
  });
  return failed;
}

}  // namespace

int32_t gptq_factor_cpu(const GptqHessian& hessian, bool is_double, int threads) {
  return is_double ? factor<double>(hessian, threads) : factor<float>(hessian, threads);
}

void gptq_columns_cpu(const GptqMatrix* matrices, int64_t count, bool is_double, bool residual, int64_t block,
                      int threads) {
  const auto quantize = is_double ? kernels<double>().quantize_rows : kernels<float>().quantize_rows;
  constexpr int64_t grain = 48;
  for (const GptqMatrix* m = matrices; m != matrices + count; ++m)
    parallel_for(m->rows, grain, threads,
                 [&](int64_t begin, int64_t end) { quantize(*m, residual, block, begin, end); });
}

}  // namespace pgolf
