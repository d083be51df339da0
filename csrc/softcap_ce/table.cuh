// Softcap cross-entropy of bfloat16 logits by table: a bfloat16 has so few values that exp(z), or exp(z) dz/da, of each
// lies in shared memory. One look-up an element replaces two or three special functions, and it is exact.
//
// |a| below 2^-27 of the range counts as that bound (|z| < 4e-6), |a| beyond 9 softcaps as saturated. That leaves 27
// powers of two with 128 values each and two signs. The form needs softcap / temperature <= 40: no maximum is taken.
#pragma once
#include "softcap_ce/device.cuh"

namespace pgolf {
namespace softcap_ce {
namespace table {

constexpr int kOctaves = 27;
constexpr int kEntries = kOctaves * 128;  // of one sign
constexpr int kVector = 8;                // logits in 16 bytes

// How a kernel is laid out: a block is kGroups groups of kThreads threads, each group works on rows of its own;
// kVectors vectors a thread hold a row. kCopies of the table lie interleaved, for neighbouring lanes to look up in
// other banks. kSpecial of the eight logits of a vector go through special functions instead.
template <int kThreads_, int kGroups_, int kVectors_, int kMinBlocks_, bool kPrefetch_ = true, int kCopies_ = 1,
          int kSpecial_ = 0>
struct Shape {
  static constexpr int kThreads = kThreads_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr bool kPrefetch = kPrefetch_;
  static constexpr int kCopies = kCopies_;
  static constexpr int kSpecial = kSpecial_;
  static constexpr int kSignOffset = 16384 * kCopies;  // bytes from the positive to the negative entries
  static constexpr int kBytes = kSignOffset + kEntries * 4 * kCopies;
};

// What a launch needs to know about the table.
struct Layout {
  uint32_t minus_first;  // minus the bits of the smallest magnitude, twice
};

inline Layout layout_of(double softcap) {
  int exponent = 0;
  frexp(9.0 * softcap, &exponent);  // 9 softcap <= 2^exponent
  const int first = max(0, (exponent - kOctaves + 127) << 7);
  const uint32_t half = static_cast<uint16_t>(-first);
  return {half << 16 | half};
}

// Fills the table: exp(z), or exp(z) dz/da for the backward pass.
template <class S, bool kSlope>
__device__ void fill(Caps caps, Layout layout, char* table) {
  const uint32_t first = static_cast<uint16_t>(-layout.minus_first);
  for (int i = threadIdx.x; i < 2 * kEntries; i += blockDim.x) {
    const int entry = i < kEntries ? i : i - kEntries;
    const float a = __uint_as_float((first + entry) << 16);
    const Capped capped = cap(caps, i < kEntries ? a : -a);
    const float power = expf(capped.z);
    float* copies = reinterpret_cast<float*>(table + (i < kEntries ? 0 : S::kSignOffset)) + entry * S::kCopies;
#pragma unroll
    for (int c = 0; c < S::kCopies; ++c) copies[c] = kSlope ? power * capped.slope : power;
  }
}

struct Pair {
  float low, high;
};

// The entries of two packed logits. `largest` gathers their magnitudes: nan is found there, the table has none.
template <class S>
__device__ inline Pair look_up(const char* table, Layout layout, uint32_t lane_offset, uint32_t logits,
                               uint32_t& largest) {
  const uint32_t magnitudes = logits & 0x7fff7fffu;
  largest = __vmaxu2(largest, magnitudes);
  const uint32_t entries = __viaddmin_s16x2_relu(magnitudes, layout.minus_first, (kEntries - 1) * 0x10001u);
  constexpr uint32_t kSign = (S::kSignOffset & 0xffff) * 0x10001u;
  const uint32_t sign = S::kCopies == 1 ? logits >> 1 : logits;
  const uint32_t offsets = (entries * (4 * S::kCopies) + lane_offset) | (sign & kSign);
  return {*reinterpret_cast<const float*>(table + (offsets & 0xffffu)),
          *reinterpret_cast<const float*>(table + (offsets >> 16))};
}

__device__ inline float exp2_special(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_special(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(z) = 2^(h - 2 h / (1 + exp(2 a / softcap))) with h = softcap / temperature * log2(e).
struct Special {
  float rate;    // 2 log2(e) / softcap
  float height;  // h

  __device__ float operator()(float a) const {
    return exp2_special(fmaf(-2.0f * height, reciprocal_special(1.0f + exp2_special(a * rate)), height));
  }
};

__device__ inline bool has_nan(uint32_t largest) { return max(largest & 0xffffu, largest >> 16) > 0x7f80u; }

__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(packed);
}

// The rows that a group of threads walks over, the next row's logits on their way while it works on this one's.
template <class S>
struct Walk {
  const SoftcapCE& ce;
  int group, thread, vectors;
  int64_t row, step;
  uint4 next[S::kVectors];

  __device__ explicit Walk(const SoftcapCE& ce)
      : ce(ce),
        group(threadIdx.x / S::kThreads),
        thread(threadIdx.x % S::kThreads),
        vectors(static_cast<int>(ce.vocab / kVector)),
        row(static_cast<int64_t>(blockIdx.x) * S::kGroups + group),
        step(static_cast<int64_t>(gridDim.x) * S::kGroups) {}

  __device__ const __nv_bfloat16* logits() const {
    return static_cast<const __nv_bfloat16*>(ce.logits) + row * ce.row_stride;
  }
  __device__ float logit(int64_t column) const { return __bfloat162float(logits()[column]); }
  __device__ bool holds(int v) const { return v * S::kThreads + thread < vectors; }
  __device__ void fetch(int64_t of) {
    if (of >= ce.rows) return;
    const auto* source =
        reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(ce.logits) + of * ce.row_stride);
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v)
      if (holds(v)) next[v] = __ldcs(source + v * S::kThreads + thread);
  }
  // The thread whose vector holds the target; thread 0 for a row without one.
  __device__ bool owns(Target target) const {
    return thread == (target.column < 0 ? 0 : static_cast<int>(target.column / kVector) % S::kThreads);
  }
  // The target's own derivative, after the same thread's store of the vector that holds it.
  __device__ void store_target(const SoftcapCEGradient& gradient, Caps caps, Target target, float at_target,
                               float upstream, float lse) const {
    const Capped capped = cap(caps, at_target);
    static_cast<__nv_bfloat16*>(gradient.dlogits)[row * gradient.row_stride + target.column] =
        __float2bfloat16_rn(upstream * capped.slope * (expf(capped.z - lse) - 1.0f));
  }
};

// Losses and, with kGradient, the gradient in the same pass: exp(z) stays in registers between the two sweeps.
template <class S, bool kGradient>
__global__ void __launch_bounds__(S::kThreads* S::kGroups, S::kMinBlocks)
    losses_kernel(const SoftcapCE ce, const Caps caps, const Layout layout, const SoftcapCELosses losses,
                  const SoftcapCEGradient gradient) {
  constexpr int kWarps = S::kThreads / 32;
  extern __shared__ __align__(16) char table[];
  __shared__ float partial[S::kGroups][2][kWarps];

  Walk<S> walk(ce);
  if (S::kPrefetch) walk.fetch(walk.row);
  fill<S, false>(caps, layout, table);
  __syncthreads();

  const uint32_t lane_offset = (threadIdx.x % S::kCopies) * 0x40004u;
  const float height = caps.softcap * caps.scale * kLog2e;
  const Special special = {2.0f * kLog2e / caps.softcap, height};
  const float tanh_of_log2 = 1.0f / height;
  for (int parity = 0; walk.row < ce.rows; walk.row += walk.step, parity ^= 1) {
    uint4 raw[S::kVectors];
    if (!S::kPrefetch) walk.fetch(walk.row);
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) raw[v] = walk.next[v];
    if (S::kPrefetch) walk.fetch(walk.row + walk.step);
    const Target target = target_of(ce, walk.row);
    const bool owner = walk.owns(target);
    Picked picked;
    float at_target = 0.0f;
    if (owner) {
      picked = pick(ce, losses, caps, walk.row, target, [&](int64_t j) { return walk.logit(j); });
      if (kGradient && target.column >= 0) at_target = walk.logit(target.column);
    }

    float power[S::kVectors][kVector];
    float sum = 0.0f;
    uint32_t largest = 0;
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      if (!walk.holds(v)) break;
      const uint32_t words[4] = {raw[v].x, raw[v].y, raw[v].z, raw[v].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if (w < S::kSpecial) {
          const uint32_t low_twice = (words[w] & 0xffffu) * 0x10001u;
          power[v][2 * w] = look_up<S>(table, layout, lane_offset, low_twice, largest).low;
          power[v][2 * w + 1] = special(__uint_as_float(words[w] & 0xffff0000u));
        } else {
          const Pair pair = look_up<S>(table, layout, lane_offset, words[w], largest);
          power[v][2 * w] = pair.low;
          power[v][2 * w + 1] = pair.high;
        }
        sum += power[v][2 * w] + power[v][2 * w + 1];
      }
    }
    if (has_nan(largest)) sum = nan_value();
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
    if (walk.thread % 32 == 0) partial[walk.group][parity][walk.thread / 32] = sum;
    group_barrier<S::kThreads, S::kGroups>(walk.group);
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[walk.group][parity][w];
    const float lse = logf(total);
    if (owner) write_losses(losses, walk.row, target, picked, lse);
    if (!kGradient) continue;

