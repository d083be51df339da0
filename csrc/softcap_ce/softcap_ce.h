// Cross-entropy of softcapped logits: z = softcap * tanh(a / softcap) / temperature, loss = lse(z) - z[target].
//
// Everything here is checked by pgolf_kernels/softcap_ce.py; nothing is checked again.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pgolf {

struct SoftcapCE {
  const void* logits;  // [rows, vocab], unit stride within a row
  int64_t row_stride;  // elements
  int64_t rows;
  int64_t vocab;
  DType dtype;
  const int64_t* targets;  // [rows]
  int64_t ignore_index;    // rows with this target lose nothing and get a zero gradient
  double softcap;          // 0: plain cross-entropy
  double temperature;
};

// Where losses go: float for every dtype but f64, whose losses are double.
struct SoftcapCELosses {
  void* losses;          // [rows]
  void* lse;             // [rows]: log sum exp(z), what the gradient needs
  const int64_t* hints;  // [rows] or null; -1: no hint
  void* hint_log_probs;  // [rows] or null: z[hint] - lse, -inf without a hint
};

// dlogits[i, j] = upstream[i] * dloss[i] / dlogits[i, j]. May alias the logits when the strides agree.
struct SoftcapCEGradient {
  const void* upstream;     // float (double for f64), one value a row
  int64_t upstream_stride;  // 0: one value for all rows
  void* dlogits;
  int64_t row_stride;
};

// The CPU functions return the first row whose target or hint lies outside the vocabulary, or -1.
int64_t softcap_ce_forward_cpu(const SoftcapCE& ce, const SoftcapCELosses& out, int threads);
void softcap_ce_backward_cpu(const SoftcapCE& ce, const void* lse, const SoftcapCEGradient& out, int threads);
// Both in one sweep over the rows: each row is still in cache when its gradient is written.
int64_t softcap_ce_with_grad_cpu(const SoftcapCE& ce, const SoftcapCELosses& out, const SoftcapCEGradient& gradient,
                                 int threads);

#ifdef PGOLF_CUDA
// The CUDA functions queue kernels on the stream and return. A target or hint outside the vocabulary gives a nan loss
// and gradient for its row; nothing outside the tensors is read. `claimed` is four bytes of device memory to count in,
// of this call alone.
void softcap_ce_forward_cuda(const SoftcapCE& ce, const SoftcapCELosses& out, int device, uintptr_t stream);
void softcap_ce_backward_cuda(const SoftcapCE& ce, const void* lse, const SoftcapCEGradient& out, void* claimed,
                              int device, uintptr_t stream);
void softcap_ce_with_grad_cuda(const SoftcapCE& ce, const SoftcapCELosses& out, const SoftcapCEGradient& gradient,
                               void* claimed, int device, uintptr_t stream);
// mean = sum(losses) / rows counted, weight = 1 / rows counted, in float; the same bits in every run.
void softcap_ce_mean_cuda(const void* losses, const int64_t* targets, int64_t rows, int64_t ignore_index, void* mean,
                          void* weight, int device, uintptr_t stream);
#endif

}  // namespace pgolf
