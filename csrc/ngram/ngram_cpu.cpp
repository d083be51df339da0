// Runs the experts and settles which of them speaks at each position.
#include <algorithm>
#include <future>

#include "common/parallel.h"
#include "ngram/experts.h"
#include "ngram/ngram.h"

namespace pgolf {
namespace {

using namespace ngram;

// Two candidates with one hint each gain the agreement bonus; the largest beta wins, ties go to the first of token
// expert, within-word voter, word-start voter.
void settle(const Stream& stream, const NgramSettings& settings, const Votes& votes, int64_t p) {
  struct Candidate {
    int32_t hint;
    double beta;
  };
  Candidate candidates[3];
  int count = 0;
  if (stream.hints[p] >= 0) candidates[count++] = {stream.hints[p], stream.betas[p]};
  if (votes.within[p] >= 0) candidates[count++] = {votes.within[p], settings.within_beta};
  if (votes.word[p] >= 0) candidates[count++] = {votes.word[p], settings.word_beta};
  if (count == 0) return;
  for (int a = 0; a < count; ++a) {
    bool agrees = false;
    for (int b = 0; b < count; ++b) agrees |= a != b && candidates[a].hint == candidates[b].hint;
    if (agrees) candidates[a].beta += settings.agree_bonus;
  }
  const Candidate* best = candidates;
  for (int a = 1; a < count; ++a)
    if (candidates[a].beta > best->beta) best = candidates + a;
  stream.hints[p] = best->hint;
  stream.betas[p] = best->beta;
}

}  // namespace

void ngram_hints_cpu(const uint16_t* tokens, int64_t n, const NgramSettings& settings, int threads, int32_t* hints,
                     double* betas) {
  constexpr int64_t grain = 1 << 16;
  const Stream stream{tokens, n, int64_t{1} << 19, hints, betas};
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    std::fill(hints + begin, hints + end, -1);
    std::fill(betas + begin, betas + end, 0.0);
  });
  Votes votes;
  std::vector<Stage> stages;
  const bool voting = settings.has_leading_space != nullptr;
  if (!settings.full_hash) {
    add_compatible_stages(stream, settings, stages);
    if (voting) add_voter_stage(stream, settings, votes, stages);
    run_stages(stages, stream.blocks(), threads);
  } else if (voting) {
    // The voters' tables are one sequential pass: it takes one thread, the token expert the others.
    add_voter_stage(stream, settings, votes, stages);
    std::future<void> voters;
    if (threads > 1) voters = std::async(std::launch::async, [&] { run_stages(stages, stream.blocks(), 1); });
    full_hash_hints(stream, settings, std::max(1, threads - 1));
    if (threads > 1)
      voters.get();
    else
      run_stages(stages, stream.blocks(), 1);
  } else {
    full_hash_hints(stream, settings, threads);
  }
  if (!voting) return;
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = std::max<int64_t>(begin, 1); p < end; ++p) settle(stream, settings, votes, p);
  });
}

}  // namespace pgolf
