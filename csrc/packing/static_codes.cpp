// The static mode: interleaved rANS. State x of a lane lies in [2^16, 2^32); a symbol with frequency f and cumulative
// frequency c of 2^kPrecision maps x to (x / f) * 2^kPrecision + c + x % f, and 16-bit words leave the state when it
// would grow too large. Symbol i of a run belongs to lane i % lanes; all lanes share one stream of words, in the order
// in which the decoder asks for them, so that the decoder can also be written with whole-array operations.
#include <algorithm>
#include <cstring>

#include "packing/codes.h"
#include "packing/column_clusters.h"

namespace pgolf {
namespace {

constexpr int kPrecision = 14;
constexpr uint32_t kTotal = 1u << kPrecision;
constexpr uint32_t kLowest = 1u << 16;
constexpr int kMaxLanesLog = 10;
constexpr int64_t kSymbolsPerLane = 32768;  // four bytes of state a lane should stay a small part of the file

// A weight of eight bits: 0, or (16 + mantissa) << exponent. Tables travel as weights, three per cent apart.
uint32_t weight_of(uint8_t code) { return code == 0 ? 0 : (16u + (code & 15u)) << (code >> 4); }

uint8_t nearest_weight(double value) {
  int best = 1;
  for (int code = 1; code < 256; ++code)
    if (std::abs(weight_of(code) - value) < std::abs(weight_of(best) - value)) best = code;
  return static_cast<uint8_t>(best);
}

// Frequencies that sum to kTotal: max(1, w * kTotal / sum), the rest to the largest weight. False when they cannot.
bool frequencies_of(const uint8_t* weights, int symbols, uint32_t* frequency) {
  uint64_t sum = 0;
  for (int s = 0; s < symbols; ++s) sum += weight_of(weights[s]);
  if (sum == 0) return false;
  int64_t rest = kTotal;
  int largest = 0;
  for (int s = 0; s < symbols; ++s) {
    const uint64_t w = weight_of(weights[s]);
    frequency[s] = w == 0 ? 0 : static_cast<uint32_t>(std::max<uint64_t>(1, w * kTotal / sum));
    rest -= frequency[s];
    if (weight_of(weights[s]) > weight_of(weights[largest])) largest = s;
  }
  if (rest + frequency[largest] < 1) return false;
  frequency[largest] = static_cast<uint32_t>(frequency[largest] + rest);
  return true;
}

std::vector<uint8_t> weights_of(const std::vector<int64_t>& histogram) {
  const int64_t most = *std::max_element(histogram.begin(), histogram.end());
  std::vector<uint8_t> weights(histogram.size(), 0);
  if (most == 0) weights[0] = 1;
  for (size_t s = 0; s < histogram.size(); ++s)
    if (histogram[s] > 0)
      weights[s] = nearest_weight(static_cast<double>(histogram[s]) * weight_of(255) / static_cast<double>(most));
  return weights;
}

// Several distributions over the same symbols.
struct Tables {
  int symbols, count;
  std::vector<uint32_t> frequency, start;  // [count][symbols]
  std::vector<uint8_t> symbol;             // [count][kTotal], which symbol a slot belongs to

  Tables(int symbols, int count, const uint8_t* weights)
      : symbols(symbols),
        count(count),
        frequency(symbols * count),
        start(symbols * count),
        symbol(static_cast<size_t>(count) * kTotal) {
    for (int t = 0; t < count; ++t) {
      uint32_t* f = frequency.data() + t * symbols;
      if (!frequencies_of(weights + t * symbols, symbols, f)) throw DamagedData("a frequency table is damaged");
      uint32_t sum = 0;
      for (int s = 0; s < symbols; ++s) {
        start[t * symbols + s] = sum;
        std::memset(symbol.data() + t * kTotal + sum, s, f[s]);
        sum += f[s];
      }
    }
  }
};

int lanes_log_for(int64_t symbols) {
  int log = 0;
  while (log < kMaxLanesLog && (kSymbolsPerLane << (log + 1)) <= symbols) ++log;
  return log;
}

// Codes backwards; words come out last first.
class Encoder {
 public:
  Encoder(int lanes_log, int64_t symbols) : states_(size_t{1} << lanes_log, kLowest), words_(symbols) {
    next_ = words_.size();
  }

