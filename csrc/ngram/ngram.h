#pragma once
#include <cstdint>

namespace pgolf {

// The settings of pgolf_kernels.ngram.ngram_hints. Orders are different and descending, 1 to 32.
struct NgramSettings {
  const int64_t* orders;
  int order_count;
  int table_bits;
  int token_bits;  // every token is below 2^token_bits
  double threshold_scale;
  double base_beta;
  double agree_bonus;
  double within_threshold;
  double within_beta;
  double word_threshold;
  double word_beta;
  const uint8_t* has_leading_space;  // by token; null: the voters are off
  const uint8_t* is_boundary;        // by token; null: no token is one
  bool full_hash;
};

// hints[n] (-1: none) and betas[n] (0 where there is no hint) of `n` tokens, n < 2^31. The result does not depend on
// `threads`.
void ngram_hints_cpu(const uint16_t* tokens, int64_t n, const NgramSettings& settings, int threads, int32_t* hints,
                     double* betas);

}  // namespace pgolf
