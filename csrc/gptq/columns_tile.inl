// The column pass over one group of rows, written once for all instruction sets and both precisions: gptq_cpu.cpp
// includes this file once per instruction set, with PGOLF_TARGET set to the function attribute that enables it. A
// template parameter V supplies the registers:
//   Scalar, Reg, kLanes, kVectors (registers per tile row), kGroup (columns whose sums stay in registers), and
//   load, store, broadcast, add, sub, mul, div, fma, clamp.
// A tile holds kRows = kLanes * kVectors weight rows, transposed: tile[j * kRows + r].

// sums[kGroup][kRows] += errors[k][kRows] * panel[k][kGroup] over `depth` values of k; the strides are those of the
// arrays' first index.
template <class V>
PGOLF_TARGET inline void accumulate(typename V::Scalar* sums, int64_t sums_stride, const typename V::Scalar* errors,
                                    int64_t errors_stride, const typename V::Scalar* panel, int64_t panel_stride,
                                    int64_t depth) {
  typename V::Reg acc[V::kGroup][V::kVectors];
  for (int i = 0; i < V::kGroup; ++i)
    for (int v = 0; v < V::kVectors; ++v) acc[i][v] = V::load(sums + i * sums_stride + v * V::kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    typename V::Reg error[V::kVectors];
    for (int v = 0; v < V::kVectors; ++v) error[v] = V::load(errors + k * errors_stride + v * V::kLanes);
    for (int i = 0; i < V::kGroup; ++i) {
      const typename V::Reg weight = V::broadcast(panel[k * panel_stride + i]);
      for (int v = 0; v < V::kVectors; ++v) acc[i][v] = V::fma(error[v], weight, acc[i][v]);
    }
  }
  for (int i = 0; i < V::kGroup; ++i)
    for (int v = 0; v < V::kVectors; ++v) V::store(sums + i * sums_stride + v * V::kLanes, acc[i][v]);
}

// The panel of one group of columns starting at j0: the rows k >= j0 of the feedback coefficients
// factor[k][j] * row_gain[k] * column_gain[j], packed as panel[(k - j0) * kGroup + j - j0].
template <class V>
PGOLF_TARGET void pack_group(const typename V::Scalar* factor, int64_t cols, int64_t j0, int64_t width,
                             const typename V::Scalar* row_gain, const typename V::Scalar* column_gain,
                             typename V::Scalar* panel) {
  using Scalar = typename V::Scalar;
  for (int64_t k = j0; k < cols; ++k) {
    const Scalar* row = factor + k * cols + j0;
    Scalar* out = panel + (k - j0) * V::kGroup;
    if (width == V::kGroup) {
      for (int64_t i = 0; i < V::kGroup; ++i) out[i] = row[i] * row_gain[k] * column_gain[j0 + i];
    } else {
      for (int64_t i = 0; i < V::kGroup; ++i)
        out[i] = i < width ? row[i] * row_gain[k] * column_gain[j0 + i] : Scalar(0);
    }
  }
}

// Quantises the columns of one group, last first; `tile` and `codes` point at the group's first column. Weights in
// `tile` become errors.
template <class V>
PGOLF_TARGET void quantize_group(typename V::Scalar* tile, typename V::Scalar* codes, const typename V::Scalar* sums,
                                 const typename V::Scalar* panel, const typename V::Scalar* scales,
                                 typename V::Scalar max_code, int64_t width, bool residual) {
  using Scalar = typename V::Scalar;
  constexpr int rows = V::kLanes * V::kVectors;
  // Adding and subtracting 1.5 * 2^(mantissa bits) rounds half to even; the clamp keeps the sum in range.
  const auto magic = V::broadcast(sizeof(Scalar) == 4 ? Scalar(12582912.0) : Scalar(6755399441055744.0));
  const auto high = V::broadcast(max_code);
  const auto low = V::broadcast(-max_code);
  for (int v = 0; v < V::kVectors; ++v) {
    typename V::Reg acc[V::kGroup];
    for (int i = 0; i < V::kGroup; ++i) acc[i] = V::load(sums + i * rows + v * V::kLanes);
    const auto scale = V::load(scales + v * V::kLanes);
    for (int i = V::kGroup - 1; i >= 0; --i) {
      if (i >= width) continue;
      Scalar* column = tile + i * rows + v * V::kLanes;
      const auto weight = V::load(column);
      const auto corrected = V::add(weight, acc[i]);
      const auto code = V::sub(V::add(V::clamp(V::div(corrected, scale), low, high), magic), magic);
      const auto value = V::mul(code, scale);
      const auto error = residual ? V::sub(value, corrected) : V::sub(weight, value);
      V::store(column, error);
      V::store(codes + i * rows + v * V::kLanes, code);
      for (int before = 0; before < i; ++before)
        acc[before] = V::fma(error, V::broadcast(panel[i * V::kGroup + before]), acc[before]);
    }
  }
}