    const float upstream = upstream_of(gradient, target, walk.row);
    const float slope = upstream * caps.scale;
    const float inverse = 1.0f / total;
    auto derivative = [&](float e) {  // tanh from the exponential: one logarithm, no second look-up
      const float t = __log2f(e) * tanh_of_log2;
      return (e * inverse) * fmaf(-slope * t, t, slope);
    };
    uint4* out =
        reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(gradient.dlogits) + walk.row * gradient.row_stride);
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      if (!walk.holds(v)) break;
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = pack(derivative(power[v][2 * w]), derivative(power[v][2 * w + 1]));
      __stcs(out + v * S::kThreads + walk.thread, make_uint4(words[0], words[1], words[2], words[3]));
    }
    if (owner && target.column >= 0) walk.store_target(gradient, caps, target, at_target, upstream, lse);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads* S::kGroups, S::kMinBlocks)
    gradient_kernel(const SoftcapCE ce, const Caps caps, const Layout layout, const SoftcapCEGradient gradient,
                    const float* __restrict__ lse) {
  extern __shared__ __align__(16) char table[];
  Walk<S> walk(ce);
  if (S::kPrefetch) walk.fetch(walk.row);
  fill<S, true>(caps, layout, table);
  __syncthreads();

  const uint32_t lane_offset = (threadIdx.x % S::kCopies) * 0x40004u;
  for (; walk.row < ce.rows; walk.row += walk.step) {
    uint4 raw[S::kVectors];
    if (!S::kPrefetch) walk.fetch(walk.row);
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) raw[v] = walk.next[v];
    if (S::kPrefetch) walk.fetch(walk.row + walk.step);
    const Target target = target_of(ce, walk.row);
    const bool owner = walk.owns(target) && target.column >= 0;
    const float at_target = owner ? walk.logit(target.column) : 0.0f;
    const float upstream = upstream_of(gradient, target, walk.row);
    const float row_lse = lse[walk.row];
    const float inverse = expf(-row_lse);
    uint4* out =
        reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(gradient.dlogits) + walk.row * gradient.row_stride);
    uint32_t largest = 0;  // not read: a nan among the logits has made lse nan
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      if (!walk.holds(v)) break;
      const uint32_t in[4] = {raw[v].x, raw[v].y, raw[v].z, raw[v].w};
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const Pair pair = look_up<S>(table, layout, lane_offset, in[w], largest);
        words[w] = pack(upstream * (pair.low * inverse), upstream * (pair.high * inverse));
      }
      __stcs(out + v * S::kThreads + walk.thread, make_uint4(words[0], words[1], words[2], words[3]));
    }
    if (owner) walk.store_target(gradient, caps, target, at_target, upstream, row_lse);
  }
}

}  // namespace table
}  // namespace softcap_ce
}  // namespace pgolf
