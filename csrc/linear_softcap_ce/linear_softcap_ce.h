#pragma once
#include <cstdint>

namespace pgolf {

// The head's product with its loss's powers, in bfloat16 (_linear_softcap_ce_triton.py has the formulas):
// G = exp(z) slope of the logits x w^T, and the sums of exp(z) over 128 columns at a time. Addresses are multiples of
// 16 bytes, matrices contiguous, depth 512, columns a multiple of 128.
struct HeadPowers {
  const void* x;  // [rows, 512]
  const void* w;  // [columns, 512]
  void* g;        // [rows, columns]
  float* sums;    // [rows, columns / 128]
  int32_t rows;
  int32_t columns;
  float inverse_softcap;
  float height;  // softcap / temperature * log2(e)
};

#ifdef PGOLF_SM90A
void linear_softcap_ce_powers_cuda(const HeadPowers& head, int device, void* stream);
#endif

}  // namespace pgolf
