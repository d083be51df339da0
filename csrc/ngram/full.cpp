// The token expert with true contexts: 64-bit hashes, nothing dropped.
//
// Positions are sorted, stably, into buckets by the hash of their shortest context. All contexts of all orders that a
// bucket's positions meet belong to that bucket alone (equal long contexts have equal short ones), so each bucket is
// replayed by itself, in position order, in tables that stay in a core's own cache.
//
// Within a bucket contexts form a tree: one of order k is looked for only after its shorter one has been seen before,
// and the first occurrence of a context is entered into the next order only when the second one comes. Most contexts
// occur once, so most positions cost one insertion for all orders together.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "ngram/experts.h"
#include "ngram/hashing.h"

namespace pgolf::ngram {
namespace {

constexpr uint64_t kBase = 0x9FB21C651E98DF25;  // odd; contexts are polynomials in it modulo 2^64

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93;
  x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93;
  return x ^ (x >> 32);
}

struct Record {
  uint64_t polynomial;  // of the shortest context
  uint32_t position;
  uint16_t token;
};

// A context and what it has seen.
struct Node {
  uint64_t key;  // hash of context and order
  uint32_t count;
  uint32_t best_count;
  uint32_t first;  // position of the first occurrence
  uint16_t best_token;
  uint64_t slot_hash() const { return key; }
};

// How often a context was followed by a token, for tokens that are not its best one.
struct Pair {
  uint64_t key;  // node number and token
  uint32_t count;
  uint64_t slot_hash() const { return mix(key); }
};

// A set of entries by key: linear probing over entry numbers, at most half full, growing as needed.
template <class Entry>
class KeyedArray {
 public:
  void clear(size_t expected) {
    size_t size = 64;
    while (size < 2 * expected) size *= 2;
    slots_.assign(size, 0);
    entries_.clear();
  }
  size_t size() const { return entries_.size(); }
  Entry& operator[](size_t i) { return entries_[i]; }

  // The number of the entry with fresh.key; `fresh` becomes that entry if there was none (its number is then the old
  // size).
  size_t find_or_add(const Entry& fresh) {
    size_t slot = place(fresh);
    if (slots_[slot] != 0) return slots_[slot] - 1;
    if (2 * (entries_.size() + 1) > slots_.size()) {
      grow();
      slot = place(fresh);
    }
    entries_.push_back(fresh);
    slots_[slot] = static_cast<uint32_t>(entries_.size());
    return entries_.size() - 1;
  }

 private:
  // The slot that holds this key, or the empty one where it belongs.
  size_t place(const Entry& entry) const {
    const size_t mask = slots_.size() - 1;
    size_t slot = entry.slot_hash() & mask;
    while (slots_[slot] != 0 && entries_[slots_[slot] - 1].key != entry.key) slot = (slot + 1) & mask;
    return slot;
  }
  void grow() {
    slots_.assign(2 * slots_.size(), 0);
    for (size_t i = 0; i < entries_.size(); ++i) slots_[place(entries_[i])] = static_cast<uint32_t>(i + 1);
  }

  std::vector<uint32_t> slots_;  // entry number + 1; 0: empty
  std::vector<Entry> entries_;
};

// The orders, shortest first, and the powers of the base that extend a context from one to the next.
struct Ladder {
  std::vector<int64_t> orders;
  std::vector<OrderRule> rules;
  uint64_t powers[33];

  explicit Ladder(const NgramSettings& settings) : orders(settings.orders, settings.orders + settings.order_count) {
    std::reverse(orders.begin(), orders.end());
    for (const int64_t order : orders) rules.push_back(rule_of(order, settings.threshold_scale));
    powers[0] = 1;
    for (int i = 1; i <= 32; ++i) powers[i] = powers[i - 1] * kBase;
  }

  // The polynomial of the tokens at distance from + 1 .. to before `position`.
  uint64_t terms(const uint16_t* tokens, int64_t position, int64_t from, int64_t to) const {
    uint64_t sum = 0;
    for (int64_t i = from; i < to; ++i) sum += (uint64_t{tokens[position - 1 - i]} + 1) * powers[i];
    return sum;
  }
};

class Bucket {
 public:
  Bucket(const Stream& stream, const Ladder& ladder, double base_beta)
      : stream_(stream), ladder_(ladder), base_beta_(base_beta) {}

  void replay(const Record* records, int64_t count) {
    constexpr int64_t ahead = 8;
    nodes_.clear(count);
    pairs_.clear(0);
    for (int64_t i = 0; i < count; ++i) {
      if (i + ahead < count) __builtin_prefetch(stream_.tokens + records[i + ahead].position - ladder_.orders.back());
      visit(records[i]);
    }
  }

