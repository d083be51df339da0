// Softcap cross-entropy of bfloat16 logits by table: a bfloat16 has so few values that exp(z), or exp(z) dz/da, of each
// lies in shared memory. One look-up an element replaces two or three special functions, and it is exact.
//
// |a| below 2^-27 of the range counts as that bound (|z| < 4e-6), |a| beyond 9 softcaps as saturated. That leaves 27
// powers of two with 128 values each and two signs. The form needs softcap / temperature <= 40: no maximum is taken.
#pragma once
#include <cuda_pipeline.h>

#include "softcap_ce/device.cuh"

namespace pgolf {
namespace softcap_ce {
namespace table {

constexpr int kOctaves = 27;
constexpr int kEntries = kOctaves * 128;  // of one sign
constexpr int kVector = 8;                // logits in 16 bytes
constexpr int kSignOffset = 16384;        // bytes from the positive to the negative entries

// How a kernel is laid out: a block is kGroups groups of kThreads threads, each group works on rows of its own;
// kVectors vectors a thread hold a row. kStages rows of each group are on their way or in work, in shared memory.
// kSpecial of the four high halves in a vector go through special functions: the two kinds of units share the work.
template <int kThreads_, int kGroups_, int kVectors_, int kMinBlocks_, int kStages_, int kSpecial_, bool kFull_ = false>
struct Shape {
  static constexpr int kThreads = kThreads_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kStages = kStages_;
  static constexpr int kSpecial = kSpecial_;
  static constexpr bool kFull = kFull_;  // vocab == kThreads * kVectors * 8: every thread has all its vectors
  static constexpr int kTableBytes = (kSignOffset + kEntries * 4 + 15) / 16 * 16;
  static constexpr int kBytes = kTableBytes + (kStages > 1 ? kGroups * kStages * kVectors * kThreads * 16 : 0);
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
template <bool kSlope>
__device__ void fill(Caps caps, Layout layout, char* table) {
  const uint32_t first = static_cast<uint16_t>(-layout.minus_first);
  for (int i = threadIdx.x; i < 2 * kEntries; i += blockDim.x) {
    const int entry = i < kEntries ? i : i - kEntries;
    const float a = __uint_as_float((first + entry) << 16);
    const Capped capped = cap(caps, i < kEntries ? a : -a);
    const float power = expf(capped.z);
    *reinterpret_cast<float*>(table + (i < kEntries ? 0 : kSignOffset) + entry * 4) =
        kSlope ? power * capped.slope : power;
  }
}

struct Pair {
  float low, high;
};

// The entries of two packed logits.
__device__ inline Pair look_up(const char* table, Layout layout, uint32_t magnitudes, uint32_t logits) {
  const uint32_t entries = __viaddmin_s16x2_relu(magnitudes, layout.minus_first, (kEntries - 1) * 0x10001u);
  const uint32_t offsets = (entries << 2) | ((logits >> 1) & (kSignOffset * 0x10001u));
  return {*reinterpret_cast<const float*>(table + (offsets & 0xffffu)),
          *reinterpret_cast<const float*>(table + (offsets >> 16))};
}

__device__ inline float exp2_special(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_special(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_special(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same by special functions: with r = 1 / (1 + exp(2 a / softcap)), tanh(a / softcap) = 1 - 2 r.
struct Special {
  float rate;    // 2 log2(e) / softcap
  float height;  // softcap / temperature * log2(e)

  __device__ float reciprocal(float a) const { return reciprocal_special(1.0f + exp2_special(a * rate)); }
  __device__ float power(float r) const { return exp2_special(fmaf(-2.0f * height, r, height)); }
};

// exp(z), or exp(z) dz/da, of the eight logits of a vector. `largest` gathers their magnitudes: nan is found there, the
// table has none.
template <class S, bool kSlope>
__device__ inline void transform(const char* table, Layout layout, Special special, float scale, uint4 vector,
                                 float* out, uint32_t& largest) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  uint32_t magnitudes[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) magnitudes[w] = words[w] & 0x7fff7fffu;
  largest = __vimax3_u16x2(largest, magnitudes[0], magnitudes[1]);
  largest = __vimax3_u16x2(largest, magnitudes[2], magnitudes[3]);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const bool high_special = w < S::kSpecial;
    const bool low_special = w + 4 < S::kSpecial;
    if (!low_special) {
      const Pair pair = look_up(table, layout, magnitudes[w], words[w]);
      out[2 * w] = pair.low;
      if (!high_special) out[2 * w + 1] = pair.high;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!(h == 0 ? low_special : high_special)) continue;
      const float r = special.reciprocal(__uint_as_float(h == 0 ? words[w] << 16 : words[w] & 0xffff0000u));
      out[2 * w + h] = special.power(r) * (kSlope ? 4.0f * scale * (r - r * r) : 1.0f);
    }
  }
}

__device__ inline bool has_nan(uint32_t largest) { return max(largest & 0xffffu, largest >> 16) > 0x7f80u; }

__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(packed);
}

// The thread of a group whose vector holds the column, or some thread for a row without one.
template <class S>
__device__ inline bool owns(int thread, int column) {
  return ((column / kVector) & (S::kThreads - 1)) == thread;
}

// dloss/da of what is not the target, from exp(z): tanh comes back by one logarithm, without a second look-up.
struct Derivative {
  float flat, bend;

