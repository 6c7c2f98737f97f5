// The doors to PyTorch, for their Python half: the registry, and the entry points' addresses.
#include <pybind11/stl.h>

#include <map>

#include "bindings.h"
#include "registry.h"
#include "torch_entry.h"
#include "torch_error.h"

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace vattn {
namespace {

template <typename Function>
std::uintptr_t address_of(Function* function) {
  return reinterpret_cast<std::uintptr_t>(function);
}

std::map<std::string, std::uintptr_t> entry_points() {
  return {
      {"alloc", address_of(&vattn_torch_alloc)},
      {"try_alloc", address_of(&vattn_torch_try_alloc)},
      {"free", address_of(&vattn_torch_free)},
      {"init", address_of(&vattn_torch_init)},
      {"reset", address_of(&vattn_torch_reset)},
      {"memory_fraction", address_of(&vattn_torch_memory_fraction)},
      {"base_alloc", address_of(&vattn_torch_base_alloc)},
      {"record_stream", address_of(&vattn_torch_record_stream)},
      {"begin_allocate_to_pool", address_of(&vattn_torch_begin_pool)},
      {"end_allocate_to_pool", address_of(&vattn_torch_end_pool)},
      {"release_pool", address_of(&vattn_torch_release_pool)},
  };
}

std::map<std::string, std::uint64_t> entry_errors() {
  const auto counts = bad_frees();
  std::map<std::string, std::uint64_t> out;
  for (std::size_t i = 0; i < kBadFrees; ++i) {
    out[bad_free_name(static_cast<BadFree>(i))] = counts[i];
  }
  return out;
}

std::shared_ptr<CachingAllocator> make_allocator(int device) {
  Registry::of_process().get(device);
  return Registry::of_process().shared(device);
}

}  // namespace

void bind_torch(py::module_& module) {
  module.def(
      "configure_torch_allocator",
      [](bool enabled, std::size_t budget_bytes, std::size_t page_bytes, std::size_t ahead_bytes,
         const std::optional<std::string>& libcuda, bool host_accessible) {
        Registry::of_process().configure(
            {budget_bytes, page_bytes, ahead_bytes, libcuda.value_or(""), host_accessible},
            enabled);
      },
      py::kw_only(), py::arg("enabled"), py::arg("budget_bytes") = 0, py::arg("page_bytes") = 0,
      py::arg("ahead_bytes") = 0, py::arg("libcuda") = py::none(),
      py::arg("host_accessible") = false, NoGil());
  module.def("torch_allocator_enabled", [] { return Registry::of_process().enabled(); });
  module.def("torch_allocator_devices", [] { return Registry::of_process().devices(); });
  module.def(
      "torch_allocator", [](int device) { return Registry::of_process().shared(device); },
      py::arg("device"), NoGil());
  module.def("make_torch_allocator", &make_allocator, py::arg("device"), NoGil());
  module.def(
      "install_allocator",
      [](int device, std::shared_ptr<CachingAllocator> allocator) {
        Registry::of_process().install(device, std::move(allocator));
      },
      py::arg("device"), py::arg("allocator"), NoGil());
  module.def("set_segment_tag", &set_segment_tag, py::arg("device"), py::arg("tag"));
  module.def("torch_entry_points", &entry_points);
  module.def("torch_entry_errors", &entry_errors);
  module.def("find_torch_errors", &find_torch_errors, py::arg("libraries"));
}

}  // namespace vattn
