// The context mode: every group of matrices is a stream of its own, so that groups run on threads of their own.
#include <algorithm>

#include "packing/binary_coder.h"
#include "packing/codes.h"
#include "packing/context_model.h"

namespace pgolf {
namespace {

template <class M>
bool may_be_predicted(const std::vector<M>& matrices, Group group) {
  const M& first = matrices[group.begin];
  return RowPredictor::takes(static_cast<int64_t>(group.end - group.begin), first.rows, first.cols);
}

ContextHeader describe(const ConstMatrices& matrices, Group group) {
  ContextHeader header;
  int64_t n = 0, sum = 0, squares = 0;
  for (size_t m = group.begin; m < group.end; ++m) {
    for (int64_t i = 0; i < matrices[m].size(); ++i) {
      sum += matrices[m].data[i];
      squares += matrices[m].data[i] * matrices[m].data[i];
    }
    n += matrices[m].size();
  }
  if (n == 0) return header;
  const int64_t centre = (2 * sum + (sum < 0 ? -n : n)) / (2 * n);
  const uint64_t around = static_cast<uint64_t>(squares - 2 * centre * sum + centre * centre * n);
  header.centre = static_cast<int8_t>(centre);
  header.variance = static_cast<uint8_t>(log2_q8((around << 8) / static_cast<uint64_t>(n)) >> 5);
  const auto& first = matrices[group.begin];
  if (may_be_predicted(matrices, group) && rows_are_predictable(first.data, first.rows, first.cols))
    header.flags |= ContextHeader::kPredicted;
  return header;
}

}  // namespace

std::vector<uint8_t> encode_context(const ConstMatrices& matrices, int threads) {
  const std::vector<Group> groups = groups_of(matrices);
  std::vector<ContextHeader> headers(groups.size());
  std::vector<std::vector<uint8_t>> streams(groups.size());
  for_each_group(matrices, groups, threads, [&](size_t g) {
    headers[g] = describe(matrices, groups[g]);
    BinaryEncoder encoder;
    ContextModel<BinaryEncoder> model(headers[g], matrices[groups[g].begin].cols, encoder);
    for (size_t m = groups[g].begin; m < groups[g].end; ++m) model.matrix(matrices[m].data, matrices[m].rows);
    streams[g] = encoder.finish();
  });
  std::vector<uint8_t> out;
  for (size_t g = 0; g < groups.size(); ++g) {
    out.insert(out.end(), {headers[g].flags, static_cast<uint8_t>(headers[g].centre), headers[g].variance});
    for (uint64_t left = streams[g].size();; left >>= 7) {
      out.push_back(static_cast<uint8_t>(left < 128 ? left : (left & 127) | 128));
      if (left < 128) break;
    }
  }
  for (const auto& stream : streams) out.insert(out.end(), stream.begin(), stream.end());
  return out;
}

void decode_context(const uint8_t* data, int64_t size, const Matrices& matrices, int threads) {
  const uint8_t* end = data + size;
  const std::vector<Group> groups = groups_of(matrices);
  struct Stream {
    ContextHeader header;
    const uint8_t* data;
    int64_t size;
  };
  std::vector<Stream> streams;
  for (const Group& group : groups) {
    if (end - data < 3) throw DamagedData("it ends within its headers");
    Stream stream{{data[0], static_cast<int8_t>(data[1]), data[2]}, nullptr, 0};
    data += 3;
    if (stream.header.flags > ContextHeader::kPredicted) throw DamagedData("a group has unknown flags");
    if (stream.header.variance > ContextHeader::kLargestVariance)
      throw DamagedData("a group's variance is more than int8 codes can have");
    if (stream.header.flags && !may_be_predicted(matrices, group))
      throw DamagedData("the rows of a group are none that are predicted");
    for (int shift = 0;; shift += 7) {
      if (data == end || shift > 35) throw DamagedData("a stream's length is damaged");
      stream.size |= static_cast<int64_t>(*data & 127) << shift;
      if (*data++ < 128) break;
    }
    streams.push_back(stream);
  }
  for (Stream& stream : streams) {
    if (stream.size > end - data) throw DamagedData("a stream ends behind the data");
    stream.data = data;
    data += stream.size;
  }
  if (data != end) throw DamagedData("bytes are left over");
  std::vector<char> good(groups.size(), 0);
  for_each_group(matrices, groups, threads, [&](size_t g) {
    BinaryDecoder decoder(streams[g].data, streams[g].size);
    ContextModel<BinaryDecoder> model(streams[g].header, matrices[groups[g].begin].cols, decoder);
    for (size_t m = groups[g].begin; m < groups[g].end && !decoder.overran(); ++m)
      model.matrix(matrices[m].data, matrices[m].rows);
    good[g] = decoder.finished();
  });
  if (!std::all_of(good.begin(), good.end(), [](char g) { return g != 0; }))
    throw DamagedData("a stream does not end where its matrices do");
}

}  // namespace pgolf
