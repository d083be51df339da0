// The table kernels that write a gradient, for Hopper and later: rows of logits arrive by bulk copies in a ring in
// shared memory, and every group of threads claims its rows from a counter.
//
// One thread asks for a row: no registers, no addresses and no instructions of the others go into copies. Rows are
// claimed because with equal shares some multiprocessors are done early, and wait for the others.
#pragma once
#include "softcap_ce/table.cuh"

namespace pgolf {
namespace softcap_ce {
namespace ring {

using table::kVector;
using table::Layout;
using table::Special;

// As table::Shape. kStages slots of a row each belong to a group, which is in one block with all the others.
template <int kThreads_, int kGroups_, int kVectors_, int kStages_, int kSpecial_, bool kFull_>
struct Shape {
  static constexpr int kThreads = kThreads_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kStages = kStages_;
  static constexpr int kSpecial = kSpecial_;
  static constexpr bool kFull = kFull_;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSlotBytes = kThreads * kVectors * 16;
  static constexpr int kTableBytes = (table::kSignOffset + table::kEntries * 4 + 127) / 128 * 128;
  static constexpr int kBytes = kTableBytes + kGroups * kStages * kSlotBytes;
};

// What belongs to the row in a slot.
struct alignas(16) Ticket {
  int64_t row;  // -1: no more rows
  int64_t target;
  float upstream;
  float lse;         // backward pass
  uint64_t arrived;  // barrier: all of the above and the logits are there
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the barrier wait for so many bytes of bulk copies.
__device__ inline void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Arrives when this thread's small copies so far have.
__device__ inline void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ready;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ready, [%0], %1;\n"
      "@!ready bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
template <class T>
__device__ inline void small_copy(T* to, const T* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(sizeof(T))
               : "memory");
}

// A group's walk over its rows. Its first thread also does the asking.
template <class S>
struct Walk {
  const SoftcapCE& ce;
  const SoftcapCEGradient& gradient;
  const float* const lse;  // or null
  unsigned* const claimed;
  Ticket* const tickets;
  char* const slots;
  const int group, thread, vectors;
  int stage = 0;
  uint32_t parity = 0;    // of the stage's barriers
  unsigned upcoming = 0;  // first thread: the next row, counted from those that all groups begin with

  // Begins with `kAhead` rows. To be followed by a barrier of the block.
  template <int kAhead>
  __device__ void start() {
    if (thread != 0) return;
    for (int i = 0; i < S::kStages; ++i) init_barrier(&tickets[i].arrived, 2);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const int64_t first = static_cast<int64_t>(blockIdx.x) * S::kGroups + group;
    for (int i = 0; i < kAhead; ++i) ask(i, first + i * groups());
    upcoming = atomicAdd(claimed, 1u);
  }
  // The first thread asks for one more row: the slot is free. The claim itself is made a row ahead.
  template <int kAhead>
  __device__ void ask_next(int into) {
    ask(into, kAhead * groups() + upcoming);
    upcoming = atomicAdd(claimed, 1u);
  }
  __device__ int64_t groups() const { return static_cast<int64_t>(gridDim.x) * S::kGroups; }
  __device__ void ask(int into, int64_t row) {
    Ticket& ticket = tickets[into];
    if (row >= ce.rows) {
      ticket.row = -1;
      arrive(&ticket.arrived);
      arrive(&ticket.arrived);
      return;
    }
    ticket.row = row;
    small_copy(&ticket.target, ce.targets + row);
    small_copy(&ticket.upstream, static_cast<const float*>(gradient.upstream) + row * gradient.upstream_stride);
    if (lse != nullptr) small_copy(&ticket.lse, lse + row);
    arrive_after_copies(&ticket.arrived);
    const int bytes = static_cast<int>(ce.vocab) * 2;
    arrive_expecting(&ticket.arrived, bytes);
    bulk_copy(slots + into * S::kSlotBytes, static_cast<const __nv_bfloat16*>(ce.logits) + row * ce.row_stride, bytes,
              &ticket.arrived);
  }

