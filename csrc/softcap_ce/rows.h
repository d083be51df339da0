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

// Elements that are converted, transformed and summed at a time: a few float buffers stay in the first-level cache.
// Every loop over a block holds one short chain of dependent operations and hands its result on in a buffer: a longer
// chain fills the processor's scheduler and runs at its latency, at half the speed.
constexpr int kBlock = 1024;
constexpr int kLanes = 16;
constexpr double kLog2E = 1.4426950408889634;

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

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the sum's low bits

// (2^f - 1) / f for |f| <= 1/2, to 2e-8 of 2^f - 1.
inline float exp2m1_over(float f) {
  float p = 1.54035122e-4f;
  p = fused(p, f, 1.33907586e-3f);
  p = fused(p, f, 9.61823761e-3f);
  p = fused(p, f, 5.55035733e-2f);
  p = fused(p, f, 2.40226492e-1f);
  return fused(p, f, 6.93147182e-1f);
}

// 2^(f + n) for |f| <= 1/2 and n the integer in the low bits of `rounded`; n from -126 to 127.
inline float exp2_of(float f, float rounded) {
  return float_of(bits_of(fused(exp2m1_over(f), f, 1.0f)) + (bits_of(rounded) << 23));
}

// exp(x) for x <= about 88; NaN stays NaN. Below -87: exp(-87) = 2e-38, or zero where logits have no bound (a masked
// logit).
template <bool kZero>
inline float exp_of(float x) {
  const float y = x < -87.0f ? -87.0f : x;
  const float rounded = fused(y, float(kLog2E), kRound);
  const float n = rounded - kRound;
#ifdef __FMA__
  const float r = fused(n, -0.693147182f, y);  // ln(2) to 2e-9: with one rounding its error stays below float's
#else
  const float r = y - n * 0.693145752f - n * 1.42860677e-6f;  // n * the first part is exact
#endif
  const float power = exp2_of(r * float(kLog2E), rounded);
  return kZero && x < -87.0f ? 0.0f : power;
}
template <bool kZero>
inline double exp_of(double x) {
  return ::exp(x);
}

template <class T>
struct Tangent {
  T tanh;
  T slope;  // 1 - tanh^2
};

