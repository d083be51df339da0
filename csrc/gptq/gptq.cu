// The GPTQ column pass on CUDA: all rows of all matrices in one launch.
//
// A CTA takes 32 rows of one matrix and goes through its columns in blocks of 128, last block first. For each block it
// multiplies the errors of all finished columns with their factor panel (a 32 x 128 tile in registers, both operands
// through shared memory, two stages of asynchronous copies), then quantises the block in steps of 16 columns: one warp,
// a row a lane, runs through the 16 columns in registers, and all threads bring the errors to the block's other
// columns. CTAs share nothing, so there is nothing to wait for between them. Errors live in scratch memory, [cols][32]
// for each CTA, which the second-level cache holds.
#include "gptq/gptq.h"

#ifdef PGOLF_CUDA
#include <algorithm>
#include <vector>

#include "common/cuda_launch.h"

namespace pgolf {
namespace {

constexpr int kRows = 32;
constexpr int kBlock = 128;     // columns of a block; also the number of threads
constexpr int kDepth = 32;      // finished columns of one stage
constexpr int kStep = 16;       // columns that one warp quantises in a row
constexpr int kMatrices = 400;  // of one launch: the table travels as a kernel parameter (32,764 bytes at most)
constexpr int kPadded = kRows + 1;

struct Table {
  GptqMatrix matrices[kMatrices];
  int32_t first_tile[kMatrices];
  int32_t count;
};
static_assert(sizeof(Table) + 2 * sizeof(void*) <= 32764);

struct Stage {
  float factor[kDepth][kBlock];
  float error[kDepth][kRows];
};

struct Shared {
  union {
    Stage stages[2];
    float sums[kBlock][kPadded];
  };
  float weight[kBlock][kPadded];
  float step_sums[kStep][kPadded];
  alignas(16) float step_errors[kStep][kRows];
  float panel[kStep][kBlock];  // factor rows of the step's columns
  float gain[kBlock];          // 1 / factor[j][j]
  int32_t order[kBlock];
};

__device__ inline void copy_async_4(float* to, const float* from, bool live) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(live ? 4 : 0) : "memory");
}
__device__ inline void copy_async_16(float* to, const float* from, bool live) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(live ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Requests the factor rows and errors of the finished columns [k0, k0 + kDepth) for the block at b0.
__device__ inline void request(Stage& stage, const float* factor, const float* errors, int cols, int b0, int k0) {
  const int t = threadIdx.x;
  const bool in_matrix = b0 + t < cols;
#pragma unroll 8
  for (int k = 0; k < kDepth; ++k) {
    const bool live = in_matrix && k0 + k < cols;
    copy_async_4(&stage.factor[k][t], live ? factor + int64_t{k0 + k} * cols + b0 + t : factor, live);
  }
#pragma unroll
  for (int i = 0; i < kDepth * kRows / 4 / kBlock; ++i) {
    const int at = (i * kBlock + t) * 4;
    const bool live = k0 + at / kRows < cols;
    copy_async_16(&stage.error[0][0] + at, live ? errors + int64_t{k0} * kRows + at : errors, live);
  }
  commit_copies();
}

// sums[j][r] = sum over the finished columns k of error[k][r] * factor[k][b0 + j]. Each thread keeps 8 rows x 4
// columns.
__device__ inline void multiply_finished(Shared& shared, const float* factor, const float* errors, int cols, int b0,
                                         int b1) {
  const int row = threadIdx.x % 4 * 8, column = threadIdx.x / 4 * 4;
  float acc[4][8] = {};
  if (b1 < cols) request(shared.stages[0], factor, errors, cols, b0, b1);
  for (int k0 = b1, stage = 0; k0 < cols; k0 += kDepth, stage ^= 1) {
    if (k0 + kDepth < cols) {
      request(shared.stages[stage ^ 1], factor, errors, cols, b0, k0 + kDepth);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const Stage& now = shared.stages[stage];
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const float4 low = *reinterpret_cast<const float4*>(&now.error[k][row]);
      const float4 high = *reinterpret_cast<const float4*>(&now.error[k][row + 4]);
      const float4 weight = *reinterpret_cast<const float4*>(&now.factor[k][column]);
      const float error[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const float factors[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 8; ++r) acc[j][r] = fmaf(error[r], factors[j], acc[j][r]);
    }
    __syncthreads();  // the next request overwrites this stage
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int r = 0; r < 8; ++r) shared.sums[column + j][row + r] = acc[j][r];
}

// One warp, a row a lane: the columns [first, first + kStep) of the block, last first.
template <bool kResidual>
__device__ inline void quantise_step(Shared& shared, const GptqMatrix& m, float* errors, float scale, int row, int b0,
                                     int first, int width, bool feedback) {
  const int lane = threadIdx.x;
  const auto limit = static_cast<float>(m.max_code);
  float sums[kStep];
#pragma unroll
  for (int i = 0; i < kStep; ++i) sums[i] = shared.step_sums[i][lane];
#pragma unroll
  for (int i = kStep - 1; i >= 0; --i) {
    const int j = first + i;
    if (j >= width) {
      shared.step_errors[i][lane] = 0.0f;
      continue;
    }
    const float gain = feedback ? shared.gain[j] : 0.0f;
    const float weight = shared.weight[j][lane];
    const float corrected = feedback ? weight + sums[i] * (kResidual ? 1.0f : gain) : weight;
    const float code = rintf(fminf(fmaxf(corrected / scale, -limit), limit));
    const float error = kResidual ? (code * scale - corrected) * gain : weight - code * scale;
    shared.step_errors[i][lane] = error;
    errors[int64_t{b0 + j} * kRows + lane] = error;
    const int column = shared.order[j];
    if (row < m.rows) m.codes[int64_t{row} * m.cols + (column >= 0 ? column : ~column)] = static_cast<int8_t>(code);
    if (feedback) {
#pragma unroll
      for (int before = 0; before < i; ++before)
        sums[before] = fmaf(error, shared.panel[i][first + before], sums[before]);
    }
  }
}

template <bool kResidual>
__global__ void __launch_bounds__(kBlock) columns_kernel(const __grid_constant__ Table table, float* scratch) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int t = threadIdx.x;

  int low = 0, high = table.count - 1;  // the last matrix whose first tile is not after this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_tile[middle] <= static_cast<int>(blockIdx.x))
      low = middle;
    else
      high = middle - 1;
  }
  const GptqMatrix& m = table.matrices[low];
  const int row0 = (blockIdx.x - table.first_tile[low]) * kRows;
  const int cols = m.cols;
  const auto* factor = static_cast<const float*>(m.factor);
  const auto* weights = static_cast<const float*>(m.weight);
  float* errors = scratch + m.scratch + int64_t{row0} * cols;
  const bool feedback = *m.status == 0;
  const int row = row0 + t % kRows;
  const float scale = row < m.rows ? static_cast<const float*>(m.scales)[row] : 1.0f;

  for (int b0 = (cols - 1) / kBlock * kBlock; b0 >= 0; b0 -= kBlock) {
    const int width = min(kBlock, cols - b0);
    const bool live = t < width;
    const int order = live ? m.order[b0 + t] : 0;
    shared.order[t] = order;
    shared.gain[t] = live && feedback ? 1.0f / factor[int64_t{b0 + t} * (cols + 1)] : 0.0f;
#pragma unroll 8
    for (int r = 0; r < kRows; ++r)
      shared.weight[t][r] = live && order >= 0 && row0 + r < m.rows ? weights[int64_t{row0 + r} * cols + order] : 0.0f;
    float sums[kRows] = {};  // of the block's column t
    if (feedback) {
      multiply_finished(shared, factor, errors, cols, b0, b0 + width);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = shared.sums[t][r];
    }
    for (int first = (width - 1) / kStep * kStep; first >= 0; first -= kStep) {
      if (t >= first && t < first + kStep) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) shared.step_sums[t - first][r] = sums[r];
      }
#pragma unroll 4
      for (int i = 0; i < kStep; ++i)
        shared.panel[i][t] = first + i < width && live ? factor[int64_t{b0 + first + i} * cols + b0 + t] : 0.0f;
      __syncthreads();
      if (t < kRows) quantise_step<kResidual>(shared, m, errors, scale, row, b0, first, width, feedback);
      __syncthreads();
      if (feedback && t < first) {
#pragma unroll 4
        for (int i = 0; i < kStep; ++i) {
          const float coefficient = shared.panel[i][t];
#pragma unroll
          for (int r = 0; r < kRows; r += 4) {
            const float4 error = *reinterpret_cast<const float4*>(&shared.step_errors[i][r]);
            sums[r] = fmaf(error.x, coefficient, sums[r]);
            sums[r + 1] = fmaf(error.y, coefficient, sums[r + 1]);
            sums[r + 2] = fmaf(error.z, coefficient, sums[r + 2]);
            sums[r + 3] = fmaf(error.w, coefficient, sums[r + 3]);
          }
        }
      }
      __syncthreads();  // the next step overwrites panel and errors
    }
  }
}

}  // namespace

