#include <pybind11/pybind11.h>

namespace pgolf {
void bind_packing(pybind11::module_&) {}
}  // namespace pgolf
