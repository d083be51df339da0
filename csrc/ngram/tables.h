#pragma once
#include <algorithm>
#include <cstdint>
#include <unordered_map>

#include "ngram/hashing.h"
#include "ngram/memory.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Open addressing with linear probing over 2^bits slots, at most 16 probes, nothing ever removed: a key that finds no
// slot is dropped, as in the published tables. Two forms give the same answers. Packed: a slot's home is the low bits
// of key * odd number, which the low bits of the key decide alone, so a slot and its distance from home give the key's
// low bits back and only its high bits are stored: 8 bytes an entry for short keys. Wide: whole keys, and beside the
// entries one byte of hash for each slot, so that one comparison of 16 bytes settles most lookups; a key that a crowded
// table does not hold never touches the entries.
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

// Bit i: p[i] == value, for 16 bytes.
inline uint32_t match_16(const uint8_t* p, uint8_t value) {
#if defined(__SSE2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(static_cast<char>(value)))));
#else
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t{p[i] == value} << i;
  return mask;
#endif
}

template <class Value>
class WideTable {
 public:
  explicit WideTable(int bits) : slots_(bits), prints_(slots_.size() + kProbes), entries_(slots_.size()) {}

  void prefetch(uint64_t key) const {
    const uint64_t home = slots_.home(key);
    __builtin_prefetch(&prints_[home], 1);
    __builtin_prefetch(&entries_[home], 1);
  }
  // Prefetches the entry that the key has or would get now, if any.
  void prefetch_entry(uint64_t key) const {
    const uint32_t wanted = match_16(&prints_[slots_.home(key)], print(key)) | match_16(&prints_[slots_.home(key)], 0);
    if (wanted != 0) __builtin_prefetch(&entries_[slots_.at(slots_.home(key), __builtin_ctz(wanted))], 1);
  }

  const Value* find(uint64_t key) const {
    const uint64_t home = slots_.home(key);
    const uint32_t empty = match_16(&prints_[home], 0);
    for (uint32_t left = match_16(&prints_[home], print(key)) & before(empty); left != 0; left &= left - 1) {
      const Entry& entry = entries_[slots_.at(home, __builtin_ctz(left))];
      if (entry.key == key) return &entry.value;
    }
    return nullptr;
  }

  // The key's value, all zero bits when it is new, or null when it finds no slot.
  Value* find_or_add(uint64_t key) {
    if (const Value* known = find(key)) return const_cast<Value*>(known);
    const uint64_t home = slots_.home(key);
    const uint32_t empty = match_16(&prints_[home], 0);
    if (empty == 0) return nullptr;
    const auto slot = static_cast<int64_t>(slots_.at(home, __builtin_ctz(empty)));
    prints_[slot] = print(key);
    if (slot < kProbes) prints_[slots_.size() + slot] = print(key);  // for probes that run over the end
    entries_[slot].key = key;
    return &entries_[slot].value;
  }

 private:
  struct Entry {
    uint64_t key;
    Value value;
  };
  static uint8_t print(uint64_t key) { return static_cast<uint8_t>((key * kTableMix) >> 57 | 0x80); }
  static uint32_t before(uint32_t empty) { return empty == 0 ? ~0u : (empty & (0u - empty)) - 1; }

  Slots slots_;
  ZeroedArray<uint8_t> prints_;  // 0: empty
  ZeroedArray<Entry> entries_;
};

// How often each (context, token) pair was seen: add(key) gives the number of times, this one included, or 0 when the
// key was dropped.
class WidePairs {
 public:
  explicit WidePairs(int bits) : table_(bits) {}
  void prefetch(uint64_t key) const { table_.prefetch(key); }
  void prefetch_entry(uint64_t key) const { table_.prefetch_entry(key); }
  uint32_t add(uint64_t key) {
    uint32_t* count = table_.find_or_add(key);
    return count == nullptr ? 0 : ++*count;
  }

 private:
  WideTable<uint32_t> table_;
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
  explicit WideContexts(int bits) : table_(bits) {}
  void prefetch(uint64_t key) const { table_.prefetch(key); }
  void prefetch_entry(uint64_t key) const { table_.prefetch_entry(key); }

  template <class Use>
  void visit(uint64_t key, uint16_t token, uint32_t pair_count, const Use& use) {
    Context* state = table_.find_or_add(key);
    if (state == nullptr) return;
    if (state->count == 0) {
      *state = {1, token, 1};
    } else {
      use(*state);
      state->add(token, pair_count);
    }
  }

  template <class Use>
  void peek(uint64_t key, const Use& use) const {
    if (const Context* state = table_.find(key)) use(*state);
  }

 private:
  WideTable<Context> table_;
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