int64_t gptq_scratch(int32_t rows, int32_t cols) { return (int64_t{rows} + kRows - 1) / kRows * kRows * cols; }

void gptq_columns_cuda(const GptqMatrix* matrices, int64_t count, bool residual, float* scratch, int device,
                       void* stream) {
  const DeviceGuard guard(device);
  const auto kernel = residual ? columns_kernel<true> : columns_kernel<false>;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)), "gptq_columns");
  std::vector<GptqMatrix> jobs(matrices, matrices + count);
  int64_t offset = 0;
  for (GptqMatrix& job : jobs) {
    job.scratch = offset;
    offset += gptq_scratch(job.rows, job.cols);
  }
  // The longest columns first: CTAs start in this order.
  std::stable_sort(jobs.begin(), jobs.end(), [](const GptqMatrix& a, const GptqMatrix& b) { return a.cols > b.cols; });
  for (int64_t first = 0; first < count; first += kMatrices) {
    Table table;
    table.count = static_cast<int32_t>(std::min<int64_t>(kMatrices, count - first));
    int32_t tiles = 0;
    for (int32_t i = 0; i < table.count; ++i) {
      table.matrices[i] = jobs[first + i];
      table.first_tile[i] = tiles;
      tiles += (table.matrices[i].rows + kRows - 1) / kRows;
    }
    kernel<<<tiles, kBlock, sizeof(Shared), static_cast<cudaStream_t>(stream)>>>(table, scratch);
    cuda_check(cudaGetLastError(), "gptq_columns");
  }
}

}  // namespace pgolf
#endif