// All columns of the rows [begin, end).
template <class V>
PGOLF_TARGET void quantize_rows(const GptqMatrix& m, bool residual, int64_t block, int64_t begin, int64_t end) {
  using Scalar = typename V::Scalar;
  constexpr int64_t rows = V::kLanes * V::kVectors;
  constexpr int64_t depth_step = 256;  // errors of 256 columns of one tile stay in the first-level cache
  const auto* weight = static_cast<const Scalar*>(m.weight);
  const auto* factor = static_cast<const Scalar*>(m.factor);
  const int64_t cols = m.cols;
  const int64_t tiles = (end - begin + rows - 1) / rows;
  const bool feedback = *m.status == 0;
  block = std::min((block + V::kGroup - 1) / V::kGroup * V::kGroup, (cols + V::kGroup - 1) / V::kGroup * V::kGroup);

  const int64_t groups = block / V::kGroup;
  const int64_t panel_stride = (cols + V::kGroup) * V::kGroup;
  AlignedBuffer<Scalar> tile_data(tiles * cols * rows), scales(tiles * rows), panel(groups * panel_stride),
      sums(block * rows), codes(block * rows);
  AlignedBuffer<Scalar> row_gain(cols), column_gain(cols);
  for (int64_t j = 0; j < cols; ++j) {
    const Scalar inverse = feedback ? Scalar(1) / factor[j * cols + j] : Scalar(0);
    row_gain.get()[j] = residual ? inverse : Scalar(1);
    column_gain.get()[j] = residual ? Scalar(1) : inverse;
  }
  if (!feedback) std::fill_n(panel.get(), groups * panel_stride, Scalar(0));
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = begin + t * rows;
    const int64_t live = std::min(rows, end - first);
    Scalar* tile = tile_data.get() + t * cols * rows;
    for (int64_t r = 0; r < rows; ++r)
      scales.get()[t * rows + r] = r < live ? static_cast<const Scalar*>(m.scales)[first + r] : Scalar(1);
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t column = m.order[j];
      for (int64_t r = 0; r < rows; ++r)
        tile[j * rows + r] = column >= 0 && r < live ? weight[(first + r) * cols + column] : Scalar(0);
    }
  }
  // Blocks start at multiples of `block`, so that every group but the last is full.
  for (int64_t b0 = (cols - 1) / block * block; b0 >= 0; b0 -= block) {
    const int64_t b1 = std::min(cols, b0 + block);
    if (feedback)
      for (int64_t j0 = b0; j0 < b1; j0 += V::kGroup)
        pack_group<V>(factor, cols, j0, std::min<int64_t>(V::kGroup, b1 - j0), row_gain.get(), column_gain.get(),
                      panel.get() + (j0 - b0) / V::kGroup * panel_stride);
    for (int64_t t = 0; t < tiles; ++t) {
      Scalar* tile = tile_data.get() + t * cols * rows;
      std::fill_n(sums.get(), block * rows, Scalar(0));
      for (int64_t k = b1; feedback && k < cols; k += depth_step)
        for (int64_t j0 = b0; j0 < b1; j0 += V::kGroup)
          accumulate<V>(sums.get() + (j0 - b0) * rows, rows, tile + k * rows, rows,
                        panel.get() + (j0 - b0) / V::kGroup * panel_stride + (k - j0) * V::kGroup, V::kGroup,
                        std::min(depth_step, cols - k));
      for (int64_t j0 = b0 + (b1 - b0 - 1) / V::kGroup * V::kGroup; j0 >= b0; j0 -= V::kGroup) {
        const Scalar* group = panel.get() + (j0 - b0) / V::kGroup * panel_stride;
        const int64_t after = std::min<int64_t>(j0 + V::kGroup, b1);
        if (feedback && after < b1)
          accumulate<V>(sums.get() + (j0 - b0) * rows, rows, tile + after * rows, rows,
                        group + (after - j0) * V::kGroup, V::kGroup, b1 - after);
        quantize_group<V>(tile + j0 * rows, codes.get() + (j0 - b0) * rows, sums.get() + (j0 - b0) * rows, group,
                          scales.get() + t * rows, Scalar(m.max_code), after - j0, residual);
      }
      const int64_t first = begin + t * rows;
      for (int64_t r = 0; r < std::min(rows, end - first); ++r)
        for (int64_t j = b0; j < b1; ++j) {
          const int32_t column = m.order[j];
          m.codes[(first + r) * cols + (column >= 0 ? column : ~column)] =
              static_cast<int8_t>(codes.get()[(j - b0) * rows + r]);
        }
    }
  }
}
