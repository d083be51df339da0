// Arithmetic coding of bits with 16-bit probabilities: a 64-bit interval without carries, 32 bits out at a time.
#pragma once
#include <cstdint>
#include <vector>

namespace pgolf {

// [low, high] is the interval; `one` of 65536 of it, from below, stands for a 1. The part kept is never empty.
inline uint64_t split_interval(uint64_t low, uint64_t high, uint32_t one) {
  const uint64_t range = high - low;
  return low + (range >> 16) * one + ((range & 0xFFFF) * one >> 16);
}

class BinaryEncoder {
 public:
  // Codes `bit`, whose probability of being 1 is one / 65536, 0 < one < 65536.
  bool code(bool bit, uint32_t one) {
    const uint64_t middle = split_interval(low_, high_, one);
    if (bit)
      high_ = middle;
    else
      low_ = middle + 1;
    while ((low_ ^ high_) >> 32 == 0) {
      put(static_cast<uint32_t>(high_ >> 32));
      low_ <<= 32;
      high_ = high_ << 32 | 0xFFFFFFFF;
    }
    return bit;
  }

  // The shortest tail that decodes to this interval when zeros follow.
  std::vector<uint8_t> finish() {
    for (int bytes = 0; bytes <= 8; ++bytes) {
      const uint64_t mask = bytes == 0 ? ~0ull : bytes == 8 ? 0 : ~0ull >> (8 * bytes);
      const uint64_t value = (low_ + mask) & ~mask;
      if (value < low_ || value > high_) continue;
      for (int b = 0; b < bytes; ++b) bytes_.push_back(static_cast<uint8_t>(value >> (56 - 8 * b)));
      break;
    }
    return std::move(bytes_);
  }

 private:
  void put(uint32_t word) {
    for (int shift = 24; shift >= 0; shift -= 8) bytes_.push_back(static_cast<uint8_t>(word >> shift));
  }

  uint64_t low_ = 0, high_ = ~0ull;
  std::vector<uint8_t> bytes_;
};

// Reads zeros behind the end; `overran` says whether more than that was asked for than an encoder would have left out.
class BinaryDecoder {
 public:
  BinaryDecoder(const uint8_t* data, int64_t size) : data_(data), size_(size) { code_ = take() << 32 | take(); }

  bool code(bool, uint32_t one) {
    const uint64_t middle = split_interval(low_, high_, one);
    const bool bit = code_ <= middle;
    if (bit)
      high_ = middle;
    else
      low_ = middle + 1;
    while ((low_ ^ high_) >> 32 == 0) {
      low_ <<= 32;
      high_ = high_ << 32 | 0xFFFFFFFF;
      code_ = code_ << 32 | take();
    }
    return bit;
  }

  bool overran() const { return position_ > size_ + 8; }
  bool finished() const { return !overran() && position_ >= size_; }

 private:
  uint64_t take() {
    uint64_t word = 0;
    for (int i = 0; i < 4; ++i, ++position_) word = word << 8 | (position_ < size_ ? data_[position_] : 0);
    return word;
  }

  const uint8_t* data_;
  int64_t size_, position_ = 0;
  uint64_t low_ = 0, high_ = ~0ull, code_ = 0;
};

}  // namespace pgolf
