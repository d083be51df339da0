#include "packing/column_clusters.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace pgolf {
namespace {

constexpr int kStarts[] = {1, 8, 32};  // cluster counts to start from
constexpr int kIterations = 12;
constexpr float kTableBits = 8.0f;  // what one symbol of one table costs in the file
constexpr double kPrior = 0.05;     // weight of the group's own histogram, in observations a symbol

struct Histograms {
  int lowest = 0, symbols = 1;
  int64_t columns = 0;
  std::vector<float> counts;  // [columns][symbols]
};

Histograms count_columns(const ConstMatrices& matrices, Group group) {
  Histograms h;
  const int64_t cols = matrices[group.begin].cols, each = matrices[group.begin].size();
  const int64_t number = static_cast<int64_t>(group.end - group.begin);
  h.columns = number * cols;
  int8_t low = 127, high = -128;
  for (size_t m = group.begin; m < group.end; ++m) {
    const int8_t* data = matrices[m].data;
    for (int64_t i = 0; i < each; ++i) {
      low = std::min(low, data[i]);
      high = std::max(high, data[i]);
    }
  }
  if (low > high) low = high = 0;  // no codes at all
  h.lowest = low;
  h.symbols = high - low + 1;
  h.counts.assign(h.columns * h.symbols, 0.0f);
  for (int64_t m = 0; m < number; ++m) {
    float* counts = h.counts.data() + m * cols * h.symbols;
    const int8_t* data = matrices[group.begin + m].data;
    for (int64_t i = 0; i < each; i += cols)
      for (int64_t c = 0; c < cols; ++c) counts[c * h.symbols + data[i + c] - h.lowest] += 1.0f;
  }
  return h;
}

// Equal parts of the columns in the order of their spread.
std::vector<uint8_t> first_guess(const Histograms& h, int tables) {
  std::vector<std::pair<float, int64_t>> order(h.columns);
  for (int64_t c = 0; c < h.columns; ++c) {
    const float* counts = h.counts.data() + c * h.symbols;
    float n = 0, sum = 0, squares = 0;
    for (int s = 0; s < h.symbols; ++s) {
      n += counts[s];
      sum += counts[s] * s;
      squares += counts[s] * s * s;
    }
    order[c] = {n > 0 ? squares / n - (sum / n) * (sum / n) : 0.0f, c};
  }
  std::sort(order.begin(), order.end());
  std::vector<uint8_t> cluster(h.columns);
  for (int64_t i = 0; i < h.columns; ++i) cluster[order[i].second] = static_cast<uint8_t>(i * tables / h.columns);
  return cluster;
}

struct Split {
  std::vector<uint8_t> cluster;
  int tables = 1;
  double bits = std::numeric_limits<double>::infinity();
};

// Renumbers the clusters that are in use and sums their histograms.
std::vector<double> sum_clusters(const Histograms& h, Split& split, std::vector<int64_t>& columns) {
  std::vector<int64_t> used(256, 0);
  for (uint8_t k : split.cluster) ++used[k];
  std::vector<uint8_t> renamed(256, 0);
  columns.clear();
  for (int k = 0; k < 256; ++k) {
    if (!used[k]) continue;
    renamed[k] = static_cast<uint8_t>(columns.size());
    columns.push_back(used[k]);
  }
  split.tables = std::max<int>(1, static_cast<int>(columns.size()));
  std::vector<double> sums(split.tables * h.symbols, 0.0);
  for (int64_t c = 0; c < h.columns; ++c) {
    split.cluster[c] = renamed[split.cluster[c]];
    for (int s = 0; s < h.symbols; ++s) sums[split.cluster[c] * h.symbols + s] += h.counts[c * h.symbols + s];
  }
  return sums;
}

Split refine(const Histograms& h, int tables) {
  Split split{first_guess(h, tables), tables, 0};
  std::vector<int64_t> columns;
  std::vector<double> best(h.columns);
  for (int round = 0; round < kIterations; ++round) {
    const std::vector<double> sums = sum_clusters(h, split, columns);
    const int count = split.tables;
    std::vector<double> all(h.symbols, 0.0);
    for (size_t i = 0; i < sums.size(); ++i) all[i % h.symbols] += sums[i];
    const double total = std::accumulate(all.begin(), all.end(), 0.0);
    // lengths[s][k]: bits of symbol s in cluster k, clusters side by side for the inner loop.
    std::vector<float> lengths(h.symbols * count), index_bits(count);
    for (int k = 0; k < count; ++k) {
      double n = 0;
      for (int s = 0; s < h.symbols; ++s) n += sums[k * h.symbols + s];
      const double weight = kPrior * h.symbols;
      for (int s = 0; s < h.symbols; ++s) {
        const double prior = total > 0 ? (all[s] + 1e-3) / (total + 1e-3 * h.symbols) : 1.0 / h.symbols;
        lengths[s * count + k] =
            static_cast<float>(-std::log2((sums[k * h.symbols + s] + weight * prior) / (n + weight)));
      }
      index_bits[k] = static_cast<float>(-std::log2(static_cast<double>(columns[k]) / h.columns));
    }
    std::vector<float> cost(count);
    for (int64_t c = 0; c < h.columns; ++c) {
      std::copy(index_bits.begin(), index_bits.end(), cost.begin());
      for (int s = 0; s < h.symbols; ++s) {
        const float n = h.counts[c * h.symbols + s];
        if (n == 0.0f) continue;
        const float* bits = lengths.data() + s * count;
        for (int k = 0; k < count; ++k) cost[k] += n * bits[k];
      }
      const auto least = std::min_element(cost.begin(), cost.end());
      split.cluster[c] = static_cast<uint8_t>(least - cost.begin());
      best[c] = *least;
    }
    const double bits = std::accumulate(best.begin(), best.end(), 0.0) + kTableBits * count * h.symbols;
    const bool settled = split.bits > 0 && bits > split.bits * (1 - 1e-6);
    split.bits = bits;
    if (settled) break;
  }
  return split;
}

}  // namespace

ColumnClusters cluster_columns(const ConstMatrices& matrices, Group group) {
  const Histograms h = count_columns(matrices, group);
  Split best;
  for (int tables : kStarts) {
    if (tables > h.columns) break;
    Split split = refine(h, tables);
    if (split.bits < best.bits) best = std::move(split);
  }
  std::vector<int64_t> columns;
  const std::vector<double> sums = sum_clusters(h, best, columns);
  ColumnClusters result;
  result.lowest = h.lowest;
  result.symbols = h.symbols;
  result.tables = best.tables;
  result.cluster = std::move(best.cluster);
  for (int k = 0; k < result.tables; ++k)
    result.histograms.emplace_back(sums.begin() + k * h.symbols, sums.begin() + (k + 1) * h.symbols);
  return result;
}

}  // namespace pgolf
