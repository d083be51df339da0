#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda_launch.h"

// What kernels need that are written in Hopper's own instructions: barriers that count copied bytes, the warpgroup's
// matrix product, tensor maps. Other architectures compile such a kernel empty, and it is never launched there.
namespace pgolf {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory");
}

__device__ inline void barriers_initialised() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

__device__ inline void barrier_wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(address(barrier)),
      "r"(phase)
      : "memory");
}

// Descriptor of an operand in rows of 128 swizzled bytes: groups of 8 rows are 1024 bytes apart.
__device__ inline uint64_t operand(const void* p) {
  return static_cast<uint64_t>((address(p) & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading sums before the wait above it.
template <int kCount>
__device__ inline void settle(float (&d)[kCount]) {
#pragma unroll
  for (float& value : d) asm volatile("" : "+f"(value)::"memory");
}

// Named barriers 1 and 2: the one of two groups of four warps whose turn it is to multiply.
__device__ inline void await_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory"); }
__device__ inline void give_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(group + 1) : "memory"); }

// The 64 sums of a thread in a product of 64 x 128, as operands of an instruction.
#define PGOLF_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PGOLF_SUMS_16(d, i) PGOLF_SUMS_4(d, i), PGOLF_SUMS_4(d, i + 4), PGOLF_SUMS_4(d, i + 8), PGOLF_SUMS_4(d, i + 12)
#define PGOLF_SUMS_64(d) PGOLF_SUMS_16(d, 0), PGOLF_SUMS_16(d, 16), PGOLF_SUMS_16(d, 32), PGOLF_SUMS_16(d, 48)
#define PGOLF_SUMS_TEXT                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "

#endif

// The map of a bfloat16 tensor, sizes and strides (bytes, from the second dimension on) from the inside out, for boxes
// 128 bytes wide that arrive swizzled.
template <int kRank>
CUtensorMap tensor_map(const void* base, const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                       const cuuint32_t (&box)[kRank]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
    if (!found) throw std::runtime_error("cuTensorMapEncodeTiled: the driver has none");
    return reinterpret_cast<Encode>(found);
  }();
  cuuint32_t steps[kRank];
  std::fill_n(steps, kRank, 1);
  CUtensorMap map;
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(base), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  return map;
}

}  // namespace pgolf
