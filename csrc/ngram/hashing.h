#pragma once
#include <cstdint>

namespace pgolf::ngram {

// Facts of the published expert (openai/parameter-golf pull request 1514): its multipliers decide which contexts
// collide, so the compatible mode needs the same ones.
inline constexpr uint32_t kPrimes[32] = {36313,   27191,   51647,   81929,   131071,  196613,  262147,  393241,
                                         524309,  655373,  786433,  917521,  1048583, 1179653, 1310729, 1441801,
                                         1572869, 1703941, 1835017, 1966087, 2097169, 2228243, 2359319, 2490389,
                                         2621471, 2752549, 2883617, 3014687, 3145757, 3276833, 3407903, 3538973};
inline constexpr int kPrimeBits = 22;
inline constexpr uint64_t kPairMix = 1000003;
inline constexpr int kPairMixBits = 20;
inline constexpr uint64_t kPrefixBase = 1099511628211;
inline constexpr uint64_t kLengthMix = 0x9E3779B185EBCA87;
inline constexpr uint64_t kTableMix = 0x9E3779B97F4A7C15;
inline constexpr int kProbes = 16;

// When a context of this order gives a hint: enough occurrences, and a large enough share of the best token.
struct OrderRule {
  double threshold;
  uint32_t least_count;
};

inline OrderRule rule_of(int64_t order, double threshold_scale) {
  if (order <= 10) return {0.70 * threshold_scale, 3};
  if (order <= 13) return {0.60 * threshold_scale, 2};
  return {0.50 * threshold_scale, 2};
}

inline uint64_t pair_key(uint64_t context, uint16_t token, int64_t prime) {
  return (context * kPairMix) ^ (uint64_t{token} * kPrimes[prime % 32]);
}

// out[i] = XOR over k = 1..order of tokens[begin + i - k] * kPrimes[k - 1]; begin >= order.
void context_keys(const uint16_t* tokens, int64_t begin, int64_t count, int64_t order, uint64_t* out);

}  // namespace pgolf::ngram
