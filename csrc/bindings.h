// The parts of the Python module vattn._core; see vattn/_core.pyi for what they look like there.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

namespace vattn {

struct DLManagedTensor;

// What waits for the device lock must not hold the GIL: its holder may be in a long driver call.
template <typename Work>
auto without_gil(Work work) {
  const pybind11::gil_scoped_release release;
  return work();
}

// For objects whose end waits for kernels, which other threads may have to help along. The last
// reference is Python's or that of a tensor, or that of a job which has no GIL to release.
template <typename T>
void delete_without_gil(T* object) {
  std::optional<pybind11::gil_scoped_release> release;
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) release.emplace();
  delete object;
}

// What from_dlpack() takes; it owns the tensor until then.
pybind11::capsule dlpack_capsule(DLManagedTensor* managed);

void bind_errors(pybind11::module_& module);
void bind_driver(pybind11::module_& module);
void bind_cache(pybind11::module_& module);
void bind_range(pybind11::module_& module);
void bind_allocator(pybind11::module_& module);
void bind_torch(pybind11::module_& module);

}  // namespace vattn
