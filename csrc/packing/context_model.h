// Adaptive bit models for a group of int8 matrices, mixed in the logistic domain. Integers only.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "packing/codes.h"
#include "packing/fixed_math.h"
#include "packing/row_predictor.h"

namespace pgolf {

// What a group's stream starts with.
struct ContextHeader {
  uint8_t flags = 0;     // 1: rows are predicted
  int8_t centre = 0;     // subtracted from every code
  uint8_t variance = 0;  // of the codes around it: (log2 + 8) * 8

  static constexpr uint8_t kPredicted = 1;
  static constexpr uint8_t kLargestVariance = (14 + 8) * 8;
};

// Binary search over the 256 byte values, split where a bell curve has equal halves. Nodes near the middle of the
// curve, which are the ones in use, have the lowest numbers.
struct ValueTree {
  struct Node {
    uint8_t low, split;  // values [low, split) go left (bit 1), [split, high] right
    uint8_t high;
    int16_t left, right;  // next node, or -1 - value
  };
  std::array<Node, 255> nodes;

  explicit ValueTree(const std::array<uint32_t, 257>& cumulative);
};

// Codes and learns the matrices of one group, in order. `Coder` is BinaryEncoder or BinaryDecoder.
template <class Coder>
class ContextModel {
 public:
  ContextModel(const ContextHeader& header, int64_t columns, Coder& coder);

  // Data is read by an encoder and written by a decoder.
  template <class T>
  void matrix(T* data, int64_t rows);

 private:
  static constexpr int kInputs = 4;
  static constexpr int kLevels = 64, kFractions = 4;
  static constexpr int64_t kMaxColumnContexts = 4096;
  using Counter = uint32_t;                // probability in 22 bits, observations in 10
  using Nodes = std::array<Counter, 256>;  // the nodes of one context
  using Weights = std::array<int32_t, kInputs>;

  int level_of(int log_variance) const;
  int8_t code(int8_t value, const std::array<Counter*, kInputs>& contexts);
  Nodes nodes_for(int level, int fraction, int observations) const;
  void start_row(int64_t row);

  Coder& coder_;
  const LogisticTables& logistic_ = logistic_tables();
  const int64_t columns_;
  const int8_t centre_;
  const int base_;          // 256 * log2 of the group's variance in 1/256
  const int64_t variance_;  // in 1/256
  int64_t recent_;          // moving average of squares, in 1/256
  ValueTree tree_;
  std::array<std::vector<Nodes>, kInputs> counters_;
  std::vector<Weights> weights_;
  std::array<uint16_t, 1024> rates_;
  std::unique_ptr<RowPredictor> predictor_;
  std::vector<int64_t> energy_;                   // of each column so far: sum of squares
  std::vector<int64_t> reference_;                // column variances of the matrix before, in 1/256
  std::vector<int32_t> own_level_, blend_level_;  // by column for this row
  std::vector<int64_t> expected_;                 // variance of each column, in 1/256
  std::vector<int64_t> reciprocals_;              // 2^32 / i
};

}  // namespace pgolf
