// One row of softcap cross-entropy on the CPU. softcap_ce_{baseline,avx2,avx512}.cpp compile this text for their
// instruction set: the loops have no branches and no calls, so the compiler's vectoriser does the rest. PGOLF_ISA names
// the namespace. Only plain loops in here: an inline function of the standard library compiled for AVX-512 could be
// picked by the linker for everybody.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "softcap_ce/softcap_ce.h"

namespace pgolf {
namespace PGOLF_ISA {

// Elements that are converted, transformed and summed at a time: four float buffers stay in the first-level cache.
constexpr int kBlock = 1024;
constexpr int kLanes = 16;
constexpr double kLargestFixedTop = 40.0;  // of z: up to it a plain sum of exponentials stays within float

inline float fused(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

struct ExpParts {
  float scale;     // 2^n
  float fraction;  // exp(r) - 1, |r| <= ln(2) / 2
};

// exp(x) = scale * (1 + fraction), for |x| <= 87. Cody and Waite's reduction, then a polynomial of degree 6 (relative
// error of `fraction` 2e-8, so that expm1 keeps its accuracy near zero).
inline ExpParts exp_parts(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = fused(x, 1.44269504f, kRound);
  const float n = shifted - kRound;
#ifdef __FMA__
  const float r = fused(n, -0.693147182f, x);  // ln(2) to 2e-9: with one rounding its error stays below float's
#else
  const float r = x - n * 0.693145752f - n * 1.42860677e-6f;  // n * the first part is exact
#endif
  float p = 1.38825073e-3f;
  p = fused(p, r, 8.36658105e-3f);
  p = fused(p, r, 4.16672006e-2f);
  p = fused(p, r, 1.66665435e-1f);
  p = fused(p, r, 4.99999970e-1f);
  return {float_of((bits_of(shifted) << 23) + 0x3f800000u), fused(p * r, r, r)};
}

// For x <= about 88; NaN stays NaN. Below -87: exp(-87) = 2e-38, or zero where logits have no bound (a masked logit).
template <bool kZero>
inline float exp_of(float x) {
  const ExpParts e = exp_parts(x < -87.0f ? -87.0f : x);
  const float y = fused(e.scale, e.fraction, e.scale);
  return kZero && x < -87.0f ? 0.0f : y;
}
template <bool kZero>
inline double exp_of(double x) {
  return ::exp(x);
}

template <class T>
struct Capped {
  T z;      // the softcapped logit over the temperature
  T slope;  // dz/da
};

struct Caps {
  double inverse;  // 1 / softcap
  double height;   // softcap / temperature
  double slope;    // 1 / temperature
};

// tanh(x) = expm1(2x) / (expm1(2x) + 2), 1 - tanh(x)^2 = 4 exp(2x) / (exp(2x) + 1)^2: no cancellation on either side.
inline Capped<float> cap(float a, float inverse2, float height, float slope) {
  float y = a * inverse2;
  y = y > 80.0f ? 80.0f : y;  // the slope there is 7e-35: nothing is lost
  y = y < -80.0f ? -80.0f : y;
  const ExpParts e = exp_parts(y);
  const float expm1 = fused(e.scale, e.fraction, e.scale - 1.0f);
  const float inverse = 1.0f / (expm1 + 2.0f);
  const float u = fused(e.scale, e.fraction, e.scale);
  return {height * (expm1 * inverse), slope * (4.0f * u * inverse) * inverse};
}
inline Capped<double> cap(double a, double inverse2, double height, double slope) {
  const double t = ::tanh(0.5 * a * inverse2);
  return {height * t, slope * (1.0 - t) * (1.0 + t)};
}

template <bool kCap, class T>
inline Capped<T> transform(T a, const Caps& caps) {
  if (kCap) return cap(a, T(2.0 * caps.inverse), T(caps.height), T(caps.slope));
  return {a * T(caps.slope), T(caps.slope)};
}

// Storage of one dtype: T is what is computed with.
struct F64 {
  using T = double;
  using Stored = double;
  static T load(Stored x) { return x; }
  static Stored store(T x) { return x; }
};
struct F32 {
  using T = float;
  using Stored = float;
  static T load(Stored x) { return x; }
  static Stored store(T x) { return x; }
};
struct BF16 {
  using T = float;
  using Stored = uint16_t;
  static T load(Stored x) { return float_of(uint32_t(x) << 16); }
  static Stored store(T x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return Stored((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};
struct F16 {
  using T = float;
  using Stored = uint16_t;
  static T load(Stored x) {
    const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13;
    const float value = float_of(magnitude) * float_of(0x77800000u);  // times 2^112: denormals come out right
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return float_of(bits_of(value) | special | (uint32_t(x & 0x8000u) << 16));
  }
  static Stored store(T x) {
    const uint32_t u = bits_of(x);
    const uint32_t magnitude = u & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? denormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return Stored(half | ((u >> 16) & 0x8000u));
  }
};

template <class T>
inline T max_of_block(const T* a, int n, T so_far) {
  T lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = so_far;
  int j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = a[j + l] > lanes[l] ? a[j + l] : lanes[l];
  for (; j < n; ++j) lanes[0] = a[j] > lanes[0] ? a[j] : lanes[0];
  for (int l = 1; l < kLanes; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  return lanes[0];
}

template <class T>
inline double sum_of_block(const T* a, int n) {
  T lanes[kLanes] = {};
  int j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[j + l];
  double sum = 0.0;
  for (; j < n; ++j) sum += double(a[j]);
  for (int l = 0; l < kLanes; ++l) sum += double(lanes[l]);
  return sum;
}

template <class S>
inline const typename S::T* load_block(const typename S::Stored* row, int n, typename S::T* buffer) {
  for (int j = 0; j < n; ++j) buffer[j] = S::load(row[j]);
  return buffer;
}
template <>
inline const float* load_block<F32>(const float* row, int, float*) {
  return row;
}

template <class S, bool kCap>
struct Rows {
  using T = typename S::T;
  using Stored = typename S::Stored;

  const SoftcapCE& ce;
  Caps caps;

  explicit Rows(const SoftcapCE& ce)
      : ce(ce), caps{kCap ? 1.0 / ce.softcap : 0.0, ce.softcap / ce.temperature, 1.0 / ce.temperature} {}

  const Stored* row(int64_t i) const { return static_cast<const Stored*>(ce.logits) + i * ce.row_stride; }
  T z_at(int64_t i, int64_t j) const { return transform<kCap>(S::load(row(i)[j]), caps).z; }
  bool outside(int64_t index) const { return index < 0 || index >= ce.vocab; }

  // lse(z) of row i, in double: the target's logit is taken from it before anything is rounded.
  double lse(int64_t i) const {
    const Stored* logits = row(i);
    T buffer[kBlock];
    T shift = 0;
    if (!kCap || caps.height > kLargestFixedTop) {
      T top = S::load(logits[0]);
      for (int64_t start = 0; start < ce.vocab; start += kBlock) {
        const int n = int(ce.vocab - start < kBlock ? ce.vocab - start : kBlock);
        top = max_of_block(load_block<S>(logits + start, n, buffer), n, top);
      }
      shift = transform<kCap>(top, caps).z;  // z grows with a
    }
    T powers[kBlock];
    double sum = 0.0;
    for (int64_t start = 0; start < ce.vocab; start += kBlock) {
      const int n = int(ce.vocab - start < kBlock ? ce.vocab - start : kBlock);
      const T* a = load_block<S>(logits + start, n, buffer);
      for (int j = 0; j < n; ++j) powers[j] = transform<kCap>(a[j], caps).z - shift;  // two loops: one fused is slower
      for (int j = 0; j < n; ++j) powers[j] = exp_of<!kCap>(powers[j]);
      sum += sum_of_block(powers, n);
    }
    return double(shift) + ::log(sum);
  }

  // False when the target or the hint lies outside the vocabulary.
  bool forward(int64_t i, const SoftcapCELosses& out) const {
    const int64_t target = ce.targets[i];
    const int64_t hint = out.hints ? out.hints[i] : -1;
    const bool counted = target != ce.ignore_index;
    if ((counted && outside(target)) || hint < -1 || hint >= ce.vocab) return false;
    const double total = counted || hint >= 0 ? lse(i) : 0.0;
    static_cast<T*>(out.losses)[i] = counted ? T(total - double(z_at(i, target))) : T(0);
    static_cast<T*>(out.lse)[i] = T(total);
    if (out.hint_log_probs)
      static_cast<T*>(out.hint_log_probs)[i] = hint >= 0 ? T(double(z_at(i, hint)) - total) : T(-HUGE_VAL);
    return true;
  }

  void backward(int64_t i, const void* lse, const SoftcapCEGradient& out) const {
    const Stored* logits = row(i);
    Stored* dlogits = static_cast<Stored*>(out.dlogits) + i * out.row_stride;
    const int64_t target = ce.targets[i];
    if (target == ce.ignore_index) {
      for (int64_t j = 0; j < ce.vocab; ++j) dlogits[j] = Stored(0);
      return;
    }
    const T upstream = static_cast<const T*>(out.upstream)[i * out.upstream_stride];
    const T total = static_cast<const T*>(lse)[i];
    const T at_target = upstream * transform<kCap>(S::load(logits[target]), caps).slope;
    T buffer[kBlock];
    T slope[kBlock];
    T gradient[kBlock];
    for (int64_t start = 0; start < ce.vocab; start += kBlock) {
      const int n = int(ce.vocab - start < kBlock ? ce.vocab - start : kBlock);
      const T* a = load_block<S>(logits + start, n, buffer);
      for (int j = 0; j < n; ++j) {
        const Capped<T> capped = transform<kCap>(a[j], caps);
        slope[j] = upstream * capped.slope;
        gradient[j] = capped.z - total;
      }
      for (int j = 0; j < n; ++j) gradient[j] = slope[j] * exp_of<!kCap>(gradient[j]);
      if (target >= start && target < start + n) gradient[target - start] -= at_target;
      for (int j = 0; j < n; ++j) dlogits[start + j] = S::store(gradient[j]);
    }
  }
};

template <class Body>
void with_rows(const SoftcapCE& ce, const Body& body) {
  const bool capped = ce.softcap > 0.0;
  switch (ce.dtype) {
    case DType::f32:
      return capped ? body(Rows<F32, true>(ce)) : body(Rows<F32, false>(ce));
    case DType::bf16:
      return capped ? body(Rows<BF16, true>(ce)) : body(Rows<BF16, false>(ce));
    case DType::f16:
      return capped ? body(Rows<F16, true>(ce)) : body(Rows<F16, false>(ce));
    case DType::f64:
      return capped ? body(Rows<F64, true>(ce)) : body(Rows<F64, false>(ce));
  }
}

// Rows [begin, end); the first bad row, or -1.
int64_t softcap_ce_rows(const SoftcapCE& ce, const SoftcapCELosses* losses, const void* lse,
                        const SoftcapCEGradient* gradient, int64_t begin, int64_t end) {
  int64_t bad = -1;
  with_rows(ce, [&](const auto& rows) {
    for (int64_t i = begin; i < end; ++i) {
      if (losses && !rows.forward(i, *losses)) {
        bad = i;
        return;
      }
      if (gradient) rows.backward(i, lse, *gradient);
    }
  });
  return bad;
}

}  // namespace PGOLF_ISA
}  // namespace pgolf
