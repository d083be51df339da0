// Device helpers that the softcap cross-entropy kernels share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "softcap_ce/softcap_ce.h"

namespace pgolf {
namespace softcap_ce {

constexpr float kLog2e = 1.44269504f;

enum class Pass { forward, backward, with_grad };

// A row's target as the kernels take it: its column, or one of these.
constexpr int kIgnored = -1;
constexpr int kOutOfRange = -2;  // nothing is read; loss and gradient become nan

__device__ inline int column_of(const SoftcapCE& ce, int64_t target) {
  if (target == ce.ignore_index) return kIgnored;
  return target >= 0 && target < ce.vocab ? static_cast<int>(target) : kOutOfRange;
}

__device__ inline float nan_value() { return __int_as_float(0x7fc00000); }

// The upstream gradient of a row without a target: 0 when the row is ignored, nan when its target is out of range.
__device__ inline float upstream_without_target(int column) { return column == kIgnored ? 0.0f : nan_value(); }

__device__ inline float upstream_of(const SoftcapCEGradient& gradient, int column, int64_t row) {
  if (column < 0) return upstream_without_target(column);
  return static_cast<const float*>(gradient.upstream)[row * gradient.upstream_stride];
}

// The scalars of SoftcapCE in float.
struct Caps {
  float softcap;  // 0: none
  float scale;    // 1 / temperature
};

inline Caps caps_of(const SoftcapCE& ce) {
  return {static_cast<float>(ce.softcap), static_cast<float>(1.0 / ce.temperature)};
}

struct Capped {
  float z;      // the softcapped logit over the temperature
  float slope;  // dz/da
};

__device__ inline Capped cap(Caps caps, float a) {
  if (caps.softcap == 0.0f) return {a * caps.scale, caps.scale};
  const float t = tanhf(a / caps.softcap);
  return {caps.softcap * caps.scale * t, caps.scale * (1.0f - t) * (1.0f + t)};
}

// z at the row's target and hint, read before anybody may overwrite the logits by their gradient.
struct Picked {
  float target;  // nan without a target in range
  float hint;    // -inf without a hint, nan for a hint out of range
};

template <class Read>
__device__ float z_of_hint(const SoftcapCE& ce, const SoftcapCELosses& losses, Caps caps, int64_t row,
                           const Read& read) {
  const int64_t hint = losses.hints[row];
  if (hint < 0) return __int_as_float(0xff800000);
  return hint < ce.vocab ? cap(caps, read(hint)).z : nan_value();
}

template <class Read>
__device__ Picked pick(const SoftcapCE& ce, const SoftcapCELosses& losses, Caps caps, int64_t row, int column,
                       const Read& read) {
  return {column >= 0 ? cap(caps, read(column)).z : nan_value(),
          losses.hints == nullptr ? 0.0f : z_of_hint(ce, losses, caps, row, read)};
}

__device__ inline void write_losses(const SoftcapCELosses& losses, int64_t row, int column, Picked picked, float lse) {
  static_cast<float*>(losses.losses)[row] = column == kIgnored ? 0.0f : lse - picked.target;
  static_cast<float*>(losses.lse)[row] = lse;
  if (losses.hints != nullptr) static_cast<float*>(losses.hint_log_probs)[row] = picked.hint - lse;
}

// Barrier of the kThreads threads of one of a block's kGroups groups.
template <int kThreads, int kGroups>
__device__ inline void group_barrier(int group) {
  if (kGroups == 1) {
    __syncthreads();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kThreads) : "memory");
  }
}

}  // namespace softcap_ce
}  // namespace pgolf
