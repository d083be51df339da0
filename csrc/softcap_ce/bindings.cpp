#include <pybind11/pybind11.h>

namespace pgolf {
void bind_softcap_ce(pybind11::module_&) {}
}  // namespace pgolf