  // symbol_at(i), table_at(i) for i in [0, n): which table entry codes position i.
  template <class EntryAt>
  void run(int64_t n, const Tables& tables, const EntryAt& entry_at) {
    const int64_t mask = static_cast<int64_t>(states_.size()) - 1;
    for (int64_t i = n - 1; i >= 0; --i) {
      uint32_t& x = states_[i & mask];
      const int64_t entry = entry_at(i);
      const uint32_t f = tables.frequency[entry];
      if (x >= static_cast<uint64_t>(f) << (32 - kPrecision)) {
        words_[--next_] = static_cast<uint16_t>(x);
        x >>= 16;
      }
      x = ((x / f) << kPrecision) + tables.start[entry] + x % f;
    }
  }

  void finish(std::vector<uint8_t>& out) const {
    for (uint32_t x : states_)
      for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<uint8_t>(x >> shift));
    for (size_t i = next_; i < words_.size(); ++i) {
      out.push_back(static_cast<uint8_t>(words_[i]));
      out.push_back(static_cast<uint8_t>(words_[i] >> 8));
    }
  }

 private:
  std::vector<uint32_t> states_;
  std::vector<uint16_t> words_;
  size_t next_;
};

class Decoder {
 public:
  Decoder(int lanes_log, const uint8_t* data, const uint8_t* end) : states_(size_t{1} << lanes_log) {
    if (end - data < static_cast<int64_t>(4 * states_.size())) throw DamagedData("it ends within the lanes' states");
    for (uint32_t& x : states_) {
      x = data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24;
      if (x < kLowest) throw DamagedData("a lane's state is damaged");
      data += 4;
    }
    next_ = data;
    end_ = end;
  }

  // Symbols of a run of rows x cols; column c uses table `table[c]`.
  void run(int64_t rows, int64_t cols, const Tables& tables, const uint8_t* table, int lowest, int8_t* out) {
    const int64_t mask = static_cast<int64_t>(states_.size()) - 1;
    int64_t i = 0;
    for (int64_t r = 0; r < rows; ++r) {
      // Every symbol reads at most one word: a row for which there are enough needs no further checks.
      if (end_ - next_ >= 2 * cols) {
        for (int64_t c = 0; c < cols; ++c, ++i) out[i] = decode<false>(states_[i & mask], tables, table[c], lowest);
      } else {
        for (int64_t c = 0; c < cols; ++c, ++i) out[i] = decode<true>(states_[i & mask], tables, table[c], lowest);
      }
    }
  }

  void finish() const {
    if (next_ != end_) throw DamagedData("bytes are left over");
    for (uint32_t x : states_)
      if (x != kLowest) throw DamagedData("a lane does not end where it began");
  }

 private:
  template <bool Checked>
  int8_t decode(uint32_t& state, const Tables& tables, int table, int lowest) {
    uint32_t x = state;
    const uint32_t slot = x & (kTotal - 1);
    const int s = tables.symbol[static_cast<size_t>(table) * kTotal + slot];
    const size_t entry = static_cast<size_t>(table) * tables.symbols + s;
    x = tables.frequency[entry] * (x >> kPrecision) + slot - tables.start[entry];
    if (x < kLowest) {
      if (Checked && end_ - next_ < 2) throw DamagedData("it ends early");
      x = x << 16 | next_[0] | next_[1] << 8;
      next_ += 2;
    }
    state = x;
    return static_cast<int8_t>(s + lowest);
  }

  std::vector<uint32_t> states_;
  const uint8_t* next_;
  const uint8_t* end_;
};

// A group's part of the header: lowest code, number of symbols and of tables, weights of the tables and (with more
// than one) of the cluster numbers.
struct GroupModel {
  int lowest;
  Tables codes;
  Tables clusters;

  // The bytes of the part that begins at `data`, which `read` may then take.
  static int64_t size(const uint8_t* data, const uint8_t* end) {
    if (end - data < 3) throw DamagedData("it ends within its tables");
    const int64_t symbols = data[1] + 1, tables = data[2] + 1;
    const int64_t bytes = 3 + symbols * tables + (tables > 1 ? tables : 0);
    if (end - data < bytes) throw DamagedData("it ends within its tables");
    if (static_cast<int8_t>(data[0]) + symbols > 128) throw DamagedData("a table has codes above 127");
    return bytes;
  }

