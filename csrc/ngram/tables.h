#pragma once
#include <algorithm>
#include <cstdint>
#include <unordered_map>

#include "ngram/hashing.h"
#include "ngram/memory.h"

// Open addressing with linear probing over 2^bits slots, at most 16 probes, nothing ever removed: a key that finds no
// slot is dropped, as in the published tables. A slot's home is the low bits of key * odd number, which the low bits of
// the key decide alone. So a slot together with its distance from home gives the key's low bits back, and only its high
// bits need to be stored: the packed tables take 8 bytes an entry where the key is short, the wide ones 16 with the
// whole key. Both give the same answers.
namespace pgolf::ngram {

// What a context has seen.
struct Context {
  uint32_t count;
  uint16_t best_token;
  uint16_t best_count;  // wraps after 65,535 repeats, as the published one does

  double confidence() const { return double(best_count) / double(count); }
  void add(uint16_t token, uint32_t pair_count) {
    ++count;
    if (token == best_token) {
      ++best_count;
    } else if (pair_count > best_count) {
      best_token = token;
      best_count = static_cast<uint16_t>(std::min(pair_count, 65535u));
    }
  }
};

class Slots {
 public:
  explicit Slots(int bits) : bits_(bits), mask_((uint64_t{1} << bits) - 1) {}
  int64_t size() const { return static_cast<int64_t>(mask_) + 1; }
  uint64_t home(uint64_t key) const { return (key * kTableMix) & mask_; }
  uint64_t at(uint64_t home, int probe) const { return (home + probe) & mask_; }
  uint64_t tag(uint64_t key, int probe) const { return (key >> bits_) << 4 | static_cast<uint64_t>(probe); }

 private:
  int bits_;
  uint64_t mask_;
};

// How often each (context, token) pair was seen.
class WidePairs {
 public:
  explicit WidePairs(int bits) : slots_(bits), entries_(slots_.size()) {}
  void prefetch(uint64_t key) const { __builtin_prefetch(&entries_[slots_.home(key)], 1); }

  // The number of times that `key` was added, now included; 0 when it was dropped.
  uint32_t add(uint64_t key) {
    const uint64_t home = slots_.home(key);
    for (int probe = 0; probe < kProbes; ++probe) {
      Entry& entry = entries_[slots_.at(home, probe)];
      if (entry.count == 0) entry.key = key;
      if (entry.key == key) return ++entry.count;
    }
    return 0;
  }

 private:
  struct Entry {
    uint64_t key;
    uint32_t count;
  };
  Slots slots_;
  ZeroedArray<Entry> entries_;
};

class PackedPairs {
 public:
  static constexpr int kCountBits = 28;
  static bool fits(int key_bits, int table_bits, int64_t tokens) {
    return key_bits - table_bits + 4 <= 64 - kCountBits && tokens < (int64_t{1} << kCountBits);
  }
  explicit PackedPairs(int bits) : slots_(bits), entries_(slots_.size()) {}
  void prefetch(uint64_t key) const { __builtin_prefetch(&entries_[slots_.home(key)], 1); }

  uint32_t add(uint64_t key) {
    const uint64_t home = slots_.home(key);
    for (int probe = 0; probe < kProbes; ++probe) {
      uint64_t& entry = entries_[slots_.at(home, probe)];
      const uint64_t tag = slots_.tag(key, probe) << kCountBits;
      if (entry == 0) entry = tag;
      if ((entry ^ tag) >> kCountBits == 0) return static_cast<uint32_t>(++entry) & ((1u << kCountBits) - 1);
    }
    return 0;
  }

 private:
  Slots slots_;
  ZeroedArray<uint64_t> entries_;
};

// Contexts. visit(key, token, pair_count, use) calls use(context) with the state before this token when the context is
// known, then adds the token; peek(key, use) only looks.
class WideContexts {
 public:
  explicit WideContexts(int bits) : slots_(bits), entries_(slots_.size()) {}
  void prefetch(uint64_t key) const { __builtin_prefetch(&entries_[slots_.home(key)], 1); }

  template <class Use>
  void visit(uint64_t key, uint16_t token, uint32_t pair_count, const Use& use) {
    const uint64_t home = slots_.home(key);
    for (int probe = 0; probe < kProbes; ++probe) {
      Entry& entry = entries_[slots_.at(home, probe)];
      if (entry.state.count == 0) {
        entry = {key, {1, token, 1}};
        return;
      }
      if (entry.key == key) {
        use(entry.state);
        entry.state.add(token, pair_count);
        return;
      }
    }
  }

  template <class Use>
  void peek(uint64_t key, const Use& use) const {
    const uint64_t home = slots_.home(key);
    for (int probe = 0; probe < kProbes; ++probe) {
      const Entry& entry = entries_[slots_.at(home, probe)];
      if (entry.state.count == 0) return;
      if (entry.key == key) return use(entry.state);
    }
  }

 private:
  struct Entry {
    uint64_t key;
    Context state;
  };
  Slots slots_;
  ZeroedArray<Entry> entries_;
};

class PackedContexts {
 public:
  static bool fits(int key_bits, int table_bits) { return key_bits - table_bits + 4 <= 16; }
  explicit PackedContexts(int bits) : slots_(bits), entries_(slots_.size()) {}
  void prefetch(uint64_t key) const { __builtin_prefetch(&entries_[slots_.home(key)], 1); }

  template <class Use>
  void visit(uint64_t key, uint16_t token, uint32_t pair_count, const Use& use) {
    const uint64_t home = slots_.home(key);
    for (int probe = 0; probe < kProbes; ++probe) {
      const uint64_t slot = slots_.at(home, probe);
      Entry& entry = entries_[slot];
      const auto tag = static_cast<uint16_t>(slots_.tag(key, probe));
      if (entry.count == 0) {
        entry = {tag, 1, token, 1};
        return;
      }
      if (entry.tag == tag) {
        Context state{entry.count == kLarge ? large_.find(slot)->second : entry.count, entry.best_token,
                      entry.best_count};
        use(state);
        state.add(token, pair_count);
        if (state.count >= kLarge) large_[slot] = state.count;
        entry = {tag, static_cast<uint16_t>(std::min<uint32_t>(state.count, kLarge)), state.best_token,
                 state.best_count};
        return;
      }
    }
  }

 private:
  static constexpr uint32_t kLarge = 65535;  // this count means: look in large_
  struct Entry {
    uint16_t tag, count, best_token, best_count;
  };
  Slots slots_;
  ZeroedArray<Entry> entries_;
  std::unordered_map<uint64_t, uint32_t> large_;
};

}  // namespace pgolf::ngram
