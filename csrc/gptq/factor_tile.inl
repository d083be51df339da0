// The Cholesky factorisation of the permuted, damped Hessian, included after columns_tile.inl for each instruction set.
// It works on the upper triangle by rows, so that all vector accesses are contiguous: with A = U^T U, blocks of
// kFactorBlock rows of U are finished one after the other, and what is left of A is kept negated, so that every update
// adds. Row j of the workspace starts at work + j * stride; columns beyond the matrix hold zeros.

inline constexpr int64_t kFactorBlock = 96;  // a multiple of every kRows and kGroup

// Finishes the square at the block's diagonal. Returns 0, or the number of the first pivot that is not positive.
template <class V>
PGOLF_TARGET int32_t factor_diagonal(typename V::Scalar* work, int64_t stride, int64_t b0, int64_t b1) {
  using Scalar = typename V::Scalar;
  for (int64_t k = b0; k < b1; ++k) {
    Scalar* row = work + k * stride;
    const Scalar pivot = -row[k];
    if (!(pivot > 0)) return static_cast<int32_t>(k + 1);
    const Scalar root = std::sqrt(pivot);
    row[k] = root;
    for (int64_t i = k + 1; i < b1; ++i) row[i] = -row[i] / root;
    for (int64_t j = k + 1; j < b1; ++j) {
      Scalar* below = work + j * stride;
      const Scalar factor = row[j];
      for (int64_t i = j; i < b1; ++i) below[i] += factor * row[i];
    }
  }
  return 0;
}

// Finishes the block's rows in the columns [begin, end), multiples of kRows, to the right of its diagonal square.
template <class V>
PGOLF_TARGET void factor_right(typename V::Scalar* work, int64_t stride, int64_t b0, int64_t b1, int64_t begin,
                               int64_t end) {
  using Scalar = typename V::Scalar;
  constexpr int64_t rows = V::kLanes * V::kVectors;
  for (int64_t tile = begin; tile < end; tile += rows) {
    for (int64_t k = b0; k < b1; ++k) {
      typename V::Reg acc[V::kVectors];
      for (int v = 0; v < V::kVectors; ++v) acc[v] = V::load(work + k * stride + tile + v * V::kLanes);
      for (int64_t m = b0; m < k; ++m) {
        const auto factor = V::broadcast(work[m * stride + k]);
        for (int v = 0; v < V::kVectors; ++v)
          acc[v] = V::fma(V::load(work + m * stride + tile + v * V::kLanes), factor, acc[v]);
      }
      const auto inverse = V::broadcast(Scalar(-1) / work[k * stride + k]);
      for (int v = 0; v < V::kVectors; ++v) V::store(work + k * stride + tile + v * V::kLanes, V::mul(acc[v], inverse));
    }
  }
}

// Adds the finished block's part to the rows [begin, end), multiples of kGroup below it.
template <class V>
PGOLF_TARGET void factor_below(typename V::Scalar* work, int64_t stride, int64_t size, int64_t b0, int64_t b1,
                               int64_t begin, int64_t end) {
  constexpr int64_t rows = V::kLanes * V::kVectors;
  for (int64_t tile = begin / rows * rows; tile < size; tile += rows)
    for (int64_t j = begin; j < std::min(end, tile + rows); j += V::kGroup)
      accumulate<V>(work + j * stride + tile, stride, work + b0 * stride + tile, stride, work + b0 * stride + j, stride,
                    b1 - b0);
}
