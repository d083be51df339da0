// The head's product of a training pass, for Hopper.
//
// Two blocks form a cluster and walk over tiles of 256 rows and 128 columns, columns fastest. A block has two groups of
// four warps, and each group keeps its 64 rows of x, all of the depth, in registers for as long as the rows last. Only
// w moves: each block loads half of a stage, 64 of 128 columns, into the shared memory of both. The second group of a
// block multiplies a tile on the same stages behind the first; while one multiplies, the other is in its epilogue.
//
// G goes out through shared memory, a group's 64 x 128 in two swizzled panels, and by the copy engine, which leaves out
// rows past the end.
#include "linear_softcap_ce/linear_softcap_ce.h"

#if defined(PGOLF_CUDA) && defined(PGOLF_SM90A)
#include <cuda_bf16.h>

#include "common/hopper.cuh"

namespace pgolf {
namespace {

constexpr int kDepth = 512;
constexpr int kStep = 64;  // of the depth in a stage: 128 bytes, the widest swizzle
constexpr int kColumns = 128;
constexpr int kRows = 64;  // a group's
constexpr int kStages = 12;
constexpr int kHalfStage = kColumns / 2 * kStep * 2;  // what each block loads
constexpr int kPanel = kRows * kStep * 2;
constexpr int kThreads = 384;
constexpr int kBlocks = 2;  // in a cluster

struct Shared {
  uint8_t w[kStages][2 * kHalfStage];
  uint8_t g[2][2][kPanel];  // groups, halves of the columns
  uint64_t full[kStages], empty[kStages];
};
constexpr int kAlignment = 1024;  // of swizzled operands
constexpr int kSharedBytes = sizeof(Shared) + kAlignment;
static_assert(kSharedBytes <= 232448);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ int rank_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ void barrier_arrive(uint64_t* barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(address(barrier)),
      "r"(block)
      : "memory");
}

// To the same place in both blocks; each one's barrier counts the bytes.
__device__ void copy_to_both(void* to, const CUtensorMap* map, uint64_t* barrier, int depth, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(address(to)),
      "l"(map), "r"(address(barrier)), "r"(depth), "r"(row), "h"(static_cast<uint16_t>(3))
      : "memory");
}

__device__ void copy_out(const CUtensorMap* map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(address(from)), "r"(column), "r"(row)
               : "memory");
}

__device__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 3) : "memory"); }

// sum += a b^T of 64 x 16 and 128 x 16, a in registers; the first step overwrites.
__device__ void multiply(float (&d)[64], const uint32_t* a, uint64_t b, bool first) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " PGOLF_SUMS_TEXT
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"
      : PGOLF_SUMS_64(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(first)));
}

// Four 8 x 8 matrices, a quarter of the lanes giving each one's rows.
__device__ void store_matrices(void* to, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(to)), "r"(m[0]),
               "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

// exp(z) and exp(z) slope of a logit, the tangent 5e-4 off at most.
__device__ float2 power_and_value(float a, float inverse_softcap, float height) {
  float t, power;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(a * inverse_softcap));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(height * t));
  return {power, fmaf(-(power * t), t, power)};
}

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

#endif

