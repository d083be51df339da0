// Logarithms, square roots, logistic and bell curves in integers: the same bits on every machine.
#pragma once
#include <array>
#include <cstdint>

namespace pgolf {

// 256 * log2(x), rounded down to the table's 8 bits of mantissa; 0 for x = 0.
int log2_q8(uint64_t x);

// Largest r with r * r <= x.
uint32_t square_root(uint64_t x);

// Probabilities have 16 bits; the logistic domain has 256 steps a nat and ends at +-kLogisticLimit.
constexpr int kLogisticLimit = 2815;
struct LogisticTables {
  std::array<uint16_t, 2 * kLogisticLimit + 1> squash;  // 65536 / (1 + exp(-x / 256)) at x + kLogisticLimit
  std::array<int16_t, 4096> stretch;                    // its inverse, at p >> 4
};
const LogisticTables& logistic_tables();

// 2^22 * exp(-(i / 16)^2 / 2), zero from the end of the table on.
constexpr int kBellSize = 96;
const std::array<uint32_t, kBellSize>& bell_table();

}  // namespace pgolf
