// Tensors over reserved memory whose rows are committed one by one.
#include <pybind11/stl.h>

#include "bindings.h"
#include "dlpack_export.h"
#include "virtual_range.h"

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace vattn {
namespace {

// All of it as bytes. The tensor keeps the range: its pages go with the last tensor over them, or
// when the range is closed.
py::capsule dlpack(const std::shared_ptr<VirtualRange>& range) {
  const std::shared_ptr<Reservation> kept(range, range->reservation().get());
  const auto bytes = static_cast<std::int64_t>(range->bytes());
  return dlpack_capsule(make_dlpack(kept, 0, {bytes}, {1}, {1, 8, 1}));
}

py::list committed(VirtualRange& range) {
  py::list out;
  for (const Rows& rows : without_gil([&] { return range.committed(); })) {
    out.append(py::make_tuple(rows.begin, rows.end));
  }
  return out;
}

}  // namespace

void bind_range(py::module_& module) {
  py::class_<VirtualRange, std::shared_ptr<VirtualRange>>(module, "VirtualRange")
      .def(py::init([](std::shared_ptr<PagePool> pool, std::size_t rows, std::size_t row_bytes) {
             return std::shared_ptr<VirtualRange>(
                 new VirtualRange(std::move(pool), rows, row_bytes),
                 &delete_without_gil<VirtualRange>);
           }),
           py::arg("pool"), py::kw_only(), py::arg("rows"), py::arg("row_bytes"), NoGil())
      .def(
          "commit",
          [](VirtualRange& range, std::size_t begin, std::size_t end, Stream stream) {
            range.commit({begin, end}, stream);
          },
          py::arg("begin"), py::arg("end"), py::arg("stream") = 0, NoGil())
      .def(
          "decommit",
          [](VirtualRange& range, std::size_t begin, std::size_t end, Stream stream) {
            range.decommit({begin, end}, stream);
          },
          py::arg("begin"), py::arg("end"), py::arg("stream") = 0, NoGil())
      .def("close", &VirtualRange::close, py::arg("stream") = 0, NoGil())
      .def("closed", &VirtualRange::closed, NoGil())
      .def("committed", &committed)
      .def("committed_bytes", &VirtualRange::committed_bytes, NoGil())
      .def("dlpack", &dlpack)
      .def("check", &VirtualRange::check, NoGil());
}

}  // namespace vattn
