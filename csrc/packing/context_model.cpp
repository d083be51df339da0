#include "packing/context_model.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "packing/binary_coder.h"

namespace pgolf {
namespace {

// Observations that a column's prior is worth: the group's variance, and the same column of the matrix before.
constexpr int64_t kOwnPrior = 64, kReferencePrior = 32;
constexpr int kRecentShift = 3;   // a single column is a sequence: its last 8 entries or so tell the next one's size
constexpr int64_t kRowPrior = 6;  // entries' worth of trust in the expected energy of a row's rest
// Observations that the first guess of a bit's probability is worth.
constexpr int kLevelPrior = 60, kColumnPrior = 20;
constexpr int kLearningRate = 16;
constexpr int kMiddle = 32;  // level of the group's own variance; levels are an eighth of an octave
constexpr int kProbabilityBits = 22;
constexpr int kMostObservations = 1023;
constexpr int32_t kOneWeight = 1 << 24, kLargestWeight = 64 * kOneWeight;

// 2^(i / 16) in 2^-16.
constexpr uint64_t kSixteenths[16] = {65536, 68438, 71468,  74632,  77936,  81386,  84990,  88752,
                                      92682, 96785, 101070, 105545, 110218, 115098, 120194, 125515};

// 2^(steps / 16) in 2^-16.
uint64_t power_of_two(int steps) {
  const int octave = steps >> 4;
  const uint64_t mantissa = kSixteenths[steps & 15];
  return octave >= 0 ? mantissa << std::min(octave, 40) : mantissa >> std::min(-octave, 40);
}

// Running sums of a bell curve's weights over the values -128 .. 127. variance in 2^-24, mean in 2^-8.
std::array<uint32_t, 257> bell_sums(uint64_t variance, int mean) {
  constexpr uint32_t kLeast = 16;
  const auto& bell = bell_table();
  std::array<uint32_t, 257> sums{};
  for (int i = 0; i < 256; ++i) {
    const int64_t distance = (i - 128) * 256 - mean;
    const uint32_t place =
        square_root((static_cast<uint64_t>(distance * distance) << 16) / std::max<uint64_t>(variance, 1));
    sums[i + 1] = sums[i] + kLeast + (place < kBellSize ? bell[place] : 0);
  }
  return sums;
}

}  // namespace

ValueTree::ValueTree(const std::array<uint32_t, 257>& cumulative) {
  struct Span {
    int low, high, parent;  // values [low, high); the parent's side is left when low is the parent's low
  };
  std::vector<Span> spans{{0, 256, -1}};
  std::vector<Node> built;
  const auto attach = [&](int parent, int low, int child) {
    if (parent < 0) return;
    (low == built[parent].low ? built[parent].left : built[parent].right) = static_cast<int16_t>(child);
  };
  while (!spans.empty()) {
    const Span span = spans.back();
    spans.pop_back();
    if (span.high - span.low == 1) {
      attach(span.parent, span.low, -1 - span.low);
      continue;
    }
    const uint32_t half = cumulative[span.low] + (cumulative[span.high] - cumulative[span.low]) / 2;
    int split = span.low + 1;
    while (split < span.high - 1 && cumulative[split] < half) ++split;
    if (split > span.low + 1 && half - cumulative[split - 1] < cumulative[split] - half) --split;
    const int id = static_cast<int>(built.size());
    built.push_back(
        {static_cast<uint8_t>(span.low), static_cast<uint8_t>(split), static_cast<uint8_t>(span.high - 1), 0, 0});
    attach(span.parent, span.low, id);
    spans.push_back({span.low, split, id});
    spans.push_back({split, span.high, id});
  }
  std::array<int, 255> order;
  std::iota(order.begin(), order.end(), 0);
  const auto mass = [&](int id) { return cumulative[built[id].high + 1] - cumulative[built[id].low]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return mass(a) > mass(b); });
  std::array<int16_t, 255> number;
  for (int i = 0; i < 255; ++i) number[order[i]] = static_cast<int16_t>(i);
  for (int i = 0; i < 255; ++i) {
    Node node = built[order[i]];
    if (node.left >= 0) node.left = number[node.left];
    if (node.right >= 0) node.right = number[node.right];
    nodes[i] = node;
  }
}