// Of x = a * rate / (2 log2(e)). With e = exp(2x): tanh = (e - 1) / (e + 1) and 1 - tanh^2 = 4 e / (e + 1)^2, without
// cancellation on either side.
inline Tangent<float> tangent(float a, float rate) {
  float y = a * rate;
  y = y > 115.0f ? 115.0f : y;  // the slope there is 1e-34: nothing is lost
  y = y < -115.0f ? -115.0f : y;
  const float rounded = y + kRound;
  const float f = y - (rounded - kRound);
  const float scale = float_of((bits_of(rounded) << 23) + 0x3f800000u);
  const float fraction = exp2m1_over(f) * f;
  const float less_one = fused(scale, fraction, scale - 1.0f);
  const float inverse = 1.0f / (less_one + 2.0f);
  return {less_one * inverse, (4.0f * fused(scale, fraction, scale) * inverse) * inverse};
}
inline Tangent<double> tangent(double a, double rate) {
  const double t = ::tanh(a * rate * (0.5 / kLog2E));
  return {t, (1.0 - t) * (1.0 + t)};
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

// Fetches the block after this one: the processor's own prefetching ends at every page.
template <class Stored>
inline void fetch_ahead(const Stored* block) {
  const char* next = reinterpret_cast<const char*>(block + kBlock);
  for (int j = 0; j < int(kBlock * sizeof(Stored)); j += 64) __builtin_prefetch(next + j);
}

template <class S>
inline const typename S::T* load_block(const typename S::Stored* row, int n, typename S::T* buffer) {
  fetch_ahead(row);
  for (int j = 0; j < n; ++j) buffer[j] = S::load(row[j]);
  return buffer;
}
template <>
inline const float* load_block<F32>(const float* row, int, float*) {
  fetch_ahead(row);
  return row;
}

template <class Body>
inline void for_blocks(int64_t vocab, const Body& body) {
  for (int64_t start = 0; start < vocab; start += kBlock)
    body(start, int(vocab - start < kBlock ? vocab - start : kBlock));
}

enum class Form {
  plain,    // z = a / temperature
  capped,   // z = softcap * tanh(a / softcap) / temperature
  bounded,  // the same where exp(z) and exp(z - lse) stay within float whatever the logits are
};

template <class S, Form kForm>
struct Rows {
  using T = typename S::T;
  using Stored = typename S::Stored;
  static constexpr bool kCap = kForm != Form::plain;

  const SoftcapCE& ce;
  const T rate;     // of `tangent`
  const T height;   // softcap / temperature
  const T inverse;  // 1 / temperature

  explicit Rows(const SoftcapCE& ce)
      : ce(ce),
        rate(T(kCap ? 2.0 * kLog2E / ce.softcap : 0.0)),
        height(T(ce.softcap / ce.temperature)),
        inverse(T(1.0 / ce.temperature)) {}

  const Stored* row(int64_t i) const { return static_cast<const Stored*>(ce.logits) + i * ce.row_stride; }
  bool outside(int64_t index) const { return index < 0 || index >= ce.vocab; }
  Tangent<T> tangent_of(T a) const { return kCap ? tangent(a, rate) : Tangent<T>{T(0), T(1)}; }
  T z_of(T a) const { return kCap ? height * tangent_of(a).tanh : a * inverse; }
  T z_at(int64_t i, int64_t j) const { return z_of(S::load(row(i)[j])); }

  // lse(z) of row i, in double: the target's logit is taken from it before anything is rounded. The bounded form leaves
  // the row's slopes and powers in `kept` when it is not null.
  double lse(int64_t i, float* kept) const {
    if constexpr (kForm == Form::bounded) return lse_bounded(row(i), kept);
    return lse_general(row(i));
  }

  void tangents_of(const float* a, int n, float* tanh, float* slope) const {
    for (int j = 0; j < n; ++j) {
      const Tangent<float> at = tangent(a[j], rate);
      tanh[j] = at.tanh;
      slope[j] = at.slope;
    }
  }

  double lse_bounded(const Stored* logits, float* kept) const {
    float buffer[kBlock], powers[kBlock];
    const float top = height * float(kLog2E);
    double sum = 0.0;
    for_blocks(ce.vocab, [&](int64_t start, int n) {
      const float* a = load_block<S>(logits + start, n, buffer);
      float* power = kept ? kept + ce.vocab + start : powers;
      if (kept)
        tangents_of(a, n, power, kept + start);
      else
        for (int j = 0; j < n; ++j) power[j] = tangent(a[j], rate).tanh;
      for (int j = 0; j < n; ++j) {
        const float rounded = fused(power[j], top, kRound);
        power[j] = exp2_of(fused(power[j], top, kRound - rounded), rounded);
      }
      sum += sum_of_block(power, n);
    });
    return ::log(sum);
  }

  double lse_general(const Stored* logits) const {
    T buffer[kBlock], powers[kBlock];
    T top = S::load(logits[0]);
    for_blocks(ce.vocab,
               [&](int64_t start, int n) { top = max_of_block(load_block<S>(logits + start, n, buffer), n, top); });
    const T shift = z_of(top);  // z grows with a
    double sum = 0.0;
    for_blocks(ce.vocab, [&](int64_t start, int n) {
      const T* a = load_block<S>(logits + start, n, buffer);
      for (int j = 0; j < n; ++j) powers[j] = z_of(a[j]) - shift;
      for (int j = 0; j < n; ++j) powers[j] = exp_of<!kCap>(powers[j]);
      sum += sum_of_block(powers, n);
    });
    return double(shift) + ::log(sum);
  }

  // False when the target or the hint lies outside the vocabulary.
  bool forward(int64_t i, const SoftcapCELosses& out, float* kept) const {
    const int64_t target = ce.targets[i];
    const int64_t hint = out.hints ? out.hints[i] : -1;
    const bool counted = target != ce.ignore_index;
    if ((counted && outside(target)) || hint < -1 || hint >= ce.vocab) return false;
    const double total = counted || hint >= 0 ? lse(i, kept) : 0.0;
    static_cast<T*>(out.losses)[i] = counted ? T(total - double(z_at(i, target))) : T(0);
    static_cast<T*>(out.lse)[i] = T(total);
    if (out.hint_log_probs)
      static_cast<T*>(out.hint_log_probs)[i] = hint >= 0 ? T(double(z_at(i, hint)) - total) : T(-HUGE_VAL);
    return true;
  }

  // `kept`: what `forward` left of this row, or null.
  void backward(int64_t i, const void* lse, const SoftcapCEGradient& out, const float* kept) const {
    const Stored* logits = row(i);
    Stored* dlogits = static_cast<Stored*>(out.dlogits) + i * out.row_stride;
    const int64_t target = ce.targets[i];
    if (target == ce.ignore_index) {
      for (int64_t j = 0; j < ce.vocab; ++j) dlogits[j] = Stored(0);
      return;
    }
    const T upstream = static_cast<const T*>(out.upstream)[i * out.upstream_stride];
    const T total = static_cast<const T*>(lse)[i];
    const T factor = upstream * inverse;
    const T at_target = factor * tangent_of(S::load(logits[target])).slope;
    T gradient[kBlock];
    const auto write = [&](int64_t start, int n) {
      if (target >= start && target < start + n) gradient[target - start] -= at_target;
      for (int j = 0; j < n; ++j) dlogits[start + j] = S::store(gradient[j]);
    };
    if constexpr (kForm == Form::bounded) {
      if (kept) {
        const float share = float(::exp(-double(total)));
        for_blocks(ce.vocab, [&](int64_t start, int n) {
          const float* slope = kept + start;
          const float* power = kept + ce.vocab + start;
          for (int j = 0; j < n; ++j) gradient[j] = (factor * slope[j]) * (power[j] * share);
          write(start, n);
        });
      } else {
        backward_bounded(logits, total, factor, gradient, write);
      }
    } else {
      backward_general(logits, total, factor, gradient, write);
    }
  }

  // exp(z - lse) = 2^(height2 tanh - whole) * 2^-rest with lse in base two split into an integer and the rest: the
  // integer goes into the power's exponent, the rest into the factor of the row.
  template <class Write>
  void backward_bounded(const Stored* logits, float total, float factor, float* gradient, const Write& write) const {
    float buffer[kBlock], t[kBlock], slope[kBlock];
    const float top = height * float(kLog2E);
    const double total2 = double(total) * kLog2E;
    const double whole = ::floor(total2);
    const float own = factor * float(::exp((whole - total2) / kLog2E));
    const float round = kRound - float(whole);
    for_blocks(ce.vocab, [&](int64_t start, int n) {
      tangents_of(load_block<S>(logits + start, n, buffer), n, t, slope);
      for (int j = 0; j < n; ++j) {
        const float rounded = fused(t[j], top, round);
        gradient[j] = (own * slope[j]) * exp2_of(fused(t[j], top, round - rounded), rounded);
      }
      write(start, n);
    });
  }

  template <class Write>
  void backward_general(const Stored* logits, T total, T factor, T* gradient, const Write& write) const {
    T buffer[kBlock], slope[kBlock];
    for_blocks(ce.vocab, [&](int64_t start, int n) {
      const T* a = load_block<S>(logits + start, n, buffer);
      for (int j = 0; j < n; ++j) {
        const Tangent<T> at = tangent_of(a[j]);
        slope[j] = factor * at.slope;
        gradient[j] = (kCap ? height * at.tanh : a[j] * inverse) - total;
      }
      for (int j = 0; j < n; ++j) gradient[j] = slope[j] * exp_of<!kCap>(gradient[j]);
      write(start, n);
    });
  }
};

template <class S, class Body>
void with_form(const SoftcapCE& ce, const Body& body) {
  if (!(ce.softcap > 0.0)) return body(Rows<S, Form::plain>(ce));
  if constexpr (sizeof(typename S::T) == sizeof(float)) {
    // |z| <= softcap / temperature and lse <= that + log(vocab): the least power is above the smallest normal number.
    if (2.0 * ce.softcap / ce.temperature + ::log(double(ce.vocab)) <= 87.0) return body(Rows<S, Form::bounded>(ce));
  }
  body(Rows<S, Form::capped>(ce));
}

template <class Body>
void with_rows(const SoftcapCE& ce, const Body& body) {
  switch (ce.dtype) {
    case DType::f32:
      return with_form<F32>(ce, body);
    case DType::bf16:
      return with_form<BF16>(ce, body);
    case DType::f16:
      return with_form<F16>(ce, body);
    case DType::f64:
      return with_form<F64>(ce, body);
  }
}

// Rows [begin, end); the first bad row, or -1. `kept`: 2 * vocab floats where both losses and gradient are wanted.
int64_t softcap_ce_rows(const SoftcapCE& ce, const SoftcapCELosses* losses, const void* lse,
                        const SoftcapCEGradient* gradient, float* kept, int64_t begin, int64_t end) {
  int64_t bad = -1;
  with_rows(ce, [&](const auto& rows) {
    for (int64_t i = begin; i < end; ++i) {
      if (losses && !rows.forward(i, *losses, kept)) {
        bad = i;
        return;
      }
      if (gradient) rows.backward(i, lse, *gradient, kept);
    }
  });
  return bad;
}

}  // namespace PGOLF_ISA
}  // namespace pgolf
