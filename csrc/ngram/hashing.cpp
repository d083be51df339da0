#include "ngram/hashing.h"

#include "common/system.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own AVX-512 intrinsics
#endif
#include <immintrin.h>
#endif

namespace pgolf::ngram {
namespace {

void keys_baseline(const uint16_t* tokens, int64_t begin, int64_t count, int64_t order, uint64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t key = 0;
    for (int64_t k = 0; k < order; ++k) key ^= uint64_t{tokens[begin + i - 1 - k]} * kPrimes[k];
    out[i] = key;
  }
}

#if defined(__x86_64__)
// A product of a token and a prime has at most 38 bits: the 32 x 32 -> 64 bit multiplication is enough.
__attribute__((target("avx2"))) void keys_avx2(const uint16_t* tokens, int64_t begin, int64_t count, int64_t order,
                                               uint64_t* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    __m256i key = _mm256_setzero_si256();
    for (int64_t k = 0; k < order; ++k) {
      const auto* at = reinterpret_cast<const __m128i*>(tokens + begin + i - 1 - k);
      key = _mm256_xor_si256(
          key, _mm256_mul_epu32(_mm256_cvtepu16_epi64(_mm_loadl_epi64(at)), _mm256_set1_epi64x(kPrimes[k])));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), key);
  }
  keys_baseline(tokens, begin + i, count - i, order, out + i);
}

__attribute__((target("avx512f"))) void keys_avx512(const uint16_t* tokens, int64_t begin, int64_t count, int64_t order,
                                                    uint64_t* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m512i key = _mm512_setzero_si512();
    for (int64_t k = 0; k < order; ++k) {
      const auto* at = reinterpret_cast<const __m128i*>(tokens + begin + i - 1 - k);
      key = _mm512_xor_si512(
          key, _mm512_mul_epu32(_mm512_cvtepu16_epi64(_mm_loadu_si128(at)), _mm512_set1_epi64(kPrimes[k])));
    }
    _mm512_storeu_si512(out + i, key);
  }
  keys_baseline(tokens, begin + i, count - i, order, out + i);
}
#endif

}  // namespace

void context_keys(const uint16_t* tokens, int64_t begin, int64_t count, int64_t order, uint64_t* out) {
  switch (detect_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return keys_avx512(tokens, begin, count, order, out);
    case Isa::avx2:
      return keys_avx2(tokens, begin, count, order, out);
#endif
    default:
      return keys_baseline(tokens, begin, count, order, out);
  }
}

}  // namespace pgolf::ngram
