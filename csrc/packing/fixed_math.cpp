#include "packing/fixed_math.h"

#include <algorithm>

namespace pgolf {
namespace {

// 2^62 * exp(-1 / 512), and from it the other steps by squaring.
constexpr uint64_t kExp512 = 4602687609541841169ull;

uint64_t multiply_q62(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 62);
}

// Eight fractional bits of log2(1 + i / 256), by repeated squaring.
std::array<uint8_t, 256> make_log_table() {
  std::array<uint8_t, 256> table{};
  for (int i = 0; i < 256; ++i) {
    uint64_t x = (256ull + i) << 22;  // in [2^30, 2^31)
    int bits = 0;
    for (int b = 0; b < 8; ++b) {
      x = x * x >> 30;
      bits <<= 1;
      if (x >> 31) {
        bits |= 1;
        x >>= 1;
      }
    }
    table[i] = static_cast<uint8_t>(bits);
  }
  return table;
}

LogisticTables make_logistic_tables() {
  LogisticTables tables{};
  const uint64_t step = multiply_q62(kExp512, kExp512);  // exp(-1 / 256)
  uint64_t power = 1ull << 62;                           // exp(-x / 256)
  for (int x = 0; x <= kLogisticLimit; ++x) {
    const uint64_t one = 1ull << 30, p = (one << 16) / (one + (power >> 32));
    tables.squash[kLogisticLimit + x] = static_cast<uint16_t>(std::min<uint64_t>(p, 65535));
    tables.squash[kLogisticLimit - x] = static_cast<uint16_t>(std::max<uint64_t>(65536 - p, 1));
    power = multiply_q62(power, step);
  }
  int x = -kLogisticLimit;
  for (int i = 0; i < 4096; ++i) {
    const int p = 16 * i + 8;
    while (x < kLogisticLimit && tables.squash[kLogisticLimit + x] < p) ++x;
    tables.stretch[i] = static_cast<int16_t>(x);
  }
  return tables;
}

std::array<uint32_t, kBellSize> make_bell_table() {
  std::array<uint32_t, kBellSize> table{};
  uint64_t value = 1ull << 62, ratio = kExp512;  // exp(-i^2 / 512), exp(-(2 i + 1) / 512)
  const uint64_t step = multiply_q62(kExp512, kExp512);
  for (uint32_t& entry : table) {
    entry = static_cast<uint32_t>(value >> 40);
    value = multiply_q62(value, ratio);
    ratio = multiply_q62(ratio, step);
  }
  return table;
}

}  // namespace

int log2_q8(uint64_t x) {
  static const std::array<uint8_t, 256> table = make_log_table();
  if (x == 0) return 0;
  const int exponent = 63 - __builtin_clzll(x);
  const uint64_t mantissa = exponent >= 8 ? x >> (exponent - 8) : x << (8 - exponent);
  return exponent << 8 | table[mantissa & 255];
}

uint32_t square_root(uint64_t x) {
  uint64_t root = 0;
  for (uint64_t bit = 1ull << 31; bit != 0; bit >>= 1)
    if ((root + bit) * (root + bit) <= x) root += bit;
  return static_cast<uint32_t>(root);
}

const LogisticTables& logistic_tables() {
  static const LogisticTables tables = make_logistic_tables();
  return tables;
}

const std::array<uint32_t, kBellSize>& bell_table() {
  static const std::array<uint32_t, kBellSize> table = make_bell_table();
  return table;
}

}  // namespace pgolf
