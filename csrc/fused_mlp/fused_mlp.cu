// The fused MLP's two matrix products with an activation, for Hopper.
//
// A block owns 128 columns and walks down the rows in tiles of 128. Its part of the weight, all of the depth, stays in
// shared memory; only the input is streamed, by one thread that keeps six [128, 64] pieces in flight. Two groups of
// four warps take the tiles in turn: one multiplies while the other finishes and writes its tile, so that the tensor
// cores always have work queued. The gradient's group reads its tile of hidden values into registers before it
// multiplies.
//
// Results go from registers to memory: rows of the weight within 32 are interleaved as they enter shared memory, so
// that a thread's accumulators are 8 neighbouring columns of a row, 16 bytes of bfloat16. Accumulator column
// 8 b + 2 q + e, which quad lane q holds, is column 8 q + 2 b + e of the 32.
#include "fused_mlp/fused_mlp.h"

#if defined(PGOLF_CUDA) && defined(PGOLF_SM90A)
#include <algorithm>

#include "common/hopper.cuh"

namespace pgolf {
namespace {

constexpr int kTile = 128;  // rows and columns
constexpr int kDepth = 64;  // of a piece: 128 bytes, the widest swizzle
constexpr int kPiece = kTile * kDepth * 2;
constexpr int kMaxPieces = 8;
constexpr int kStages = 6;
constexpr int kThreads = 384;

enum class Kind { up, grad_pre };

struct Shared {
  uint8_t weight[kMaxPieces][kPiece];
  uint8_t input[kStages][kPiece];
  uint64_t weight_full, full[kStages], empty[kStages];
};
constexpr int kAlignment = 1024;  // of swizzled operands
constexpr int kSharedBytes = sizeof(Shared) + kAlignment;
static_assert(kSharedBytes <= 232448);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ void copy_input(void* to, const CUtensorMap* map, uint64_t* barrier, int depth, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          address(to)),
      "l"(map), "r"(address(barrier)), "r"(depth), "r"(row)
      : "memory");
}

__device__ void copy_weight(void* to, const CUtensorMap* map, uint64_t* barrier, int depth, int row) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %5, %5, %5, %4}], "
      "[%2];" ::"r"(address(to)),
      "l"(map), "r"(address(barrier)), "r"(depth), "r"(row / 32), "r"(0)
      : "memory");
}

// sum += a b^T of 64 x 16 and 128 x 16; the first step overwrites.
__device__ void multiply(float (&d)[64], uint64_t a, uint64_t b, bool first) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " PGOLF_SUMS_TEXT "%64, %65, p, 1, 1, 0, 0;\n}\n"
      : PGOLF_SUMS_64(d)
      : "l"(a), "l"(b), "r"(static_cast<int>(first)));
}

// Volatile, so that it stays in front of the products, which are. With L1::no_allocate the kernel takes 7 % longer.
__device__ uint4 load_early(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// In the upper half, the bf16 number closest to leaky_relu(u)^2 among those whose last bit is u's sign.
__device__ uint32_t signed_square(float u, float slope) {
  const float leaky = u > 0 ? u : slope * u;
  const uint32_t carry = u > 0 ? 0x10000u : 0u, sign = 0x10000u - carry;
  return ((__float_as_uint(leaky * leaky) + carry) & 0xFFFE0000u) | sign;
}

__device__ uint32_t signed_squares(float low, float high, float slope) {
  return __byte_perm(signed_square(low, slope), signed_square(high, slope), 0x7632);
}

__device__ float root(uint32_t bits) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(__uint_as_float(bits)));
  return result;
}

