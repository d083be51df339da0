// Entropy coding of int8 matrices. docs/packing.md describes both formats byte by byte.
#pragma once
#include <algorithm>
#include <cstdint>
#include <exception>
#include <numeric>
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

template <class M>
int64_t group_size(const std::vector<M>& matrices, Group group) {
  return matrices[group.begin].size() * static_cast<int64_t>(group.end - group.begin);
}

// Calls run(group index) for every group, the largest first, on up to `threads` threads. Throws what a call threw.
template <class M, class Run>
void for_each_group(const std::vector<M>& matrices, const std::vector<Group>& groups, int threads, const Run& run) {
  std::vector<size_t> order(groups.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return group_size(matrices, groups[a]) > group_size(matrices, groups[b]);
  });
  const int64_t count = static_cast<int64_t>(order.size());
  std::exception_ptr failure;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) \
    num_threads(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count))))
#endif
  for (int64_t i = 0; i < count; ++i) {
    try {
      run(order[i]);
    } catch (...) {  // may not leave the parallel region
#ifdef _OPENMP
#pragma omp critical(pgolf_for_each_group)
#endif
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace pgolf
