// The caching allocator, for tests, tools and the Python half of the doors.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "caching_allocator.h"

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace vattn {
namespace {

py::dict stat_dict(const Stat& stat) {
  py::dict out;
  out["current"] = stat.current;
  out["peak"] = stat.peak;
  out["allocated"] = stat.allocated;
  out["freed"] = stat.freed;
  return out;
}

py::dict group_dict(const StatGroup& group) {
  py::dict out;
  out["allocation"] = stat_dict(group.allocation);
  out["active"] = stat_dict(group.active);
  out["allocated_bytes"] = stat_dict(group.allocated_bytes);
  out["active_bytes"] = stat_dict(group.active_bytes);
  out["requested_bytes"] = stat_dict(group.requested_bytes);
  out["reserved_bytes"] = stat_dict(group.reserved_bytes);
  out["segments"] = group.segments;
  return out;
}

py::dict figures_dict(CachingAllocator& allocator) {
  const Figures f = without_gil([&] { return allocator.figures(); });
  py::dict out;
  out["all"] = group_dict(f.all);
  out["small_pool"] = group_dict(f.kinds[0]);
  out["large_pool"] = group_dict(f.kinds[1]);
  out["num_alloc_retries"] = f.alloc_retries;
  out["num_ooms"] = f.ooms;
  out["bad_frees"] = f.bad_frees;
  out["growths"] = f.growths;
  out["pages_moved"] = f.pages_moved;
  out["page_bytes"] = f.page_bytes;
  out["limit_bytes"] = f.limit_bytes;
  out["idle_bytes"] = f.idle_bytes;
  out["shadow_bytes"] = f.shadow_bytes;
  out["pending_blocks"] = f.pending_blocks;
  return out;
}

py::list segments_list(CachingAllocator& allocator) {
  const std::vector<SegmentInfo> segments = without_gil([&] { return allocator.segments(); });
  py::list out;
  for (const SegmentInfo& segment : segments) {
    py::dict entry;
    entry["address"] = segment.address;
    entry["bytes"] = segment.bytes;
    entry["stream"] = segment.stream;
    entry["kind"] = segment.kind == SizeKind::kSmall ? "small" : "large";
    entry["scope"] = segment.scope;
    entry["graph_pool"] = py::make_tuple(segment.graph.first, segment.graph.second);
    py::list blocks;
    for (const BlockInfo& block : segment.blocks) {
      blocks.append(py::make_tuple(block.address, block.bytes, block.asked_bytes, block.state));
    }
    entry["blocks"] = blocks;
    out.append(entry);
  }
  return out;
}

const char* event_name(EventKind kind) {
  switch (kind) {
    case EventKind::kAlloc:
      return "alloc";
    case EventKind::kFreeRequested:
      return "free_requested";
    case EventKind::kFreeCompleted:
      return "free_completed";
    case EventKind::kMap:
      return "segment_map";
    case EventKind::kUnmap:
      return "segment_unmap";
    case EventKind::kOutOfMemory:
      return "oom";
    case EventKind::kPause:
      return "pause";
    case EventKind::kResume:
      return "resume";
  }
  return "";
}

py::tuple recorded(CachingAllocator& allocator) {
  std::uint64_t dropped = 0;
  const std::vector<Event> events = without_gil([&] { return allocator.recorded(&dropped); });
  py::list out;
  for (const Event& e : events) {
    out.append(py::make_tuple(event_name(e.kind), e.address, e.bytes, e.stream, e.time_us, e.tag));
  }
  return py::make_tuple(out, dropped);
}

// A filter in Python, for tests; PyTorch's are C++. The allocator asks it without the GIL.
void begin_graph_pool(CachingAllocator& allocator, GraphPoolId id, std::vector<Stream> streams) {
  allocator.begin_graph_pool(id, [streams = std::move(streams)](Stream stream) {
    return std::find(streams.begin(), streams.end(), stream) != streams.end();
  });
}

}  // namespace

void bind_allocator(py::module_& module) {
  module.def("tag_id", &tag_id, py::arg("name"));
  module.def("tag_name", &tag_name, py::arg("tag"));
  module.def("current_tag", &current_tag);
  module.def("set_current_tag", &set_current_tag, py::arg("tag"));

  py::class_<CachingAllocator, std::shared_ptr<CachingAllocator>>(module, "CachingAllocator")
      .def(py::init([](std::shared_ptr<PagePool> pool, std::shared_ptr<Mapper> mapper,
                       std::size_t range_bytes) {
             // Its end waits for streams.
             return std::shared_ptr<CachingAllocator>(
                 new CachingAllocator(std::move(pool), std::move(mapper),
                                      CachingAllocatorOptions{range_bytes}),
                 &delete_without_gil<CachingAllocator>);
           }),
           py::arg("pool"), py::arg("mapper") = nullptr, py::kw_only(), py::arg("range_bytes") = 0,
           NoGil())
      .def_property_readonly("pool", &CachingAllocator::pool)
      .def_property_readonly("mapper", &CachingAllocator::mapper)
      .def(
          "allocate",
          [](CachingAllocator& a, std::size_t bytes, Stream stream) {
            return reinterpret_cast<Address>(a.allocate(bytes, stream));
          },
          py::arg("bytes"), py::arg("stream") = 0, NoGil())
      .def(
          "free",
          [](CachingAllocator& a, Address address, std::optional<std::size_t> bytes) {
            a.free(reinterpret_cast<void*>(address), bytes.value_or(kUnknownBytes));
          },
          py::arg("address"), py::arg("bytes") = py::none(), NoGil())
      .def(
          "record_stream",
          [](CachingAllocator& a, Address address, Stream stream) {
            a.record_stream(reinterpret_cast<void*>(address), stream);
          },
          py::arg("address"), py::arg("stream"), NoGil())
      .def(
          "base",
          [](CachingAllocator& a, Address address) {
            std::size_t bytes = 0;
            void* base = a.base(reinterpret_cast<void*>(address), &bytes);
            return std::pair(reinterpret_cast<Address>(base), bytes);
          },
          py::arg("address"), NoGil())
      .def(
          "owns",
          [](CachingAllocator& a, Address address) {
            return a.owns(reinterpret_cast<const void*>(address));
          },
          py::arg("address"), NoGil())
      .def("begin_graph_pool", &begin_graph_pool, py::arg("id"), py::arg("streams"), NoGil())
      .def("end_graph_pool", &CachingAllocator::end_graph_pool, py::arg("id"), NoGil())
      .def("release_graph_pool", &CachingAllocator::release_graph_pool, py::arg("id"), NoGil())
      .def("tag_live_bytes", &CachingAllocator::tag_live_bytes, py::arg("tag"), NoGil())
      .def(
          "pause",
          [](CachingAllocator& a, TagId tag, bool backup, Address host, std::size_t host_bytes) {
            a.pause(tag, backup, reinterpret_cast<void*>(host), host_bytes);
          },
          py::arg("tag"), py::kw_only(), py::arg("backup"), py::arg("host") = 0,
          py::arg("host_bytes") = 0, NoGil())
      .def("resume", &CachingAllocator::resume, py::arg("tag"), NoGil())
      .def("is_paused", &CachingAllocator::is_paused, py::arg("tag"), NoGil())
      .def("set_tag_budget", &CachingAllocator::set_tag_budget, py::arg("tag"), py::arg("bytes"),
           NoGil())
      .def("set_limit", &CachingAllocator::set_limit, py::arg("bytes"), NoGil())
      .def("trim", &CachingAllocator::trim, py::arg("keep_bytes") = 0, NoGil())
      .def("figures", &figures_dict)
      .def("reset_peaks", &CachingAllocator::reset_peaks, NoGil())
      .def("reset_accumulated", &CachingAllocator::reset_accumulated, NoGil())
      .def("segments", &segments_list)
      .def("record", &CachingAllocator::record, py::arg("max_events"), NoGil())
      .def("recorded", &recorded)
      .def("settle", &CachingAllocator::settle, NoGil())
      .def("check", &CachingAllocator::check, NoGil());
}

}  // namespace vattn
