// The published token expert, replayed table by table. An order's pair counts do not depend on its contexts, and no
// order depends on another one, so every table is a pass of its own over the stream, in position order; passes run side
// by side, block after block. All addresses follow from the tokens alone and are prefetched a chunk ahead.
#include <algorithm>
#include <memory>

#include "ngram/experts.h"
#include "ngram/hashing.h"
#include "ngram/tables.h"

namespace pgolf::ngram {
namespace {

constexpr int64_t kChunk = 64;  // positions whose table lines are requested together

// Calls prepare(chunk begin, count) one chunk ahead of replay(chunk begin, count).
template <class Prepare, class Replay>
void by_chunks(int64_t begin, int64_t end, const Prepare& prepare, const Replay& replay) {
  if (begin >= end) return;
  prepare(begin, std::min(kChunk, end - begin));
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t next = at + kChunk;
    if (next < end) prepare(next, std::min(kChunk, end - next));
    replay(at, std::min(kChunk, end - at));
  }
}

template <class Pairs, class Contexts>
class Order {
 public:
  Order(const Stream& stream, const NgramSettings& settings, int64_t order)
      : stream_(stream),
        order_(order),
        bits_(settings.table_bits),
        base_beta_(settings.base_beta),
        rule_(rule_of(order, settings.threshold_scale)) {}

  void count_pairs(int64_t b) {
    if (b == 0) {
      pairs_ = std::make_unique<Pairs>(bits_);
      pair_counts_ = ZeroedArray<uint32_t>(stream_.n);
    }
    uint64_t keys[2][kChunk];
    by_chunks(
        std::max(order_, stream_.begin(b)), stream_.end(b),
        [&](int64_t at, int64_t count) {
          uint64_t* key = keys[(at / kChunk) & 1];
          context_keys(stream_.tokens, at, count, order_, key);
          for (int64_t i = 0; i < count; ++i) {
            key[i] = pair_key(key[i], stream_.tokens[at + i], order_);
            pairs_->prefetch(key[i]);
          }
        },
        [&](int64_t at, int64_t count) {
          const uint64_t* key = keys[(at / kChunk) & 1];
          for (int64_t i = 0; i < count; ++i) pair_counts_[at + i] = pairs_->add(key[i]);
        });
    if (b + 1 == stream_.blocks()) pairs_.reset();
  }

  void give_hints(int64_t b) {
    if (b == 0) contexts_ = std::make_unique<Contexts>(bits_);
    uint64_t keys[2][kChunk];
    by_chunks(
        std::max(order_, stream_.begin(b)), stream_.end(b),
        [&](int64_t at, int64_t count) {
          uint64_t* key = keys[(at / kChunk) & 1];
          context_keys(stream_.tokens, at, count, order_, key);
          for (int64_t i = 0; i < count; ++i) contexts_->prefetch(key[i]);
        },
        [&](int64_t at, int64_t count) {
          const uint64_t* key = keys[(at / kChunk) & 1];
          for (int64_t i = 0; i < count; ++i) {
            const int64_t p = at + i;
            contexts_->visit(key[i], stream_.tokens[p], pair_counts_[p], [&](const Context& seen) {
              if (seen.count < rule_.least_count || stream_.hints[p] >= 0) return;  // higher orders have been here
              if (seen.confidence() < rule_.threshold) return;
              stream_.hints[p] = seen.best_token;
              stream_.betas[p] = base_beta_ * seen.confidence();
            });
          }
        });
    if (b + 1 == stream_.blocks()) {
      contexts_.reset();
      pair_counts_ = ZeroedArray<uint32_t>();
    }
  }

 private:
  Stream stream_;
  int64_t order_;
  int bits_;
  double base_beta_;
  OrderRule rule_;
  std::unique_ptr<Pairs> pairs_;
  std::unique_ptr<Contexts> contexts_;
  ZeroedArray<uint32_t> pair_counts_;
};

int bit_length(uint64_t x) {
  int bits = 0;
  for (; x != 0; x >>= 1) ++bits;
  return bits;
}

template <class Pairs, class Contexts>
void add_order(const Stream& stream, const NgramSettings& settings, int64_t order, int previous, int before_previous,
               std::vector<Stage>& stages) {
  auto state = std::make_shared<Order<Pairs, Contexts>>(stream, settings, order);
  const int count = static_cast<int>(stages.size());
  stages.push_back({[state](int64_t b) { state->count_pairs(b); }, {}, before_previous});
  std::vector<int> after{count};
  if (previous >= 0) after.push_back(previous);
  stages.push_back({[state](int64_t b) { state->give_hints(b); }, after, before_previous});
}

}  // namespace

void add_compatible_stages(const Stream& stream, const NgramSettings& settings, std::vector<Stage>& stages) {
  int previous = -1, before_previous = -1;
  for (int i = 0; i < settings.order_count; ++i) {
    const int64_t order = settings.orders[i];
    const int context_bits = settings.token_bits + std::max(bit_length(kPrimes[0]), bit_length(kPrimes[order - 1]));
    const int pair_bits = std::max(context_bits + kPairMixBits, settings.token_bits + kPrimeBits);
    if (PackedPairs::fits(pair_bits, settings.table_bits, stream.n) &&
        PackedContexts::fits(context_bits, settings.table_bits))
      add_order<PackedPairs, PackedContexts>(stream, settings, order, previous, before_previous, stages);
    else
      add_order<WidePairs, WideContexts>(stream, settings, order, previous, before_previous, stages);
    before_previous = previous;
    previous = static_cast<int>(stages.size()) - 1;
  }
}

}  // namespace pgolf::ngram
