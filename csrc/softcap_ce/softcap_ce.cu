// Chooses a kernel and launches it.
#include <algorithm>
#include <atomic>

#include "common/cuda_launch.h"
#include "softcap_ce/generic.cuh"
#include "softcap_ce/mean.cuh"
#include "softcap_ce/ring.cuh"
#include "softcap_ce/table.cuh"

namespace pgolf {
namespace {

using namespace softcap_ce;

// Above it the plain sum of exponentials could leave float's range.
constexpr double kLargestFixedTop = 40.0;

struct Launch {
  SoftcapCE ce;
  Caps caps;
  SoftcapCELosses losses;
  SoftcapCEGradient gradient;
  const float* lse;
  unsigned* claimed;  // null in the forward pass
  cudaStream_t stream;
};

bool aligned(const void* base, int64_t row_stride, int64_t bytes, int64_t element) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && row_stride * element % bytes == 0;
}

template <Pass kPass>
bool vectors_fit(const Launch& l, int64_t element) {
  return aligned(l.ce.logits, l.ce.row_stride, 16, element) &&
         (kPass == Pass::forward || aligned(l.gradient.dlogits, l.gradient.row_stride, 16, element));
}

bool fixed_top(const SoftcapCE& ce) {
  return ce.softcap > 0.0 && ce.softcap / ce.temperature <= kLargestFixedTop && ce.dtype != DType::f16;
}

// Blocks that fill the device; asks for the shared memory, once per device and kernel. 0: the kernel was compiled for
// another processor than this one, and for less than `least_arch`.
template <class Kernel>
int resident_blocks(Kernel kernel, int threads, int shared_bytes, int least_arch, std::atomic<int>* known) {
  constexpr int kDevices = 64;
  int device = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<int>* slot = device < kDevices ? known + device : nullptr;
  if (slot != nullptr && slot->load() != 0) return std::max(0, slot->load());
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  int blocks = -1;
  if (attributes.ptxVersion >= least_arch) {
    int processors = 0;
    int per_processor = 0;
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               "shared memory");
    cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes),
               "occupancy");
    blocks = processors * std::max(1, per_processor);
  }
  if (slot != nullptr) slot->store(blocks);
  return std::max(0, blocks);
}

template <class S, class Kernel, class... Args>
void launch_rows(const Launch& l, Kernel kernel, std::atomic<int>* known, const Args&... args) {
  constexpr int kBlock = S::kThreads * S::kGroups;
  const int64_t needed = (l.ce.rows + S::kGroups - 1) / S::kGroups;
  const int64_t blocks = std::min<int64_t>(needed, resident_blocks(kernel, kBlock, S::kBytes, 0, known));
  kernel<<<static_cast<unsigned>(blocks), kBlock, S::kBytes, l.stream>>>(l.ce, l.caps, table::layout_of(l.ce.softcap),
                                                                         args...);
}

template <Pass kPass, class S>
void launch_shape(const Launch& l) {
  static std::atomic<int> known[64];
  if constexpr (kPass == Pass::backward) {
    launch_rows<S>(l, table::gradient_kernel<S>, known, l.gradient, l.lse);
  } else {
    launch_rows<S>(l, table::losses_kernel<S, kPass == Pass::with_grad>, known, l.losses, l.gradient);
  }
}

// False: the kernel is for Hopper and later.
template <Pass kPass, class S>
bool try_ring(const Launch& l) {
  static std::atomic<int> known[64];
  constexpr int kBlock = S::kThreads * S::kGroups;
  constexpr int kHopper = 90;
  const auto kernel = [] {
    if constexpr (kPass == Pass::backward) {
      return ring::gradient_kernel<S>;
    } else {
      return ring::losses_kernel<S>;
    }
  }();
  const int resident = resident_blocks(kernel, kBlock, S::kBytes, kHopper, known);
  if (resident == 0) return false;
  const int64_t needed = (l.ce.rows + S::kGroups - 1) / S::kGroups;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(needed, resident));
  cuda_check(cudaMemsetAsync(l.claimed, 0, sizeof(unsigned), l.stream), "cudaMemsetAsync");
  const table::Layout layout = table::layout_of(l.ce.softcap);
  if constexpr (kPass == Pass::backward) {
    kernel<<<blocks, kBlock, S::kBytes, l.stream>>>(l.ce, l.caps, layout, l.gradient, l.lse, l.claimed);
  } else {
    kernel<<<blocks, kBlock, S::kBytes, l.stream>>>(l.ce, l.caps, layout, l.losses, l.gradient, l.claimed);
  }
  return true;
}

template <Pass kPass, int kThreads, int kGroups, int kVectors, int kStages>
bool try_ring(const Launch& l) {
  if (l.ce.vocab == kThreads * kVectors * table::kVector)
    return try_ring<kPass, ring::Shape<kThreads, kGroups, kVectors, kStages, 2, true>>(l);
  return try_ring<kPass, ring::Shape<kThreads, kGroups, kVectors, kStages, 2, false>>(l);
}