__device__ uint32_t times_derivative(float low, float high, uint32_t hidden, float slope) {
  low *= root(hidden << 16) * (hidden & 1u ? -2 * slope : 2.0f);
  high *= root(hidden & 0xFFFF0000u) * (hidden & 0x10000u ? -2 * slope : 2.0f);
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#endif

template <Kind kind>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap input_map, const __grid_constant__ CUtensorMap weight_map,
                   const uint16_t* __restrict__ hidden, uint16_t* __restrict__ out, int rows, int columns, int pieces,
                   float slope) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  Shared& shared =
      *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + kAlignment - 1) & ~uintptr_t{kAlignment - 1});
  const int column_tiles = columns / kTile;
  const int column = static_cast<int>(blockIdx.x) % column_tiles * kTile;
  const int first = static_cast<int>(blockIdx.x) / column_tiles, step = static_cast<int>(gridDim.x) / column_tiles;
  const int tiles = (rows + kTile - 1) / kTile;

  if (threadIdx.x == 0) {
    barrier_init(&shared.weight_full, 1);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], 4);  // one arrival a warp
    }
    barriers_initialised();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x != 0) return;
    barrier_expect(&shared.weight_full, pieces * kPiece);
    for (int k = 0; k < pieces; ++k)
      copy_weight(shared.weight[k], &weight_map, &shared.weight_full, k * kDepth, column);
    int stage = 0, phase = 1;
    for (int tile = first; tile < tiles; tile += step) {
      for (int k = 0; k < pieces; ++k) {
        barrier_wait(&shared.empty[stage], phase);
        barrier_expect(&shared.full[stage], kPiece);
        copy_input(shared.input[stage], &input_map, &shared.full[stage], k * kDepth, tile * kTile);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int group = static_cast<int>(threadIdx.x) / 128 - 1, other = 1 - group;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = 16 * warp + lane / 4;  // and 8, 64 and 72 below it
    if (group == 1) give_turn(0);
    barrier_wait(&shared.weight_full, 0);
    int position = group * pieces;  // in the queue of pieces that both groups share
    for (int tile = first + group * step; tile < tiles; tile += 2 * step) {
      const int64_t place = static_cast<int64_t>(tile * kTile + row) * columns + column + lane % 4 * 8;
      const int rows_left = rows - tile * kTile - row;
      uint4 saved[kind == Kind::grad_pre ? 16 : 1];
      if constexpr (kind == Kind::grad_pre) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int below = i / 8 * 64 + i / 4 % 2 * 8;
          saved[i] = make_uint4(0, 0, 0, 0);
          if (below < rows_left)
            saved[i] = load_early(hidden + place + static_cast<int64_t>(below) * columns + i % 4 * 32);
        }
      }
      float upper[64], lower[64];  // rows 0 to 63 and 64 to 127 of the tile
      await_turn(group);
      int stage = position % kStages, phase = position / kStages % 2, previous = 0;
      position += 2 * pieces;
      for (int k = 0; k < pieces; ++k) {
        barrier_wait(&shared.full[stage], phase);
        const uint64_t a = operand(shared.input[stage]), b = operand(shared.weight[k]);
        begin_products();
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i) {  // 32 bytes each
          multiply(upper, a + 2 * i, b + 2 * i, k + i == 0);
          multiply(lower, a + 2 * i + kPiece / 2 / 16, b + 2 * i, k + i == 0);
        }
        commit_products();
        if (k > 0) {
          wait_for_products<1>();
          if (lane == 0) barrier_arrive(&shared.empty[previous]);
        }
        previous = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      give_turn(other);  // its products queue behind the last of these
      wait_for_products<0>();
      if (lane == 0) barrier_arrive(&shared.empty[previous]);
      settle(upper);
      settle(lower);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int below = i / 8 * 64 + i / 4 % 2 * 8;
        const float* d = (i < 8 ? upper : lower) + i % 4 * 16 + i / 4 % 2 * 2;
        uint4 packed;
        if constexpr (kind == Kind::grad_pre) {
          packed = {times_derivative(d[0], d[1], saved[i].x, slope), times_derivative(d[4], d[5], saved[i].y, slope),
                    times_derivative(d[8], d[9], saved[i].z, slope), times_derivative(d[12], d[13], saved[i].w, slope)};
        } else {
          packed = {signed_squares(d[0], d[1], slope), signed_squares(d[4], d[5], slope),
                    signed_squares(d[8], d[9], slope), signed_squares(d[12], d[13], slope)};
        }
        if (below < rows_left)
          *reinterpret_cast<uint4*>(out + place + static_cast<int64_t>(below) * columns + i % 4 * 32) = packed;
      }
    }
  }
#endif
}

template <Kind kind>
void launch(const MlpProduct& p, int device, void* stream) {
  const DeviceGuard guard(device);
  const cuuint64_t depth = p.depth, row = depth * 2;
  const CUtensorMap input_map =
      tensor_map<2>(p.input, {depth, static_cast<cuuint64_t>(p.rows)}, {row}, {kDepth, kTile});
  // Rows 8 q + 2 b + e of each 32, with e, q and b from the inside out.
  const CUtensorMap weight_map = tensor_map<5>(p.weight, {depth, 2, 4, 4, static_cast<cuuint64_t>(p.columns) / 32},
                                               {row, 8 * row, 2 * row, 32 * row}, {kDepth, 2, 4, 4, kTile / 32});
  int multiprocessors = 0;
  cuda_check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  cuda_check(cudaFuncSetAttribute(product_kernel<kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "cudaFuncSetAttribute");
  const int column_tiles = p.columns / kTile, row_tiles = (p.rows + kTile - 1) / kTile;
  const int blocks = std::max(1, std::min(multiprocessors / column_tiles, row_tiles));  // of each range of columns
  product_kernel<kind><<<blocks * column_tiles, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      input_map, weight_map, static_cast<const uint16_t*>(p.hidden), static_cast<uint16_t*>(p.out), p.rows, p.columns,
      (p.depth + kDepth - 1) / kDepth, p.slope);
  cuda_check(cudaGetLastError(), "fused_mlp");
}

}  // namespace

void fused_mlp_up_cuda(const MlpProduct& product, int device, void* stream) {
  launch<Kind::up>(product, device, stream);
}

void fused_mlp_grad_pre_cuda(const MlpProduct& product, int device, void* stream) {
  launch<Kind::grad_pre>(product, device, stream);
}

}  // namespace pgolf
#endif
