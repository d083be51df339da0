// Predicts a row's next entry from the entries before it, with the covariance of the rows seen so far.
#pragma once
#include <cstdint>
#include <vector>

namespace pgolf {

// Rows are taken as draws of one Gaussian vector. With the (shrunken) correlation matrix L L^T of the rows so far,
// the entry j of a row has mean  mean_j + deviation_j * sum_{k<j} L_jk z_k,  z_k its standardised surprises. L is made
// anew when a sixth more rows have been seen. Everything is fixed-point integers.
class RowPredictor {
 public:
  static constexpr int64_t kMaxColumns = 1024, kMaxRows = 65536;
  // Only tall matrices, since a factor costs columns^3 / 3 multiplications; sums are exact up to kMaxRows in all.
  static bool takes(int64_t matrices, int64_t rows, int64_t columns) {
    return 2 <= columns && columns <= kMaxColumns && 4 * columns <= rows && rows <= kMaxRows / matrices;
  }

  explicit RowPredictor(int64_t columns);

  // The row's columns in order: mean of the next entry in 1/256, then the entry itself.
  int32_t predict() const;
  void reveal(int8_t value);
  void end_row();

 private:
  void refresh();

  const int64_t columns_;
  int64_t position_ = 0, rows_ = 0, next_refresh_;
  bool active_ = false;
  std::vector<int32_t> products_;  // [C][C], lower triangle: sum of x_j x_k
  std::vector<int32_t> sums_;      // [C]
  std::vector<int32_t> row_;
  std::vector<int16_t> factor_;                         // [C][C], lower triangle of L in 2^-14
  std::vector<int16_t> surprise_;                       // z in 2^-8
  std::vector<int32_t> mean_;                           // in 2^-8
  std::vector<int32_t> deviation_, inverse_deviation_;  // in 2^-8, 2^-16 of 1 / (deviation L_jj)
  mutable int32_t predicted_ = 0;
};

// Whether a predictor is likely to pay for rows such as these, [rows, columns].
bool rows_are_predictable(const int8_t* data, int64_t rows, int64_t columns);

}  // namespace pgolf
