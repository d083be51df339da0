#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "ngram/memory.h"
#include "ngram/ngram.h"
#include "ngram/stages.h"

namespace pgolf::ngram {

// A stream cut into blocks, and where the token expert's hints go.
struct Stream {
  const uint16_t* tokens;
  int64_t n;
  int64_t block;
  int32_t* hints;
  double* betas;

  int64_t blocks() const { return (n + block - 1) / block; }
  int64_t begin(int64_t b) const { return b * block; }
  int64_t end(int64_t b) const { return std::min(n, (b + 1) * block); }
};

// Appends the stages of the compatible token expert: orders one after the other, highest first, two at a time.
void add_compatible_stages(const Stream& stream, const NgramSettings& settings, std::vector<Stage>& stages);

// The token expert with a 64-bit hash of each context and without dropped contexts.
void full_hash_hints(const Stream& stream, const NgramSettings& settings, int threads);

// What the within-word and the word-start voter propose at each position (-1: nothing).
struct Votes {
  ZeroedArray<int32_t> within, word;
};
// Appends one stage that fills `votes` (its arrays are allocated here).
void add_voter_stage(const Stream& stream, const NgramSettings& settings, Votes& votes, std::vector<Stage>& stages);

}  // namespace pgolf::ngram