template <class Coder>
ContextModel<Coder>::ContextModel(const ContextHeader& header, int64_t columns, Coder& coder)
    : coder_(coder),
      columns_(columns),
      centre_(header.centre),
      base_(header.variance << 5),
      variance_(static_cast<int64_t>(std::max<uint64_t>(power_of_two(2 * header.variance) >> 16, 1))),
      recent_(variance_),
      tree_(bell_sums(power_of_two(2 * header.variance + 1), 0)),
      energy_(columns),
      reference_(columns, variance_),
      own_level_(columns),
      blend_level_(columns),
      expected_(columns),
      reciprocals_(columns + 1) {
  const bool predicted = header.flags & ContextHeader::kPredicted;
  if (predicted) predictor_ = std::make_unique<RowPredictor>(columns);
  const int fractions = predicted ? kFractions : 1;
  std::vector<Nodes> levels;
  for (int level = 0; level < kLevels; ++level)
    for (int f = 0; f < fractions; ++f) levels.push_back(nodes_for(level, predicted ? f : -1, kLevelPrior));
  for (int i = 0; i < kInputs - 1; ++i) counters_[i] = levels;
  const int64_t column_contexts = std::min(columns, kMaxColumnContexts);
  for (int f = 0; f < fractions; ++f) {
    const Nodes nodes = nodes_for(kMiddle, predicted ? f : -1, kColumnPrior);
    if (f == 0) counters_[kInputs - 1].resize(column_contexts * fractions);
    for (int64_t c = 0; c < column_contexts; ++c) counters_[kInputs - 1][c * fractions + f] = nodes;
  }
  weights_.assign(tree_.nodes.size(), Weights{kOneWeight / 4, kOneWeight / 4, kOneWeight / 4, kOneWeight / 4});
  for (int n = 0; n < 1024; ++n) rates_[n] = static_cast<uint16_t>(655360 / (10 * n + 16));
  for (int64_t i = 1; i <= columns; ++i) reciprocals_[i] = (int64_t{1} << 32) / i;
}

template <class Coder>
auto ContextModel<Coder>::nodes_for(int level, int fraction, int observations) const -> Nodes {
  const uint64_t variance = power_of_two((base_ >> 5) * 2 + 2 * (level - kMiddle) + 1);
  const auto sums = bell_sums(variance, fraction < 0 ? 0 : 64 * fraction - 96);
  Nodes nodes{};
  for (size_t i = 0; i < tree_.nodes.size(); ++i) {
    const auto& node = tree_.nodes[i];
    const uint64_t left = sums[node.split] - sums[node.low], all = sums[node.high + 1] - sums[node.low];
    const uint64_t p = std::clamp<uint64_t>((left << kProbabilityBits) / all, 64, (1u << kProbabilityBits) - 65);
    nodes[i] = static_cast<Counter>(p << 10 | observations);
  }
  return nodes;
}

template <class Coder>
int ContextModel<Coder>::level_of(int log_variance) const {
  return std::clamp((log_variance - base_ + (kMiddle << 5)) >> 5, 0, kLevels - 1);
}

template <class Coder>
void ContextModel<Coder>::start_row(int64_t row) {
  const int64_t own = (int64_t{1} << 32) / (row + kOwnPrior), blend = (int64_t{1} << 32) / (row + kReferencePrior);
  for (int64_t j = 0; j < columns_; ++j) {
    const int64_t energy = energy_[j] << 8;
    const int64_t own_variance = columns_ == 1 ? recent_ : ((energy + kOwnPrior * variance_) * own) >> 32;
    own_level_[j] = level_of(log2_q8(own_variance));
    expected_[j] = ((energy + kReferencePrior * reference_[j]) * blend) >> 32;
    blend_level_[j] = level_of(log2_q8(expected_[j]));
  }
}

