// Entropy coding of int8 matrices. docs/packing.md describes both formats byte by byte.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace pgolf {

template <class T>
struct Matrix {
  T* data;  // row-major
  int64_t rows, cols;
  int64_t size() const { return rows * cols; }
};
using ConstMatrices = std::vector<Matrix<const int8_t>>;
using Matrices = std::vector<Matrix<int8_t>>;

// Data that no encoder wrote. Decoders throw it, and never read or write outside their buffers.
struct DamagedData : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Interleaved rANS with static tables, one for each cluster of columns.
std::vector<uint8_t> encode_static(const ConstMatrices& matrices, int threads);
void decode_static(const uint8_t* data, int64_t size, const Matrices& matrices);

// Adaptive models of columns, rows and earlier matrices, mixed bit by bit before arithmetic coding.
std::vector<uint8_t> encode_context(const ConstMatrices& matrices, int threads);
void decode_context(const uint8_t* data, int64_t size, const Matrices& matrices, int threads);

// Matrices [begin, end) of one shape, which share their models.
struct Group {
  size_t begin, end;
};
template <class M>
std::vector<Group> groups_of(const std::vector<M>& matrices) {
  std::vector<Group> groups;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const bool same = i > 0 && matrices[i].rows == matrices[i - 1].rows && matrices[i].cols == matrices[i - 1].cols;
    if (same)
      groups.back().end = i + 1;
    else
      groups.push_back({i, i + 1});
  }
  return groups;
}

}  // namespace pgolf
