// Drivers, pool and mapper.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>

#include "bindings.h"
#include "cuda_driver.h"
#include "host_driver.h"
#include "mapper.h"

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace vattn {
namespace {

py::dict counters(const Driver& driver) {
  py::dict out;
  const DriverCounters all = driver.counters();
  for (std::size_t i = 0; i < kOps; ++i) {
    out[op_name(static_cast<Op>(i))] = py::make_tuple(all[i].calls, all[i].ns);
  }
  return out;
}

py::tuple memory_info(const Driver& driver) {
  const MemoryInfo info = driver.memory_info();
  return py::make_tuple(info.free_bytes, info.total_bytes);
}

void destroy_pages(Driver& driver, const std::vector<PageHandle>& pages, std::size_t page_bytes) {
  std::exception_ptr error;
  driver.destroy(pages, page_bytes, error);
  if (error) std::rethrow_exception(error);
}

std::vector<PageHandle> create_pages(Driver& driver, std::size_t n, std::size_t page_bytes) {
  std::vector<PageHandle> out(n);
  driver.create(out, page_bytes);
  return out;
}

// One row per call: op, begin_ns, end_ns, bytes, pages, calls, thread, failed.
py::tuple stop_trace(Driver& driver) {
  constexpr std::size_t kColumns = 8;
  const CallTraceResult result = without_gil([&] { return driver.trace().stop(); });
  py::array_t<std::int64_t> out({result.calls.size(), kColumns});
  std::int64_t* at = out.mutable_data();
  for (const CallRecord& call : result.calls) {
    for (const std::int64_t value :
         {std::int64_t{call.op}, call.begin_ns, call.end_ns, static_cast<std::int64_t>(call.bytes),
          std::int64_t{call.pages}, std::int64_t{call.calls}, std::int64_t{call.thread},
          std::int64_t{call.failed}}) {
      *at++ = value;
    }
  }
  return py::make_tuple(out, result.dropped);
}

py::dict pool_stats(PagePool& pool) {
  const PoolStats s = without_gil([&] { return pool.stats(); });
  const std::size_t page = s.page_bytes;
  py::dict out;
  out["page_bytes"] = page;
  out["budget_bytes"] = s.budget_pages * page;
  out["created_bytes"] = s.created_pages * page;
  out["free_bytes"] = s.free_pages * page;
  out["used_bytes"] = s.used_pages * page;
  out["stale_bytes"] = s.stale_pages * page;
  out["peak_created_bytes"] = s.peak_created_pages * page;
  out["pages_created_total"] = s.pages_created_total;
  out["pages_destroyed_total"] = s.pages_destroyed_total;
  return out;
}

void bind_driver_class(py::module_& module) {
  py::class_<Driver, std::shared_ptr<Driver>>(module, "Driver")
      .def("name", &Driver::name)
      .def("granularity", &Driver::granularity)
      .def("default_page_bytes", &Driver::default_page_bytes)
      .def("fresh_pages_are_zero", &Driver::fresh_pages_are_zero)
      .def("holes_are_zero", &Driver::holes_are_zero)
      .def("dlpack_device",
           [](const Driver& d) {
             return py::make_tuple(d.dlpack_device().type, d.dlpack_device().id);
           })
      .def("memory_info", &memory_info)
      .def("physical_bytes", &Driver::physical_bytes)
      .def("reserve", &Driver::reserve, py::arg("bytes"), py::arg("alignment"), NoGil())
      .def("release", &Driver::release, py::arg("base"), py::arg("bytes"), NoGil())
      .def("create", &create_pages, py::arg("n"), py::arg("page_bytes"), NoGil())
      .def("destroy", &destroy_pages, py::arg("pages"), py::arg("page_bytes"), NoGil())
      .def(
          "map",
          [](Driver& d, Address base, const std::vector<PageHandle>& pages,
             std::size_t page_bytes) { d.map(base, pages, page_bytes); },
          py::arg("base"), py::arg("pages"), py::arg("page_bytes"), NoGil())
      .def("set_access", &Driver::set_access, py::arg("base"), py::arg("bytes"), NoGil())
      .def("unmap", &Driver::unmap, py::arg("base"), py::arg("bytes"), NoGil())
      .def("copy", &Driver::copy, py::arg("dst"), py::arg("src"), py::arg("bytes"),
           py::arg("stream") = 0, NoGil())
      .def("fill", &Driver::fill, py::arg("dst"), py::arg("value"), py::arg("bytes"),
           py::arg("stream") = 0, NoGil())
      .def(
          "copy_to_host",
          [](Driver& d, Address host, Address src, std::size_t bytes, Stream stream) {
            d.copy_to_host(reinterpret_cast<void*>(host), src, bytes, stream);
          },
          py::arg("host"), py::arg("src"), py::arg("bytes"), py::arg("stream") = 0, NoGil())
      .def(
          "copy_from_host",
          [](Driver& d, Address dst, Address host, std::size_t bytes, Stream stream) {
            d.copy_from_host(dst, reinterpret_cast<const void*>(host), bytes, stream);
          },
          py::arg("dst"), py::arg("host"), py::arg("bytes"), py::arg("stream") = 0, NoGil())
      .def("record", &Driver::record, py::arg("stream") = 0, NoGil())
      .def("query", &Driver::query, py::arg("event"), NoGil())
      .def("wait", &Driver::wait, py::arg("event"), NoGil())
      .def("stream_wait", &Driver::stream_wait, py::arg("stream"), py::arg("event"), NoGil())
      .def("destroy_event", &Driver::destroy_event, py::arg("event"), NoGil())
      .def("create_stream", &Driver::create_stream, NoGil())
      .def("destroy_stream", &Driver::destroy_stream, py::arg("stream"), NoGil())
      .def("synchronize", &Driver::synchronize, py::arg("stream") = 0, NoGil())
      .def("counters", &counters)
      .def(
          "start_trace", [](Driver& driver, std::size_t most) { driver.trace().start(most); },
          py::arg("max_calls"), NoGil())
      .def("stop_trace", &stop_trace)
      .def("usable", &Driver::usable);

  module.def(
      "host_driver", [](bool strict) { return make_host_driver({strict}); }, py::kw_only(),
      py::arg("strict") = false);
  module.def(
      "cuda_driver",
      [](int device, const std::optional<std::string>& libcuda, bool host_accessible) {
        return make_cuda_driver({device, libcuda.value_or(""), host_accessible});
      },
      py::kw_only(), py::arg("device") = 0, py::arg("libcuda") = py::none(),
      py::arg("host_accessible") = false, NoGil());
}

}  // namespace

void bind_driver(py::module_& module) {
  bind_driver_class(module);

  py::class_<PagePool, std::shared_ptr<PagePool>>(module, "PagePool")
      .def(py::init([](std::shared_ptr<Driver> driver, std::size_t page_bytes,
                       std::size_t budget_bytes, std::size_t low_bytes, std::size_t high_bytes) {
             return std::make_shared<PagePool>(
                 std::move(driver), PoolOptions{page_bytes, budget_bytes, low_bytes, high_bytes});
           }),
           py::arg("driver"), py::kw_only(), py::arg("page_bytes") = 0, py::arg("budget_bytes"),
           py::arg("low_bytes") = 0, py::arg("high_bytes") = 0)
      .def_property_readonly("driver", &PagePool::driver_ptr)
      .def_property_readonly("page_bytes", &PagePool::page_bytes)
      .def("stats", &pool_stats)
      .def("set_budget", &PagePool::set_budget, py::arg("budget_bytes"), NoGil())
      .def(
          "available_pages",
          [](PagePool& pool) {
            const DeviceLock lock = pool.lock();
            return pool.available(lock);
          },
          NoGil())
      .def(
          "unkept_pages",
          [](PagePool& pool) {
            const DeviceLock lock = pool.lock();
            return pool.unkept(lock);
          },
          NoGil())
      .def(
          "trim",
          [](PagePool& pool, std::size_t keep_bytes) {
            DeviceLock lock = pool.lock();
            return pool.trim(keep_bytes, lock);
          },
          py::arg("keep_bytes") = 0, NoGil())
      .def("refill", &PagePool::refill, NoGil())
      .def(
          "check",
          [](PagePool& pool) {
            const DeviceLock lock = pool.lock();
            pool.check(lock);
          },
          NoGil());

  py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket")
      .def("done", &Ticket::done)
      .def(
          "wait",
          [](Ticket& ticket, std::optional<double> timeout_s) {
            if (timeout_s) {
              return ticket.wait_for(
                  std::chrono::microseconds(static_cast<std::int64_t>(*timeout_s * 1e6)));
            }
            ticket.wait();
            return true;
          },
          py::arg("timeout_s") = py::none(), NoGil());

  py::class_<Mapper, std::shared_ptr<Mapper>>(module, "Mapper")
      .def(py::init([](std::shared_ptr<PagePool> pool) {
             return std::make_shared<Mapper>(std::move(pool));
           }),
           py::arg("pool"), NoGil())
      .def("drain", &Mapper::drain, NoGil())
      .def("stop", &Mapper::stop, NoGil());
}

}  // namespace vattn
