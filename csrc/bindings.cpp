#include "bindings.h"

#include "dlpack_export.h"
#include "errors.h"

namespace py = pybind11;

namespace vattn {
namespace {

// DriverError carries its parts as attributes, which pybind11's own translation cannot.
void raise_driver_error(py::handle type, const DriverError& error) {
  py::object instance = type(error.what());
  instance.attr("call") = error.call();
  instance.attr("code") = error.code();
  instance.attr("fatal") = error.fatal();
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void destroy_capsule(PyObject* capsule) {
  // A consumer renames the capsule and takes over the deleter.
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

}  // namespace

py::capsule dlpack_capsule(DLManagedTensor* managed) {
  PyObject* capsule = PyCapsule_New(managed, "dltensor", &destroy_capsule);
  if (capsule == nullptr) {
    managed->deleter(managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::capsule>(capsule);
}

void bind_errors(py::module_& module) {
  // pybind11 tries the translator that was registered last first: derived types come last.
  const auto out_of_pages =
      py::register_exception<OutOfPages>(module, "OutOfPages", PyExc_MemoryError);
  py::register_exception<OutOfSlots>(module, "OutOfSlots", out_of_pages.ptr());
  py::register_exception<OutOfMemory>(module, "OutOfMemory", out_of_pages.ptr());
  py::register_exception<PagesGone>(module, "PagesGone", PyExc_LookupError);
  py::register_exception<InvariantError>(module, "InvariantError", PyExc_AssertionError);

  static py::handle driver_error =
      py::exception<DriverError>(module, "DriverError", PyExc_RuntimeError).release();
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const DriverError& error) {
      raise_driver_error(driver_error, error);
    }
  });
}

}  // namespace vattn

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native core of vattn: drivers, page pool, slots and mapper.";
  vattn::bind_errors(module);
  vattn::bind_driver(module);
  vattn::bind_cache(module);
  vattn::bind_range(module);
  vattn::bind_allocator(module);
  vattn::bind_torch(module);
}
