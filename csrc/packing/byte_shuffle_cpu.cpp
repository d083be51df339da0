// One pass, items in blocks of one vector a plane. Strides 2 and 4 have AVX2 and AVX-512 kernels; every other stride
// goes through a 16 x 16 byte transposition, whose unused rows cost less than a loop over bytes.
#include <cstring>

#include "common/system.h"
#include "packing/byte_shuffle.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define PGOLF_X86 1
#endif

namespace pgolf {
namespace {

// Start of every plane for n bytes; planes differ in length by one when the tail is strided.
struct Planes {
  int64_t start[kMaxStride];
  int64_t items;  // whole items
  Planes(int64_t n, int stride, Tail tail) : items(n / stride) {
    const int64_t rest = tail == Tail::strided ? n % stride : 0;
    for (int b = 0; b < stride; ++b) start[b] = b * items + (b < rest ? b : rest);
  }
};

// Items [begin, items) and the tail, a byte at a time. `Forward`: planes <- items, else items <- planes.
template <bool Forward>
void finish(uint8_t* dst, const uint8_t* src, int64_t n, int stride, Tail tail, const Planes& planes, int64_t begin) {
  auto move = [&](int64_t item, int64_t plane) {
    if (Forward)
      dst[plane] = src[item];
    else
      dst[item] = src[plane];
  };
  for (int64_t i = begin; i < planes.items; ++i)
    for (int b = 0; b < stride; ++b) move(i * stride + b, planes.start[b] + i);
  const int64_t whole = planes.items * stride;
  for (int64_t k = 0; k < n - whole; ++k)
    move(whole + k, tail == Tail::strided ? planes.start[k] + planes.items : whole + k);
}

#ifdef PGOLF_X86

// Rows of 16 bytes -> columns: four rounds of interleaving row i with row i + 8.
inline void transpose16(__m128i (&r)[16]) {
  __m128i t[16];
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
      t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
}

// Both return how many items they moved. A load or store of 16 bytes at an item reaches past it, so the last items,
// for which that would leave the buffer, are left to finish(). In unshuffle_any the bytes written past an item are
// overwritten by the next one: items go in ascending order.
int64_t shuffle_any(uint8_t* dst, const uint8_t* src, int64_t n, int stride, const Planes& p) {
  int64_t i = 0;
  for (; i + 16 <= p.items && (i + 15) * stride + 16 <= n; i += 16) {
    __m128i r[16];
    for (int k = 0; k < 16; ++k) r[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + (i + k) * stride));
    transpose16(r);
    for (int b = 0; b < stride; ++b) _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + p.start[b] + i), r[b]);
  }
  return i;
}

int64_t unshuffle_any(uint8_t* dst, const uint8_t* src, int64_t n, int stride, const Planes& p) {
  int64_t i = 0;
  for (; i + 16 <= p.items && (i + 15) * stride + 16 <= n; i += 16) {
    __m128i r[16];
    for (int b = 0; b < 16; ++b)
      r[b] = b < stride ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + p.start[b] + i)) : _mm_setzero_si128();
    transpose16(r);
    for (int k = 0; k < 16; ++k) _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + (i + k) * stride), r[k]);
  }
  return i;
}