__global__ void __launch_bounds__(kThreads, 1)
    powers_kernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap g_map,
                  const uint32_t* __restrict__ x_pairs, float* __restrict__ sums, int rows, int tiles,
                  float inverse_softcap, float height) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  Shared& shared =
      *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + kAlignment - 1) & ~uintptr_t{kAlignment - 1});
  const int rank = rank_in_cluster();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], 2 * kBlocks);  // by the groups of both blocks
    }
    barriers_initialised();
  }
  cluster_sync();

  constexpr int kSteps = kDepth / kStep, kClusterRows = 2 * kBlocks * kRows;
  const int64_t units = static_cast<int64_t>((rows + kClusterRows - 1) / kClusterRows) * tiles;
  const int clusters = static_cast<int>(gridDim.x) / kBlocks, cluster = static_cast<int>(blockIdx.x) / kBlocks;
  const int begin = static_cast<int>(cluster * units / clusters);
  const int end = static_cast<int>((cluster + 1) * units / clusters);
  const int group = static_cast<int>(threadIdx.x) / 128;

  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 256) {
      int stage = 0, phase = 1;
      for (int unit = begin; unit < end; ++unit) {
        const int column = unit % tiles * kColumns + rank * (kColumns / 2);
        for (int step = 0; step < kSteps; ++step) {
          barrier_wait(&shared.empty[stage], phase);
          barrier_expect(&shared.full[stage], 2 * kHalfStage);
          copy_to_both(shared.w[stage] + rank * kHalfStage, &w_map, &shared.full[stage], step * kStep, column);
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, warp = thread / 32;
    const int own = 16 * warp + lane / 4;      // row of this thread's sums, and the one 8 below it
    const int stored = 16 * warp + lane % 16;  // row that this lane gives to store_matrices
    uint8_t* const panels = shared.g[group][0] + stored * 128;
    uint32_t x[kDepth / 4];
    float d[64];
    int stage = 0, phase = 0, block = -1, row = 0;
    if (group == 1 && begin < end) give_turn(0);
    for (int unit = begin; unit < end; ++unit) {
      if (unit / tiles != block) {
        block = unit / tiles;
        row = (block * kBlocks + rank) * 2 * kRows + group * kRows;
        // Rows past the end read the first row: nothing of them is written.
        const uint32_t* const upper = x_pairs + int64_t{row + own < rows ? row + own : 0} * (kDepth / 2) + lane % 4;
        const uint32_t* const lower =
            x_pairs + int64_t{row + own + 8 < rows ? row + own + 8 : 0} * (kDepth / 2) + lane % 4;
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          x[4 * k] = __ldg(upper + 8 * k);
          x[4 * k + 1] = __ldg(lower + 8 * k);
          x[4 * k + 2] = __ldg(upper + 8 * k + 4);
          x[4 * k + 3] = __ldg(lower + 8 * k + 4);
        }
      }
      await_turn(group);
      int previous = 0;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        barrier_wait(&shared.full[stage], phase);
        const uint64_t b = operand(shared.w[stage]);
        begin_products();
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k)  // 32 bytes each
          multiply(d, x + (step * (kStep / 16) + k) * 4, b + 2 * k, step + k == 0);
        commit_products();
        if (step > 0) {
          wait_for_products<1>();
          if (thread < kBlocks) barrier_arrive(&shared.empty[previous], thread);
        }
        previous = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      // The other's products queue behind the last of these. Nobody waits for the turn after the very last tile.
      if (group == 0 || unit + 1 < end) give_turn(1 - group);
      wait_for_products<0>();
      settle(d);
      if (thread < kBlocks) barrier_arrive(&shared.empty[previous], thread);

      if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      group_sync(group);  // the panels are free
      float upper_sum = 0.0f, lower_sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // 16 columns each
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 left = power_and_value(d[8 * i + 2 * j], inverse_softcap, height);
          const float2 right = power_and_value(d[8 * i + 2 * j + 1], inverse_softcap, height);
          (j % 2 ? lower_sum : upper_sum) += left.x + right.x;
          packed[j] = pack(left.y, right.y);
        }
        store_matrices(panels + i / 4 * kPanel + ((i % 4 * 2 + lane / 16) ^ stored % 8) * 16, packed);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      group_sync(group);
      const int tile = unit % tiles;
      if (thread == 0 && row < rows) {
        copy_out(&g_map, shared.g[group][0], tile * kColumns, row);
        copy_out(&g_map, shared.g[group][1], tile * kColumns + kColumns / 2, row);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
#pragma unroll
      for (int across = 1; across < 4; across *= 2) {
        upper_sum += __shfl_xor_sync(~0u, upper_sum, across);
        lower_sum += __shfl_xor_sync(~0u, lower_sum, across);
      }
      const int sum_row = row + own + lane % 4 * 8;
      if (lane % 4 < 2 && sum_row < rows) sums[int64_t{sum_row} * tiles + tile] = lane % 4 ? lower_sum : upper_sum;
    }
    if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  cluster_sync();  // a block's shared memory takes the other's copies and arrivals to the end
#endif
}

}  // namespace

void linear_softcap_ce_powers_cuda(const HeadPowers& head, int device, void* stream) {
  const DeviceGuard guard(device);
  const cuuint64_t rows = head.rows, columns = head.columns;
  const CUtensorMap w_map = tensor_map<2>(head.w, {kDepth, columns}, {kDepth * 2}, {kStep, kColumns / 2});
  const CUtensorMap g_map = tensor_map<2>(head.g, {columns, rows}, {columns * 2}, {kStep, kRows});
  int multiprocessors = 0;
  cuda_check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  cuda_check(cudaFuncSetAttribute(powers_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kBlocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(multiprocessors / kBlocks * kBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  cuda_check(cudaLaunchKernelEx(&config, powers_kernel, w_map, g_map, static_cast<const uint32_t*>(head.x), head.sums,
                                static_cast<int>(head.rows), static_cast<int>(head.columns) / kColumns,
                                head.inverse_softcap, head.height),
             "linear_softcap_ce_powers");
}

}  // namespace pgolf
#endif
