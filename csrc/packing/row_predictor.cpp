#include "packing/row_predictor.h"

#include <algorithm>

#include "packing/fixed_math.h"

namespace pgolf {
namespace {

constexpr int64_t kFirstRefresh = 128;
constexpr int64_t kShrink = 2000;     // correlations count rows / (rows + kShrink)
constexpr int64_t kMeanShrink = 8;    // means count rows / (rows + kMeanShrink)
constexpr double kLeastExcess = 1.3;  // times the mean squared correlation of independent columns
constexpr int32_t kMaxSurprise = 16 << 8;

// Rows of L have a norm of at most 1, so that true sums fit; damaged data may wrap around, to the same bits everywhere.
int64_t dot(const int32_t* a, const int32_t* b, int64_t n) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<uint64_t>(static_cast<int64_t>(a[i]) * b[i]);
  return static_cast<int64_t>(sum);
}

int64_t minus(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

}  // namespace

RowPredictor::RowPredictor(int64_t columns)
    : columns_(columns),
      next_refresh_(kFirstRefresh),
      products_(columns * columns),
      sums_(columns),
      row_(columns),
      factor_(columns * columns),
      surprise_(columns),
      mean_(columns),
      deviation_(columns),
      inverse_deviation_(columns) {}

int32_t RowPredictor::predict() const {
  predicted_ = mean_[position_];
  if (!active_) return predicted_;
  const int16_t* factor = factor_.data() + position_ * columns_;
  const int16_t* surprise = surprise_.data();
  uint32_t sum = 0;  // rows of L have norm <= 1, |z| <= 16 each: below 2^31, or wraps the same way everywhere
  for (int64_t k = 0; k < position_; ++k) sum += static_cast<uint32_t>(static_cast<int32_t>(factor[k]) * surprise[k]);
  predicted_ +=
      static_cast<int32_t>(static_cast<int64_t>(static_cast<int32_t>(sum) >> 8) * deviation_[position_] >> 14);
  return predicted_;
}

void RowPredictor::reveal(int8_t value) {
  row_[position_] = value;
  if (active_) {
    const int64_t error = value * 256 - predicted_;
    const int64_t z = error * inverse_deviation_[position_] >> 16;
    surprise_[position_] = static_cast<int16_t>(std::clamp<int64_t>(z, -kMaxSurprise, kMaxSurprise));
  }
  ++position_;
}

void RowPredictor::end_row() {
  position_ = 0;
  for (int64_t j = 0; j < columns_; ++j) {
    const int32_t x = row_[j];
    sums_[j] += x;
    int32_t* products = products_.data() + j * columns_;
    for (int64_t k = 0; k <= j; ++k) products[k] += x * row_[k];
  }
  if (++rows_ >= next_refresh_) {
    refresh();
    next_refresh_ = rows_ + rows_ / 6;
  }
}

void RowPredictor::refresh() {
  const int64_t n = rows_, c = columns_;
  // n^2 times the covariance, scaled to 31 bits, so that its quotients fit 64 bits.
  const auto covariance = [&](int64_t j, int64_t k) {
    return n * products_[j * c + k] - static_cast<int64_t>(sums_[j]) * sums_[k];
  };
  int64_t largest = 1;
  for (int64_t j = 0; j < c; ++j) largest = std::max(largest, covariance(j, j));
  int shift = 0;
  while (largest >> shift >= int64_t{1} << 31) ++shift;
  std::vector<int64_t> root(c);
  for (int64_t j = 0; j < c; ++j) root[j] = std::max<int64_t>(1, square_root(covariance(j, j) >> shift));
  std::vector<int32_t> lower(c * c);  // L in 2^-30
  const int64_t one = int64_t{1} << 30;
  for (int64_t j = 0; j < c; ++j) {
    int32_t* row = lower.data() + j * c;
    for (int64_t k = 0; k < j; ++k) {
      int64_t correlation = (covariance(j, k) >> shift) * one / (root[j] * root[k]);
      correlation = std::clamp(correlation, -one, one) * n / (n + kShrink);
      const int32_t* other = lower.data() + k * c;
      row[k] = static_cast<int32_t>(std::clamp(minus(correlation * one, dot(row, other, k)) / other[k], -one, one));
    }
    const int64_t pivot = minus(one * one, dot(row, row, j));
    // Rounding can push columns of tiny variance out of bounds; the factor's diagonal stays within (0, 1].
    row[j] = static_cast<int32_t>(std::clamp<int64_t>(square_root(std::max<int64_t>(pivot, 0)), one >> 8, one));
    mean_[j] = static_cast<int32_t>(int64_t{sums_[j]} * 256 / (n + kMeanShrink));
    // deviation = sqrt(covariance) in 2^-8: root is sqrt(n^2 cov / 2^shift).
    const uint64_t variance = static_cast<uint64_t>(covariance(j, j)) / static_cast<uint64_t>(n);
    deviation_[j] =
        static_cast<int32_t>(std::max<uint32_t>(1, square_root((variance << 16) / static_cast<uint64_t>(n))));
    const int64_t conditional = std::max<int64_t>(1, int64_t{deviation_[j]} * row[j] >> 22);  // in 2^-16
    inverse_deviation_[j] = static_cast<int32_t>((int64_t{1} << 32) / std::max<int64_t>(conditional, 4));
    for (int64_t k = 0; k < j; ++k) factor_[j * c + k] = static_cast<int16_t>((row[k] + (1 << 15)) >> 16);
  }
  active_ = true;
}

bool rows_are_predictable(const int8_t* data, int64_t rows, int64_t columns) {
  // Independent columns have a mean squared correlation of 1 / rows; a tenth of the columns tells.
  const int64_t number = std::min<int64_t>(columns, 64), step = columns / number;
  std::vector<double> sums(number, 0.0), products(number * number, 0.0), picked(number);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < number; ++j) {
      picked[j] = data[r * columns + j * step];
      sums[j] += picked[j];
      for (int64_t k = 0; k <= j; ++k) products[j * number + k] += picked[j] * picked[k];
    }
  }
  const auto covariance = [&](int64_t j, int64_t k) {
    return products[j * number + k] - sums[j] * sums[k] / static_cast<double>(rows);
  };
  double squares = 0;
  for (int64_t j = 0; j < number; ++j)
    for (int64_t k = 0; k < j; ++k) {
      const double variances = covariance(j, j) * covariance(k, k);
      if (variances > 0) squares += covariance(j, k) * covariance(j, k) / variances;
    }
  const double pairs = 0.5 * static_cast<double>(number * (number - 1));
  return squares / pairs > kLeastExcess / static_cast<double>(rows);
}

}  // namespace pgolf
