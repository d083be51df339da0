// The mean of the losses of counted rows and the weight that each of them has in it, in one launch and one fixed order.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_launch.h"

namespace pgolf {
namespace softcap_ce {
namespace mean {

constexpr int kThreads = 1024;
constexpr int kCluster = 8;  // blocks, on Hopper and later; one block elsewhere

struct Sum {
  float losses;
  unsigned rows;
};

__device__ inline Sum join(Sum a, Sum b) { return {a.losses + b.losses, a.rows + b.rows}; }

__device__ inline Sum warp_sum(Sum own) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1)
    own = join(own, {__shfl_xor_sync(~0u, own.losses, offset), __shfl_xor_sync(~0u, own.rows, offset)});
  return own;
}

// mean = sum / rows counted, weight = 1 / rows counted. All blocks are one cluster.
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const float* __restrict__ losses, const int64_t* __restrict__ targets, int64_t rows,
                int64_t ignore_index, float* __restrict__ mean, float* __restrict__ weight) {
  constexpr int kUnroll = 4;  // rows on their way at a time
  __shared__ Sum of_warp[kThreads / 32];
  __shared__ Sum of_block[kCluster];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  Sum own = {0.0f, 0};
#if __CUDA_ARCH__ >= 900
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  cluster.sync();  // every block has started: only then may others write into its shared memory
#endif
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; first < rows;
       first += kUnroll * step) {
    float loss[kUnroll];
    int64_t target[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = first + u * step;
      loss[u] = row < rows ? losses[row] : 0.0f;
      target[u] = row < rows ? targets[row] : ignore_index;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) own = join(own, {loss[u], target[u] != ignore_index ? 1u : 0u});
  }
  own = warp_sum(own);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x < 32) own = warp_sum(of_warp[threadIdx.x]);
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) *cluster.map_shared_rank(of_block + blockIdx.x, 0) = own;
  cluster.sync();
#else
  if (threadIdx.x == 0) of_block[0] = own;
#endif
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    Sum total = of_block[0];
    for (unsigned b = 1; b < gridDim.x; ++b) total = join(total, of_block[b]);
    const float counted = static_cast<float>(total.rows);
    *mean = total.losses / counted;
    *weight = 1.0f / counted;
  }
}

inline void launch(const float* losses, const int64_t* targets, int64_t rows, int64_t ignore_index, float* mean,
                   float* weight, cudaStream_t stream) {
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, mean_kernel), "cudaFuncGetAttributes");
  const unsigned blocks = attributes.ptxVersion >= 90 ? kCluster : 1;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, mean_kernel, losses, targets, rows, ignore_index, mean, weight),
             "mean of the losses");
}

}  // namespace mean
}  // namespace softcap_ce
}  // namespace pgolf