 private:
  void visit(const Record& record) {
    const int64_t p = record.position;
    uint64_t polynomial = record.polynomial;
    int32_t hint = -1;
    double beta = 0;
    for (size_t level = 0; p >= ladder_.orders[level]; ++level) {
      const int64_t order = ladder_.orders[level];
      const size_t known = nodes_.size();
      const size_t i = nodes_.find_or_add({mix(polynomial + order), 1, 1, record.position, record.token});
      if (i == known) break;
      const Node node = nodes_[i];
      const double confidence = double(node.best_count) / double(node.count);
      if (node.count >= ladder_.rules[level].least_count && confidence >= ladder_.rules[level].threshold) {
        hint = node.best_token;
        beta = base_beta_ * confidence;
      }
      add(i, record.token);
      if (level + 1 == ladder_.orders.size()) break;
      const int64_t next = ladder_.orders[level + 1];
      if (node.count == 1 && node.first >= next)
        nodes_.find_or_add({mix(polynomial + ladder_.terms(stream_.tokens, node.first, order, next) + next), 1, 1,
                            node.first, node.best_token});
      if (p < next) break;
      polynomial += ladder_.terms(stream_.tokens, p, order, next);
    }
    if (hint < 0) return;
    stream_.hints[p] = hint;
    stream_.betas[p] = beta;
  }

  void add(size_t i, uint16_t token) {
    Node& node = nodes_[i];
    ++node.count;
    if (token == node.best_token) {
      ++node.best_count;
      return;
    }
    const size_t known = pairs_.size();
    const size_t other = pairs_.find_or_add({uint64_t{i} << 16 | token, 1});
    if (other < known) ++pairs_[other].count;
    const uint32_t count = pairs_[other].count;
    if (count <= node.best_count) return;
    const uint32_t before = node.best_count;
    const size_t best = pairs_.find_or_add({uint64_t{i} << 16 | node.best_token, before});
    pairs_[best].count = before;
    node.best_token = token;
    node.best_count = count;
  }

  const Stream& stream_;
  const Ladder& ladder_;
  double base_beta_;
  KeyedArray<Node> nodes_;
  KeyedArray<Pair> pairs_;
};

}  // namespace

void full_hash_hints(const Stream& stream, const NgramSettings& settings, int threads) {
  const Ladder ladder(settings);
  const int64_t shortest = ladder.orders.front();
  const int64_t total = stream.n - shortest;
  if (total <= 0) return;
  int bucket_bits = 0;
  while (bucket_bits < 16 && (total >> bucket_bits) > 8192) ++bucket_bits;  // some 200 kB of tables for each
  const int64_t buckets = int64_t{1} << bucket_bits;

  // Calls use(record, bucket) for the positions of one part of the stream, in order.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, total >> 16));
  const auto for_part = [&](int64_t part, const auto& use) {
    const int64_t begin = shortest + total * part / parts, end = shortest + total * (part + 1) / parts;
    uint64_t polynomial = ladder.terms(stream.tokens, begin, 0, shortest);
    for (int64_t p = begin; p < end; ++p) {
      const uint64_t hash = mix(polynomial + shortest);
      use(Record{polynomial, static_cast<uint32_t>(p), stream.tokens[p]},
          bucket_bits == 0 ? 0 : hash >> (64 - bucket_bits));
      polynomial = polynomial * kBase + stream.tokens[p] + 1 -
                   (uint64_t{stream.tokens[p - shortest]} + 1) * ladder.powers[shortest];
    }
  };

  // next[part * buckets + bucket]: where the part's next record of the bucket goes.
  std::vector<int64_t> next(parts * buckets, 0);
  parallel_for(parts, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      for_part(part, [&](const Record&, uint64_t bucket) { ++next[part * buckets + bucket]; });
  });
  std::vector<int64_t> starts(buckets + 1, 0);
  int64_t sum = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    starts[bucket] = sum;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = next[part * buckets + bucket];
      next[part * buckets + bucket] = sum;
      sum += count;
    }
  }
  starts[buckets] = sum;
  ZeroedArray<Record> records(total);
  parallel_for(parts, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      for_part(part, [&](const Record& record, uint64_t bucket) { records[next[part * buckets + bucket]++] = record; });
  });
  std::atomic<int64_t> taken{0};
  parallel_for(threads, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      Bucket bucket(stream, ladder, settings.base_beta);
      for (int64_t b = taken++; b < buckets; b = taken++)
        bucket.replay(records.data() + starts[b], starts[b + 1] - starts[b]);
    }
  });
}

}  // namespace pgolf::ngram