template <Pass kPass, int kThreads, int kGroups, int kVectors, int kMinBlocks>
void launch_table(const Launch& l) {
  constexpr int kStages = kPass == Pass::forward ? 1 : 2;
  constexpr int kSpecial = kPass == Pass::forward ? 3 : 2;
  if (l.ce.vocab == kThreads * kVectors * table::kVector) {
    launch_shape<kPass, table::Shape<kThreads, kGroups, kVectors, kMinBlocks, kStages, kSpecial, true>>(l);
  } else {
    launch_shape<kPass, table::Shape<kThreads, kGroups, kVectors, kMinBlocks, kStages, kSpecial, false>>(l);
  }
}

// False: the table kernels do not take this problem.
template <Pass kPass>
bool try_table(const Launch& l) {
  const bool fits = l.ce.dtype == DType::bf16 && fixed_top(l.ce) && l.ce.vocab % table::kVector == 0;
  if (!fits || !vectors_fit<kPass>(l, 2)) return false;
  if (l.ce.vocab <= 1024) return launch_table<kPass, 128, 4, 1, 2>(l), true;
  if (l.ce.vocab <= 4096) return launch_table<kPass, 256, 2, 2, 2>(l), true;
  if (l.ce.vocab <= 8192) {
    // Resident threads a multiprocessor, measured at 98,304 x 8192: the one pass holds a row's exponentials.
    if constexpr (kPass == Pass::forward) return launch_table<kPass, 256, 2, 4, 2>(l), true;
    if constexpr (kPass != Pass::forward)
      if (try_ring<kPass, 256, 4, 4, 3>(l)) return true;
    if constexpr (kPass == Pass::backward) return launch_table<kPass, 256, 4, 4, 1>(l), true;
    return launch_table<kPass, 256, 1, 4, 3>(l), true;
  }
  if (l.ce.vocab <= 16384) return launch_table<kPass, 512, 1, 4, 1>(l), true;
  return false;
}

template <Pass kPass, class T, int kWidth>
void launch_generic(const Launch& l) {
  auto kernel =
      fixed_top(l.ce) ? generic::row_kernel<T, kWidth, kPass, false> : generic::row_kernel<T, kWidth, kPass, true>;
  kernel<<<static_cast<unsigned>(l.ce.rows), generic::kThreads, 0, l.stream>>>(l.ce, l.caps, l.losses, l.gradient,
                                                                               l.lse);
}

template <Pass kPass, class T>
void launch_generic(const Launch& l) {
  if (vectors_fit<kPass>(l, sizeof(T))) return launch_generic<kPass, T, 16 / sizeof(T)>(l);
  launch_generic<kPass, T, 1>(l);
}

template <Pass kPass>
void launch(const SoftcapCE& ce, const SoftcapCELosses& losses, const void* lse, const SoftcapCEGradient& gradient,
            void* claimed, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const Launch l = {ce,
                    caps_of(ce),
                    losses,
                    gradient,
                    static_cast<const float*>(lse),
                    static_cast<unsigned*>(claimed),
                    reinterpret_cast<cudaStream_t>(stream)};
  if (!try_table<kPass>(l)) {
    if (ce.dtype == DType::f32) launch_generic<kPass, float>(l);
    if (ce.dtype == DType::bf16) launch_generic<kPass, __nv_bfloat16>(l);
    if (ce.dtype == DType::f16) launch_generic<kPass, __half>(l);
  }
  cuda_check(cudaGetLastError(), "softcap cross-entropy");
}

}  // namespace

void softcap_ce_forward_cuda(const SoftcapCE& ce, const SoftcapCELosses& out, int device, uintptr_t stream) {
  launch<Pass::forward>(ce, out, nullptr, {}, nullptr, device, stream);
}

void softcap_ce_backward_cuda(const SoftcapCE& ce, const void* lse, const SoftcapCEGradient& out, void* claimed,
                              int device, uintptr_t stream) {
  launch<Pass::backward>(ce, {}, lse, out, claimed, device, stream);
}

void softcap_ce_with_grad_cuda(const SoftcapCE& ce, const SoftcapCELosses& out, const SoftcapCEGradient& gradient,
                               void* claimed, int device, uintptr_t stream) {
  launch<Pass::with_grad>(ce, out, nullptr, gradient, claimed, device, stream);
}

void softcap_ce_mean_cuda(const void* losses, const int64_t* targets, int64_t rows, int64_t ignore_index, void* mean,
                          void* weight, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  softcap_ce::mean::launch(static_cast<const float*>(losses), targets, rows, ignore_index, static_cast<float*>(mean),
                           static_cast<float*>(weight), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace pgolf
