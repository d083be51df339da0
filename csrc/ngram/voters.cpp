// The within-word and the word-start voter of the published expert. Their contexts follow from the tokens alone: a
// small state machine turns a chunk of tokens into table operations and requests their lines, then the chunk is
// replayed.
#include <algorithm>
#include <memory>

#include "ngram/experts.h"
#include "ngram/hashing.h"
#include "ngram/tables.h"

namespace pgolf::ngram {
namespace {

constexpr int kTableBits = 20;
constexpr int kWithinTables = 3;  // by the number of tokens of the word so far: 1, 2, more
constexpr int kWordTable = kWithinTables;
constexpr int kWords = 4;  // whole words that make up the context of a word's first token
constexpr uint32_t kWordLeastCount = 3;
constexpr int64_t kChunk = 64;

class Voters {
 public:
  Voters(const Stream& stream, const NgramSettings& settings, Votes& votes)
      : stream_(stream), settings_(settings), votes_(votes) {
    for (int t = 0; t <= kWordTable; ++t) {
      pairs_.push_back(std::make_unique<WidePairs>(kTableBits));
      contexts_.push_back(std::make_unique<WideContexts>(kTableBits));
    }
  }

  void replay(int64_t b) {
    const int64_t end = stream_.end(b);
    for (int64_t at = std::max<int64_t>(1, stream_.begin(b)); at < end; at += kChunk) {
      const int64_t count = std::min(kChunk, end - at);
      for (int64_t i = 0; i < count; ++i) operations_[i] = advance(at + i);
      for (int64_t i = 0; i < count; ++i) apply(at + i, operations_[i]);
    }
  }

 private:
  // A table operation; table -1: none.
  struct Operation {
    int table = -1;
    uint64_t context = 0, pair = 0;
  };
  struct Step {
    Operation look_within, look_word, add;
  };

  bool flag(const uint8_t* flags, int64_t p) const { return flags != nullptr && flags[stream_.tokens[p]] != 0; }
  uint64_t within_context() const { return prefix_ ^ (uint64_t{length_} * kLengthMix); }
  uint64_t word_context() const {
    uint64_t key = 0;
    for (int i = 0; i < kWords; ++i) key ^= words_[i] * kPrimes[i];
    return key;
  }

  void finish_word() {
    if (word_length_ == 0) return;
    std::copy(words_ + 1, words_ + kWords, words_);
    words_[kWords - 1] = word_;
    finished_ = std::min(finished_ + 1, kWords);
    word_ = 0;
    word_length_ = 0;
  }

  // The operations of position p: lookups gated by the flags of the token before, updates by those of the token itself.
  Step advance(int64_t p) {
    Step step;
    const uint16_t token = stream_.tokens[p];
    const bool after_space = flag(settings_.has_leading_space, p - 1);
    const bool after_boundary = flag(settings_.is_boundary, p - 1);
    const int within_table = static_cast<int>(std::min<uint32_t>(length_, kWithinTables)) - 1;
    if (!after_boundary && !after_space && length_ > 0) step.look_within = {within_table, within_context(), 0};
    if (after_space && finished_ == kWords) step.look_word = {kWordTable, word_context(), 0};

    if (flag(settings_.is_boundary, p)) {
      length_ = 0;
      finish_word();
      return request(step);
    }
    const bool starts_word = flag(settings_.has_leading_space, p);
    if (starts_word || length_ == 0) {
      prefix_ = extend(0, token, 0);
      length_ = 1;
    } else {
      const uint64_t context = within_context();
      step.add = {within_table, context, pair_key(context, token, 0)};
      prefix_ = extend(prefix_, token, length_);
      ++length_;
    }
    if (starts_word) {
      finish_word();
      if (finished_ == kWords) {
        const uint64_t context = word_context();
        step.add = {kWordTable, context, pair_key(context, token, kWords)};
      }
    }
    word_ = word_ * 31 + token;
    ++word_length_;
    return request(step);
  }

  static uint64_t extend(uint64_t prefix, uint16_t token, uint32_t position) {
    return (prefix * kPrefixBase) ^ ((uint64_t{token} + 1) * kPrimes[position % 32]);
  }

  Step request(const Step& step) const {
    if (step.look_within.table >= 0) contexts_[step.look_within.table]->prefetch_entry(step.look_within.context);
    if (step.look_word.table >= 0) contexts_[step.look_word.table]->prefetch_entry(step.look_word.context);
    if (step.add.table >= 0) {
      contexts_[step.add.table]->prefetch_entry(step.add.context);
      pairs_[step.add.table]->prefetch_entry(step.add.pair);
    }
    return step;
  }

  int32_t vote(const Operation& look, double threshold, uint32_t least_count) const {
    int32_t token = -1;
    if (look.table >= 0)
      contexts_[look.table]->peek(look.context, [&](const Context& seen) {
        if (seen.count >= least_count && seen.confidence() >= threshold) token = seen.best_token;
      });
    return token;
  }

  void apply(int64_t p, const Step& step) {
    votes_.within[p] = vote(step.look_within, settings_.within_threshold, 1);
    votes_.word[p] = vote(step.look_word, settings_.word_threshold, kWordLeastCount);
    if (step.add.table < 0) return;
    const uint32_t pair_count = pairs_[step.add.table]->add(step.add.pair);
    contexts_[step.add.table]->visit(step.add.context, stream_.tokens[p], pair_count, [](const Context&) {});
  }

  Stream stream_;
  NgramSettings settings_;
  Votes& votes_;
  std::vector<std::unique_ptr<WidePairs>> pairs_;
  std::vector<std::unique_ptr<WideContexts>> contexts_;
  Step operations_[kChunk];

  uint64_t prefix_ = 0;          // hash of the word's tokens so far
  uint32_t length_ = 0;          // how many there are; 0 outside words
  uint64_t words_[kWords] = {};  // hashes of the last finished words, oldest first
  int finished_ = 0;
  uint64_t word_ = 0;
  int64_t word_length_ = 0;
};

}  // namespace

void add_voter_stage(const Stream& stream, const NgramSettings& settings, Votes& votes, std::vector<Stage>& stages) {
  votes.within = ZeroedArray<int32_t>(stream.n);
  votes.word = ZeroedArray<int32_t>(stream.n);
  auto voters = std::make_shared<Voters>(stream, settings, votes);
  stages.push_back({[voters](int64_t b) { voters->replay(b); }, {}, -1});
}

}  // namespace pgolf::ngram