  __device__ const Ticket& begin() const {
    wait(&tickets[stage].arrived, parity);
    return tickets[stage];
  }
  __device__ void end() {
    if (++stage == S::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ int stage_before() const { return stage == 0 ? S::kStages - 1 : stage - 1; }
  __device__ uint32_t parity_before() const { return stage == 0 ? parity ^ 1 : parity; }
  __device__ bool holds(int v) const { return S::kFull || v * S::kThreads + thread < vectors; }
  __device__ const __nv_bfloat16* logits() const {
    return reinterpret_cast<const __nv_bfloat16*>(slots + stage * S::kSlotBytes);
  }
  __device__ uint4 vector(int v) const { return reinterpret_cast<const uint4*>(logits())[v * S::kThreads + thread]; }
};

template <class S>
__device__ inline Walk<S> walk_of(const SoftcapCE& ce, const SoftcapCEGradient& gradient, const float* lse,
                                  unsigned* claimed, char* shared, Ticket (*tickets)[S::kStages]) {
  const int group = threadIdx.x / S::kThreads;
  char* slots = shared + S::kTableBytes + group * (S::kStages * S::kSlotBytes);
  return {ce,
          gradient,
          lse,
          claimed,
          tickets[group],
          slots,
          group,
          static_cast<int>(threadIdx.x % S::kThreads),
          static_cast<int>(ce.vocab / kVector)};
}

#endif

// Losses and gradient. exp(z) stays in registers between the two sweeps, so a row's slot is free when its sum is known.
template <class S>
__global__ void __launch_bounds__(S::kThreads* S::kGroups, 1)
    losses_kernel(const SoftcapCE ce, const Caps caps, const Layout layout, const SoftcapCELosses losses,
                  const SoftcapCEGradient gradient, unsigned* claimed) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  __shared__ Ticket tickets[S::kGroups][S::kStages];
  __shared__ __align__(16) float partial[S::kGroups][2][S::kWarps];

  Walk<S> walk = walk_of<S>(ce, gradient, nullptr, claimed, shared, tickets);
  walk.template start<S::kStages>();
  table::fill<false>(caps, layout, shared);
  __syncthreads();

  const Special special = table::special_of(caps);
  for (int flip = 0;; flip ^= 1, walk.end()) {
    const Ticket& ticket = walk.begin();
    const int64_t row = ticket.row;
    if (row < 0) break;
    const int target = column_of(ce, ticket.target);
    const float upstream = target < 0 ? upstream_without_target(target) : ticket.upstream;
    const bool owner = table::owns<S>(walk.thread, target);
    float hint = __int_as_float(0xff800000);
    float target_logit = 0.0f;
    if (owner) {
      const __nv_bfloat16* logits = walk.logits();
      if (losses.hints != nullptr)
        hint = z_of_hint(ce, losses, caps, row, [&](int64_t j) { return __bfloat162float(logits[j]); });
      if (target >= 0) target_logit = __bfloat162float(logits[target]);
    }

    float power[S::kVectors][kVector];
    float sum = 0.0f;
    uint32_t largest = 0;
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      if (!walk.holds(v)) break;
      table::transform<S, false>(shared, layout, special, 0.0f, walk.vector(v), power[v], largest);
#pragma unroll
      for (int j = 0; j < kVector; j += 2) sum += power[v][j] + power[v][j + 1];
    }
    if (table::has_nan(largest)) sum = nan_value();
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
    if (walk.thread % 32 == 0) partial[walk.group][flip][walk.thread / 32] = sum;
    group_barrier<S::kThreads, S::kGroups>(walk.group);
    if (walk.thread == 0) walk.template ask_next<S::kStages>(walk.stage);
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) total += partial[walk.group][flip][w];

    const table::Derivative derivative(caps, special, upstream, total);
    __nv_bfloat16* out = table::gradient_row(gradient, row);
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      if (!walk.holds(v)) break;
      __stcs(reinterpret_cast<uint4*>(out) + v * S::kThreads + walk.thread, derivative(power[v]));
    }
    if (owner) {
      const float lse = logf(total);
      const Capped capped = cap(caps, target_logit);
      write_losses(losses, row, target, {target < 0 ? nan_value() : capped.z, hint}, lse);
      if (target >= 0) out[target] = table::target_derivative(capped, upstream, lse);
    }
  }
#endif
}

// The backward pass. A row's slot is free when all threads of its group have read it, which the row after finds out.
// One arrival a warp would do, behind __syncwarp, and take as long; but racecheck does not follow the other lanes'
// reads.
template <class S>
__global__ void __launch_bounds__(S::kThreads* S::kGroups, 1)
    gradient_kernel(const SoftcapCE ce, const Caps caps, const Layout layout, const SoftcapCEGradient gradient,
                    const float* __restrict__ lse, unsigned* claimed) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kAhead = S::kStages - 1;
  extern __shared__ __align__(128) char shared[];
  __shared__ Ticket tickets[S::kGroups][S::kStages];
  __shared__ uint64_t read[S::kGroups][S::kStages];

  Walk<S> walk = walk_of<S>(ce, gradient, lse, claimed, shared, tickets);
  uint64_t* slot_read = read[walk.group];
  if (walk.thread == 0) {
    for (int i = 0; i < S::kStages; ++i) init_barrier(&slot_read[i], S::kThreads);
  }
  walk.template start<kAhead>();
  table::fill<true>(caps, layout, shared);
  __syncthreads();

  const Special special = table::special_of(caps);
  for (bool first = true;; first = false, walk.end()) {
    const Ticket& ticket = walk.begin();
    const int64_t row = ticket.row;
    if (row < 0) break;
    const int target = column_of(ce, ticket.target);
    const float row_lse = ticket.lse;
    const float upstream = target < 0 ? upstream_without_target(target) : ticket.upstream;
    const bool owner = target >= 0 && table::owns<S>(walk.thread, target);
    const float target_logit = owner ? __bfloat162float(walk.logits()[target]) : 0.0f;
    const float inverse = expf(-row_lse);
    __nv_bfloat16* out = table::gradient_row(gradient, row);
    uint32_t largest = 0;  // not read: a nan among the logits has made lse nan
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      if (v == S::kVectors / 2 && walk.thread == 0) {
        if (!first) wait(&slot_read[walk.stage_before()], walk.parity_before());
        walk.template ask_next<kAhead>(walk.stage_before());
      }
      if (!walk.holds(v)) continue;
      float power[kVector];
      table::transform<S, true>(shared, layout, special, caps.scale, walk.vector(v), power, largest);
      __stcs(reinterpret_cast<uint4*>(out) + v * S::kThreads + walk.thread, table::scaled(power, upstream, inverse));
    }
    if (owner) out[target] = table::target_derivative(cap(caps, target_logit), upstream, row_lse);
    arrive(&slot_read[walk.stage]);
  }
#endif
}

}  // namespace ring
}  // namespace softcap_ce
}  // namespace pgolf
