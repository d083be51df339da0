// Softcap cross-entropy for every dtype, softcap, vocabulary and alignment: one block a row, the row read again for the
// gradient (from cache). table.cuh is the faster form of the common case.
#pragma once
#include <cfloat>

#include "softcap_ce/device.cuh"

namespace pgolf {
namespace softcap_ce {
namespace generic {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

// Running sum of exp(z - top). With a fixed top of 0 where no z exceeds 40.
struct Sum {
  float top;
  float sum;
};

template <bool kOnline>
__device__ Sum join(Sum a, Sum b) {
  if (!kOnline) return {0.0f, a.sum + b.sum};
  const float top = fmaxf(a.top, b.top);
  return {top, a.sum * exp2f((a.top - top) * kLog2e) + b.sum * exp2f((b.top - top) * kLog2e)};
}

// The row's sum, in every thread.
template <bool kOnline>
__device__ Sum block_sum(Sum own) {
  __shared__ Sum partial[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1)
    own = join<kOnline>(own, {__shfl_xor_sync(~0u, own.top, offset), __shfl_xor_sync(~0u, own.sum, offset)});
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = own;
  __syncthreads();
  Sum total = partial[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total = join<kOnline>(total, partial[w]);
  return total;
}

// kWidth logits in one access; the row's last columns, fewer than a vector, one by one.
template <class T, int kWidth, Pass kPass, bool kOnline>
__global__ void __launch_bounds__(kThreads)
    row_kernel(const SoftcapCE ce, const Caps caps, const SoftcapCELosses losses, const SoftcapCEGradient gradient,
               const float* __restrict__ lse_in) {
  using Vec = Vector<T, kWidth>;
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(ce.logits) + row * ce.row_stride;
  const int64_t vectors = ce.vocab / kWidth;
  const int64_t tail = vectors * kWidth;
  const int target = column_of(ce, ce.targets[row]);

  float lse;
  if (kPass == Pass::backward) {
    lse = lse_in[row];
  } else {
    Picked picked;
    if (threadIdx.x == 0) picked = pick(ce, losses, caps, row, target, [&](int64_t j) { return to_float(logits[j]); });
    Sum own = {kOnline ? -FLT_MAX : 0.0f, 0.0f};
    auto add = [&](const float* z, int n) {
      if (kOnline) {
        float top = own.top;
        for (int k = 0; k < n; ++k) top = fmaxf(top, z[k]);
        own = {top, own.sum * exp2f((own.top - top) * kLog2e)};
      }
      for (int k = 0; k < n; ++k) own.sum += exp2f((z[k] - own.top) * kLog2e);
    };
    for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
      const Vec vector = reinterpret_cast<const Vec*>(logits)[v];
      float z[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) z[k] = cap(caps, to_float(vector.values[k])).z;
      add(z, kWidth);
    }
    if (tail + threadIdx.x < ce.vocab) {
      const float z = cap(caps, to_float(logits[tail + threadIdx.x])).z;
      add(&z, 1);
    }
    const Sum total = block_sum<kOnline>(own);  // also a barrier: below the logits may be overwritten
    lse = total.top + logf(total.sum);
    if (threadIdx.x == 0) write_losses(losses, row, target, picked, lse);
  }
  if (kPass == Pass::forward) return;

  const float upstream = upstream_of(gradient, target, row);
  T* dlogits = static_cast<T*>(gradient.dlogits) + row * gradient.row_stride;
  auto derivative = [&](float a, int64_t column) {
    const Capped capped = cap(caps, a);
    const float p = exp2f((capped.z - lse) * kLog2e);
    return from_float<T>(upstream * (capped.slope * (column == target ? p - 1.0f : p)));
  };
  for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    const Vec vector = reinterpret_cast<const Vec*>(logits)[v];
    Vec out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out.values[k] = derivative(to_float(vector.values[k]), v * kWidth + k);
    reinterpret_cast<Vec*>(dlogits)[v] = out;
  }
  const int64_t last = tail + threadIdx.x;
  if (last < ce.vocab) dlogits[last] = derivative(to_float(logits[last]), last);
}

}  // namespace generic
}  // namespace softcap_ce
}  // namespace pgolf