  __device__ Derivative(Caps caps, Special special, float upstream, float total) {
    const float tanh_of_log2 = 1.0f / special.height;
    flat = upstream * caps.scale * reciprocal_special(total);
    bend = -flat * tanh_of_log2 * tanh_of_log2;
  }
  __device__ float operator()(float power) const {
    const float l = log2_special(power);
    return power * fmaf(bend * l, l, flat);
  }
  __device__ uint4 operator()(const float* powers) const {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = pack((*this)(powers[2 * w]), (*this)(powers[2 * w + 1]));
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// The same of a vector of the backward pass, from exp(z) dz/da.
__device__ inline uint4 scaled(const float* powers, float upstream, float inverse) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w)
    words[w] = pack(upstream * (powers[2 * w] * inverse), upstream * (powers[2 * w + 1] * inverse));
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The target's own derivative, to be stored after the same thread's store of the vector that holds it.
__device__ inline __nv_bfloat16 target_derivative(Capped capped, float upstream, float lse) {
  return __float2bfloat16_rn(upstream * capped.slope * (expf(capped.z - lse) - 1.0f));
}

__device__ inline __nv_bfloat16* gradient_row(const SoftcapCEGradient& gradient, int64_t row) {
  return static_cast<__nv_bfloat16*>(gradient.dlogits) + row * gradient.row_stride;
}

__device__ inline Special special_of(Caps caps) {
  return {2.0f * kLog2e / caps.softcap, caps.softcap * caps.scale * kLog2e};
}

// The rows that a group of threads walks over. Everything that a row needs is asked for a row or more ahead: its logits
// go to shared memory (each thread reads only what it fetched itself), its target's column and logit to registers.
template <class S>
struct Walk {
  const SoftcapCE& ce;
  const int group, thread, vectors;
  int64_t row;
  const int64_t step;
  uint4* const ring;  // this thread's vectors of stage 0
  int stage = 0;
  uint4 ahead[S::kStages > 1 ? 1 : S::kVectors];
  uint4 own[S::kStages > 1 ? 1 : S::kVectors];
  int target, next_target;    // columns
  int64_t target_after_next;  // as read: it may still be on its way
  __nv_bfloat16 target_logit, next_target_logit;

  __device__ Walk(const SoftcapCE& ce, char* shared)
      : ce(ce),
        group(threadIdx.x / S::kThreads),
        thread(threadIdx.x % S::kThreads),
        vectors(static_cast<int>(ce.vocab / kVector)),
        row(static_cast<int64_t>(blockIdx.x) * S::kGroups + group),
        step(static_cast<int64_t>(gridDim.x) * S::kGroups),
        ring(reinterpret_cast<uint4*>(shared + S::kTableBytes) + group * S::kStages * S::kVectors * S::kThreads +
             thread) {
    if (S::kStages == 1) fetch(row, 0);
#pragma unroll
    for (int i = 0; i < S::kStages - 1; ++i) fetch(row + i * step, i);
    target = column_of(ce, target_at(row));
    target_after_next = target_at(row + step);
    target_logit = logit_at(row, target);
  }

  __device__ const __nv_bfloat16* logits_at(int64_t of) const {
    return static_cast<const __nv_bfloat16*>(ce.logits) + of * ce.row_stride;
  }
  __device__ bool holds(int v) const { return S::kFull || v * S::kThreads + thread < vectors; }
  __device__ void fetch(int64_t of, int into) {
    if (of < ce.rows) {
      const auto* source = reinterpret_cast<const uint4*>(logits_at(of)) + thread;
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v)
        if (holds(v)) {
          if constexpr (S::kStages > 1)
            __pipeline_memcpy_async(slot(into, v), source + v * S::kThreads, 16);
          else
            ahead[v] = __ldcs(source + v * S::kThreads);
        }
    }
    if (S::kStages > 1) __pipeline_commit();
  }
  __device__ uint4* slot(int of_stage, int v) const { return ring + (of_stage * S::kVectors + v) * S::kThreads; }
  __device__ uint4 vector(int v) const {
    if constexpr (S::kStages > 1)
      return *slot(stage, v);
    else
      return own[v];
  }
  __device__ int64_t target_at(int64_t of) const { return of < ce.rows ? ce.targets[of] : ce.ignore_index; }
  __device__ __nv_bfloat16 logit_at(int64_t of, int column) const {
    return column >= 0 && owns<S>(thread, column) ? logits_at(of)[column] : __nv_bfloat16();
  }

