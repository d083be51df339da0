#pragma once
#include <cstdint>

namespace pgolf {

// A matrix product of the fused MLP that carries the activation, in bfloat16: out = f(input weight^T). Addresses are
// multiples of 16 bytes, matrices contiguous, columns a multiple of 128, depth one of 8 and at most 512.
struct MlpProduct {
  const void* input;   // [rows, depth]
  const void* weight;  // [columns, depth]
  const void* hidden;  // [rows, columns], of the gradient: signed squares, as the forward stored them
  void* out;           // [rows, columns]
  int32_t rows;
  int32_t columns;
  int32_t depth;
  float slope;
};

#ifdef PGOLF_SM90A
// out = leaky_relu(product)^2, the product's sign in the last bit.
void fused_mlp_up_cuda(const MlpProduct& product, int device, void* stream);

// out = product * (2 or -2 slope) sqrt(hidden), by hidden's last bit.
void fused_mlp_grad_pre_cuda(const MlpProduct& product, int device, void* stream);
#endif

}  // namespace pgolf