  static GroupModel read(const uint8_t* data) {
    const int lowest = static_cast<int8_t>(data[0]), symbols = data[1] + 1, tables = data[2] + 1;
    static const uint8_t kOne = 1;
    const uint8_t* weights = data + 3;
    return {lowest, Tables(symbols, tables, weights),
            Tables(tables, 1, tables > 1 ? weights + symbols * tables : &kOne)};
  }
};

std::vector<uint8_t> group_header(const ColumnClusters& clusters) {
  std::vector<uint8_t> bytes{static_cast<uint8_t>(clusters.lowest), static_cast<uint8_t>(clusters.symbols - 1),
                             static_cast<uint8_t>(clusters.tables - 1)};
  for (const auto& histogram : clusters.histograms)
    for (uint8_t w : weights_of(histogram)) bytes.push_back(w);
  if (clusters.tables > 1) {
    std::vector<int64_t> columns(clusters.tables, 0);
    for (uint8_t k : clusters.cluster) ++columns[k];
    for (uint8_t w : weights_of(columns)) bytes.push_back(w);
  }
  return bytes;
}

}  // namespace

std::vector<uint8_t> encode_static(const ConstMatrices& matrices, int threads) {
  const std::vector<Group> groups = groups_of(matrices);
  std::vector<ColumnClusters> clusters(groups.size());
  for_each_group(matrices, groups, threads, [&](size_t g) { clusters[g] = cluster_columns(matrices, groups[g]); });
  std::vector<GroupModel> models;
  std::vector<uint8_t> out(1);
  int64_t codes = 0, indices = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const std::vector<uint8_t> header = group_header(clusters[g]);
    models.push_back(GroupModel::read(header.data()));
    out.insert(out.end(), header.begin(), header.end());
    codes += group_size(matrices, groups[g]);
    indices += static_cast<int64_t>(clusters[g].cluster.size());
  }
  const int lanes_log = lanes_log_for(codes);
  out[0] = static_cast<uint8_t>(lanes_log);
  Encoder encoder(lanes_log, codes + indices);
  for (size_t g = groups.size(); g-- > 0;) {
    const GroupModel& model = models[g];
    const int symbols = model.codes.symbols;
    for (size_t m = groups[g].end; m-- > groups[g].begin;) {
      const Matrix<const int8_t>& matrix = matrices[m];
      const uint8_t* cluster = clusters[g].cluster.data() + (m - groups[g].begin) * matrix.cols;
      int64_t column = matrix.cols;
      encoder.run(matrix.size(), model.codes, [&](int64_t i) {
        column = column == 0 ? matrix.cols - 1 : column - 1;
        return static_cast<int64_t>(cluster[column]) * symbols + matrix.data[i] - model.lowest;
      });
    }
    if (model.codes.count > 1) {
      const std::vector<uint8_t>& cluster = clusters[g].cluster;
      encoder.run(static_cast<int64_t>(cluster.size()), model.clusters, [&](int64_t i) { return int64_t{cluster[i]}; });
    }
  }
  encoder.finish(out);
  return out;
}

void decode_static(const uint8_t* data, int64_t size, const Matrices& matrices) {
  const uint8_t* end = data + size;
  int64_t codes = 0;
  for (const auto& matrix : matrices) codes += matrix.size();
  const int lanes_log = lanes_log_for(codes);
  if (size < 1 || *data++ != lanes_log) throw DamagedData("its number of lanes is damaged");
  const std::vector<Group> groups = groups_of(matrices);
  std::vector<const uint8_t*> headers;
  for (size_t g = 0; g < groups.size(); ++g) {
    headers.push_back(data);
    data += GroupModel::size(data, end);
  }
  Decoder decoder(lanes_log, data, end);
  static const uint8_t kOnly = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const GroupModel model = GroupModel::read(headers[g]);  // one at a time: a few bytes ask for megabytes of tables
    const int64_t cols = matrices[groups[g].begin].cols;
    const int64_t columns = cols * static_cast<int64_t>(groups[g].end - groups[g].begin);
    std::vector<uint8_t> cluster(columns, 0);
    if (model.codes.count > 1)
      decoder.run(columns, 1, model.clusters, &kOnly, 0, reinterpret_cast<int8_t*>(cluster.data()));
    for (size_t m = groups[g].begin; m < groups[g].end; ++m)
      decoder.run(matrices[m].rows, cols, model.codes, cluster.data() + (m - groups[g].begin) * cols, model.lowest,
                  matrices[m].data);
  }
  decoder.finish();
}

}  // namespace pgolf
