// One AdamW step over the adapters of a batch of documents, each document at its own step, in one pass over memory.
//
// Everything here is checked by pgolf_kernels/adapter_adamw.py; nothing is checked again.
#pragma once
#include <cstdint>

namespace pgolf {

// Tensors are [slots, documents, inner], contiguous.
struct AdapterAdamW {
  float* p;
  const float* g;
  float* v;
  float* m;  // null where beta1 is 0: the first moment is g
  int64_t slots;
  int64_t documents;
  int64_t inner;
  const float* factors;  // [documents, 2]: 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t); 0: no step, nothing is read
  const bool* reset;     // [documents] or null: moments become 0 and, with `zero`, so does p
  bool zero;
  float lr;
  float beta1;
  float beta2;
  float rest1;  // 1 - beta1 and 1 - beta2, rounded once
  float rest2;
  float eps;
  float keep;  // 1 - lr * weight_decay
};

void adapter_adamw_cpu(const AdapterAdamW& step, int threads);

}  // namespace pgolf
