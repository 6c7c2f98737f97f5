// The parts of the Python module vattn._core; see vattn/_core.pyi for what they look like there.
#pragma once

#include <pybind11/pybind11.h>

namespace vattn {

// What waits for the device lock must not hold the GIL: its holder may be in a long driver call.
template <typename Work>
auto without_gil(Work work) {
  const pybind11::gil_scoped_release release;
  return work();
}

void bind_errors(pybind11::module_& module);
void bind_driver(pybind11::module_& module);
void bind_cache(pybind11::module_& module);

}  // namespace vattn