template <class Coder>
int8_t ContextModel<Coder>::code(int8_t value, const std::array<Counter*, kInputs>& contexts) {
  const int wanted = value + 128;
  int place = 0;
  do {
    const auto& node = tree_.nodes[place];
    Weights& weights = weights_[place];
    int32_t inputs[kInputs];
    int64_t sum = 1 << 23;
    for (int i = 0; i < kInputs; ++i) {
      inputs[i] = logistic_.stretch[contexts[i][place] >> 20];
      sum += static_cast<int64_t>(inputs[i]) * weights[i];
    }
    const int64_t mixed = std::clamp<int64_t>(sum >> 24, -kLogisticLimit, kLogisticLimit);
    const int32_t one = logistic_.squash[mixed + kLogisticLimit];
    const bool bit = coder_.code(wanted < node.split, static_cast<uint32_t>(one));
    const int32_t error = ((bit ? 65536 : 0) - one) * kLearningRate;
    const int32_t target = bit ? (1 << kProbabilityBits) - 1 : 0;
    for (int i = 0; i < kInputs; ++i) {
      const int64_t step = (int64_t{inputs[i]} * error + (1 << 13)) >> 14;
      weights[i] = static_cast<int32_t>(std::clamp<int64_t>(weights[i] + step, -kLargestWeight, kLargestWeight));
      Counter& counter = contexts[i][place];
      const int32_t observations = static_cast<int32_t>(counter & 1023), p = static_cast<int32_t>(counter >> 10);
      const int32_t moved = p + static_cast<int32_t>(static_cast<int64_t>(target - p) * rates_[observations] >> 16);
      const int32_t kept = std::clamp(moved, 64, (1 << kProbabilityBits) - 65);
      counter = static_cast<Counter>(kept) << 10 | static_cast<Counter>(std::min(observations + 1, kMostObservations));
    }
    place = bit ? node.left : node.right;
  } while (place >= 0);
  return static_cast<int8_t>(-1 - place - 128);
}

template <class Coder>
template <class T>
void ContextModel<Coder>::matrix(T* data, int64_t rows) {
  constexpr bool kEncode = std::is_const_v<T>;
  const int fractions = predictor_ ? kFractions : 1;
  std::fill(energy_.begin(), energy_.end(), 0);
  int64_t energy_of_rows = 0;
  for (int64_t r = 0; r < rows; ++r, data += columns_) {
    start_row(r);
    // Row scales fix a row's sum of squares, so that the rest of a row is known better and better (1/256 units).
    const int64_t usual = r > 0 ? (energy_of_rows << 8) / r : 0;
    int64_t rest = std::accumulate(expected_.begin(), expected_.end(), int64_t{0}), used = 0;
    for (int64_t j = 0; j < columns_; ++j) {
      int shift = 0, fraction = 0;
      if (predictor_) {
        const int32_t mean = predictor_->predict();
        shift = std::clamp((mean + 128) >> 8, -127, 127);
        fraction = std::clamp((mean - shift * 256 + 128) >> 6, 0, kFractions - 1);
      }
      int row_level = blend_level_[j];
      if (r > 0) {
        const int64_t trust = kRowPrior * (rest * reciprocals_[columns_ - j] >> 32);
        const int64_t left = std::max<int64_t>(usual - (used << 8), 0) + trust;
        row_level = level_of(log2_q8(expected_[j]) + log2_q8(left) - log2_q8(rest + trust));
      }
      const int64_t column = j & (kMaxColumnContexts - 1);
      const std::array<Counter*, kInputs> contexts{counters_[0][own_level_[j] * fractions + fraction].data(),
                                                   counters_[1][blend_level_[j] * fractions + fraction].data(),
                                                   counters_[2][row_level * fractions + fraction].data(),
                                                   counters_[3][column * fractions + fraction].data()};
      const int offset = centre_ + shift;
      int8_t residual = 0;
      if constexpr (kEncode) {
        residual = code(static_cast<int8_t>(data[j] - offset), contexts);
      } else {
        residual = code(0, contexts);
        data[j] = static_cast<int8_t>(residual + offset);
      }
      if (predictor_) predictor_->reveal(static_cast<int8_t>(data[j] - centre_));
      const int64_t square = int64_t{residual} * residual;
      energy_[j] += square;
      recent_ += ((square << 8) - recent_) >> kRecentShift;
      used += square;
      rest -= expected_[j];
    }
    energy_of_rows += used;
    if (predictor_) predictor_->end_row();
    if constexpr (!kEncode)
      if (coder_.overran()) return;  // a short stream does not get to fill a large matrix
  }
  const int64_t kFew = 4;
  for (int64_t j = 0; j < columns_; ++j) reference_[j] = ((energy_[j] << 8) + kFew * variance_) / (rows + kFew);
}

template class ContextModel<BinaryEncoder>;
template class ContextModel<BinaryDecoder>;
template void ContextModel<BinaryEncoder>::matrix(const int8_t*, int64_t);
template void ContextModel<BinaryDecoder>::matrix(int8_t*, int64_t);

}  // namespace pgolf
