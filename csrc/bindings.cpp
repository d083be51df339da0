// The module pgolf_kernels._native. Functions take raw addresses, sizes and strides that Python has checked already
// (pgolf_kernels/_native_op.py); each kernel's folder binds its own.
#include <pybind11/pybind11.h>

namespace pgolf {
void bind_adapter_adamw(pybind11::module_& m);
void bind_fused_mlp(pybind11::module_& m);
void bind_gptq(pybind11::module_& m);
void bind_linear_softcap_ce(pybind11::module_& m);
void bind_ngram(pybind11::module_& m);
void bind_packing(pybind11::module_& m);
void bind_softcap_ce(pybind11::module_& m);
void bind_system(pybind11::module_& m);
}  // namespace pgolf

PYBIND11_MODULE(_native, m) {
  pgolf::bind_system(m);
  pgolf::bind_softcap_ce(m);
  pgolf::bind_gptq(m);
  pgolf::bind_packing(m);
  pgolf::bind_ngram(m);
  pgolf::bind_adapter_adamw(m);
  pgolf::bind_fused_mlp(m);
  pgolf::bind_linear_softcap_ce(m);
}
