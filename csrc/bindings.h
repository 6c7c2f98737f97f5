// The parts of the Python module vattn._core; see vattn/_core.pyi for what they look like there.
#pragma once

#include <pybind11/pybind11.h>

namespace vattn {

void bind_errors(pybind11::module_& module);
void bind_driver(pybind11::module_& module);
void bind_cache(pybind11::module_& module);

}  // namespace vattn