#define AVX2 __attribute__((target("avx2")))
inline AVX2 __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline AVX2 void store(uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

AVX2 int64_t shuffle2(uint8_t* dst, const uint8_t* src, const Planes& p) {
  const __m256i low = _mm256_set1_epi16(0x00FF);
  int64_t i = 0;
  for (; i + 32 <= p.items; i += 32) {
    const __m256i a = load(src + 2 * i), b = load(src + 2 * i + 32);
    const __m256i even = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    const __m256i odd = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    store(dst + p.start[0] + i, _mm256_permute4x64_epi64(even, 0xD8));
    store(dst + p.start[1] + i, _mm256_permute4x64_epi64(odd, 0xD8));
  }
  return i;
}

AVX2 int64_t unshuffle2(uint8_t* dst, const uint8_t* src, const Planes& p) {
  int64_t i = 0;
  for (; i + 32 <= p.items; i += 32) {
    const __m256i even = _mm256_permute4x64_epi64(load(src + p.start[0] + i), 0xD8);
    const __m256i odd = _mm256_permute4x64_epi64(load(src + p.start[1] + i), 0xD8);
    store(dst + 2 * i, _mm256_unpacklo_epi8(even, odd));
    store(dst + 2 * i + 32, _mm256_unpackhi_epi8(even, odd));
  }
  return i;
}

AVX2 int64_t shuffle4(uint8_t* dst, const uint8_t* src, const Planes& p) {
  // Within a lane: the four bytes b of its four items side by side.
  const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                          13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= p.items; i += 32) {
    __m256i v[4];
    // After the permutation the 64-bit word b of v[k] is plane b of items i + 8k .. i + 8k + 7.
    for (int k = 0; k < 4; ++k)
      v[k] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(load(src + 4 * i + 32 * k), gather), order);
    const __m256i a = _mm256_unpacklo_epi64(v[0], v[1]), b = _mm256_unpackhi_epi64(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi64(v[2], v[3]), d = _mm256_unpackhi_epi64(v[2], v[3]);
    store(dst + p.start[0] + i, _mm256_permute2x128_si256(a, c, 0x20));
    store(dst + p.start[1] + i, _mm256_permute2x128_si256(b, d, 0x20));
    store(dst + p.start[2] + i, _mm256_permute2x128_si256(a, c, 0x31));
    store(dst + p.start[3] + i, _mm256_permute2x128_si256(b, d, 0x31));
  }
  return i;
}

AVX2 int64_t unshuffle4(uint8_t* dst, const uint8_t* src, const Planes& p) {
  int64_t i = 0;
  for (; i + 32 <= p.items; i += 32) {
    const __m256i a = load(src + p.start[0] + i), b = load(src + p.start[1] + i);
    const __m256i c = load(src + p.start[2] + i), d = load(src + p.start[3] + i);
    const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    const __m256i q0 = _mm256_unpacklo_epi16(ab_low, cd_low), q1 = _mm256_unpackhi_epi16(ab_low, cd_low);
    const __m256i q2 = _mm256_unpacklo_epi16(ab_high, cd_high), q3 = _mm256_unpackhi_epi16(ab_high, cd_high);
    store(dst + 4 * i, _mm256_permute2x128_si256(q0, q1, 0x20));
    store(dst + 4 * i + 32, _mm256_permute2x128_si256(q2, q3, 0x20));
    store(dst + 4 * i + 64, _mm256_permute2x128_si256(q0, q1, 0x31));
    store(dst + 4 * i + 96, _mm256_permute2x128_si256(q2, q3, 0x31));
  }
  return i;
}
#undef AVX2

template <bool Forward>
int64_t vector_part(uint8_t* dst, const uint8_t* src, int64_t n, int stride, const Planes& p) {
  if (detect_isa() >= Isa::avx2 && stride == 2) return Forward ? shuffle2(dst, src, p) : unshuffle2(dst, src, p);
  if (detect_isa() >= Isa::avx2 && stride == 4) return Forward ? shuffle4(dst, src, p) : unshuffle4(dst, src, p);
  return Forward ? shuffle_any(dst, src, n, stride, p) : unshuffle_any(dst, src, n, stride, p);
}

#else

template <bool Forward>
int64_t vector_part(uint8_t*, const uint8_t*, int64_t, int, const Planes&) {
  return 0;
}

#endif

template <bool Forward>
void run(uint8_t* dst, const uint8_t* src, int64_t n, int stride, Tail tail) {
  if (stride == 1) {
    std::memcpy(dst, src, static_cast<size_t>(n));
    return;
  }
  const Planes planes(n, stride, tail);
  finish<Forward>(dst, src, n, stride, tail, planes, vector_part<Forward>(dst, src, n, stride, planes));
}

}  // namespace

void byte_shuffle(uint8_t* dst, const uint8_t* src, int64_t n, int stride, Tail tail) {
  run<true>(dst, src, n, stride, tail);
}

void byte_unshuffle(uint8_t* dst, const uint8_t* src, int64_t n, int stride, Tail tail) {
  run<false>(dst, src, n, stride, tail);
}

}  // namespace pgolf