  // Begins a row: asks for what later rows need, waits for this one's logits.
  __device__ void begin() {
    if constexpr (S::kStages == 1) {
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) own[v] = ahead[v];
      fetch(row + step, 0);
    } else {
      fetch(row + (S::kStages - 1) * step, (stage + S::kStages - 1) % S::kStages);
    }
    next_target = column_of(ce, target_after_next);
    next_target_logit = logit_at(row + step, next_target);
    target_after_next = target_at(row + 2 * step);
    if (S::kStages > 1) __pipeline_wait_prior(S::kStages - 1);
  }
  __device__ void end() {
    stage = (stage + 1) % S::kStages;
    row += step;
    target = next_target;
    target_logit = next_target_logit;
  }
};

// Losses and, with kGradient, the gradient in the same pass: exp(z) stays in registers between the two sweeps.
template <class S, bool kGradient>
__global__ void __launch_bounds__(S::kThreads* S::kGroups, S::kMinBlocks)
    losses_kernel(const SoftcapCE ce, const Caps caps, const Layout layout, const SoftcapCELosses losses,
                  const SoftcapCEGradient gradient) {
  constexpr int kWarps = S::kThreads / 32;
  extern __shared__ __align__(16) char shared[];
  __shared__ float partial[S::kGroups][2][kWarps];

  Walk<S> walk(ce, shared);
  fill<false>(caps, layout, shared);
  __syncthreads();

  const Special special = special_of(caps);
  for (int parity = 0; walk.row < ce.rows; parity ^= 1, walk.end()) {
    const int target = walk.target;
    const float upstream = kGradient ? upstream_of(gradient, target, walk.row) : 0.0f;
    // With the gradient the hint's logit may be overwritten: it is read before the barrier.
    const bool owner = owns<S>(walk.thread, target);
    float hint = __int_as_float(0xff800000);
    if (losses.hints != nullptr && owner) {
      const __nv_bfloat16* logits = walk.logits_at(walk.row);
      hint = z_of_hint(ce, losses, caps, walk.row, [&](int64_t j) { return __bfloat162float(logits[j]); });
    }
    walk.begin();

    float power[S::kVectors][kVector];
    float sum = 0.0f;
    uint32_t largest = 0;
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      if (!walk.holds(v)) break;
      transform<S, false>(shared, layout, special, 0.0f, walk.vector(v), power[v], largest);
#pragma unroll
      for (int j = 0; j < kVector; j += 2) sum += power[v][j] + power[v][j + 1];
    }
    if (has_nan(largest)) sum = nan_value();
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
    if (walk.thread % 32 == 0) partial[walk.group][parity][walk.thread / 32] = sum;
    group_barrier<S::kThreads, S::kGroups>(walk.group);
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[walk.group][parity][w];

    if (kGradient) {
      const Derivative derivative(caps, special, upstream, total);
      auto* out = reinterpret_cast<uint4*>(gradient_row(gradient, walk.row)) + walk.thread;
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) {
        if (!walk.holds(v)) break;
        __stcs(out + v * S::kThreads, derivative(power[v]));
      }
    }
    if (owner) {
      const float lse = logf(total);
      const Capped capped = cap(caps, __bfloat162float(walk.target_logit));
      write_losses(losses, walk.row, target, {target < 0 ? nan_value() : capped.z, hint}, lse);
      if (kGradient && target >= 0) gradient_row(gradient, walk.row)[target] = target_derivative(capped, upstream, lse);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads* S::kGroups, S::kMinBlocks)
    gradient_kernel(const SoftcapCE ce, const Caps caps, const Layout layout, const SoftcapCEGradient gradient,
                    const float* __restrict__ lse) {
  extern __shared__ __align__(16) char shared[];
  Walk<S> walk(ce, shared);
  fill<true>(caps, layout, shared);
  __syncthreads();

  const Special special = special_of(caps);
  float row_lse = walk.row < ce.rows ? lse[walk.row] : 0.0f;
  for (; walk.row < ce.rows; walk.end()) {
    const int target = walk.target;
    const float upstream = upstream_of(gradient, target, walk.row);
    const float next_lse = walk.row + walk.step < ce.rows ? lse[walk.row + walk.step] : 0.0f;
    walk.begin();
    const float inverse = expf(-row_lse);
    auto* out = reinterpret_cast<uint4*>(gradient_row(gradient, walk.row)) + walk.thread;
    uint32_t largest = 0;  // not read: a nan among the logits has made lse nan
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      if (!walk.holds(v)) break;
      float power[kVector];
      transform<S, true>(shared, layout, special, caps.scale, walk.vector(v), power, largest);
      __stcs(out + v * S::kThreads, scaled(power, upstream, inverse));
    }
    if (target >= 0 && owns<S>(walk.thread, target)) {
      const Capped capped = cap(caps, __bfloat162float(walk.target_logit));
      gradient_row(gradient, walk.row)[target] = target_derivative(capped, upstream, row_lse);
    }
    row_lse = next_lse;
  }
}

}  // namespace table
}  // namespace softcap_ce
}  // namespace pgolf
