// Slots of a cache, and tensors over its regions.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "dlpack_export.h"
#include "mapper.h"
#include "slots.h"

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace vattn {
namespace {

using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

std::vector<std::int32_t> values_of(const Int32Array& array) {
  if (array.ndim() != 1) {
    throw std::invalid_argument("slots and lengths are one-dimensional int32 arrays; got " +
                                std::to_string(array.ndim()) + " dimensions");
  }
  return {array.data(), array.data() + array.shape(0)};
}

std::int32_t to_int32(std::int64_t value, const char* what) {
  if (value < 0 || value > INT32_MAX) {
    throw std::invalid_argument(std::string(what) + " " + std::to_string(value) +
                                " is outside 0.." + std::to_string(INT32_MAX));
  }
  return static_cast<std::int32_t>(value);
}

py::dict space_stats(SlotSpace& space) {
  const SpaceStats s = without_gil([&] { return space.stats(); });
  py::dict out;
  out["open_slots"] = s.open_slots;
  out["kept_slots"] = s.kept_slots;
  out["tokens"] = s.tokens;
  out["token_bytes"] = s.token_bytes;
  out["live_bytes"] = s.live_bytes;
  out["cover_bytes"] = s.cover_bytes;
  out["stale_bytes"] = s.stale_bytes;
  out["kept_bytes"] = s.kept_bytes;
  out["shared_bytes"] = s.shared_bytes;
  out["scratch_bytes"] = s.scratch_bytes;
  out["reserved_bytes"] = s.reserved_bytes;
  out["pages_mapped"] = s.pages_mapped;
  out["pages_adopted"] = s.pages_adopted;
  out["pages_aliased"] = s.pages_aliased;
  out["pages_recycled"] = s.pages_recycled;
  out["pages_reclaimed"] = s.pages_reclaimed;
  out["copied_bytes"] = s.copied_bytes;
  out["evicted_tokens"] = s.evicted_tokens;
  return out;
}

template <typename Out, typename In>
py::array_t<Out> page_array(const SlotSpace& space, std::uint32_t region,
                            const std::vector<In>& values) {
  const Region& r = space.regions().at(region);
  py::array_t<Out> out({std::size_t{r.spec().runs}, std::size_t{r.pages_per_run()}});
  Out* data = out.mutable_data();
  for (std::size_t i = 0; i < values.size(); ++i) data[i] = static_cast<Out>(values[i]);
  return out;
}

py::capsule dlpack(const SlotSpace& space, std::uint32_t region, std::size_t offset_bytes,
                   std::vector<std::int64_t> shape, std::vector<std::int64_t> strides,
                   std::uint8_t code, std::uint8_t bits) {
  return dlpack_capsule(make_dlpack(space.regions().at(region).reservation(), offset_bytes,
                                    std::move(shape), std::move(strides), {code, bits, 1}));
}

std::shared_ptr<Ticket> prepare_async(std::shared_ptr<SlotSpace> space, Mapper& mapper,
                                      const Int32Array& slots, const Int32Array& tokens,
                                      Stream stream) {
  if (mapper.pool().get() != &space->pool()) {
    throw std::invalid_argument("the mapper belongs to another pool than the cache");
  }
  std::vector<std::int32_t> slot_list = values_of(slots), token_list = values_of(tokens);
  const py::gil_scoped_release release;
  // Waking the thread costs more than looking, and in most steps of a decode there is nothing to
  // do.
  if (space->prepared(slot_list, token_list)) return Ticket::finished();
  return mapper.submit([space = std::move(space), slot_list = std::move(slot_list),
                        token_list = std::move(token_list),
                        stream] { space->prepare(slot_list, token_list, stream); });
}

using BatchCall = void (SlotSpace::*)(std::span<const std::int32_t>, std::span<const std::int32_t>,
                                      Stream);

template <BatchCall kCall>
void batch(SlotSpace& space, const Int32Array& first, const Int32Array& second, Stream stream) {
  // Copies: without the GIL another thread may write to the caller's arrays.
  const std::vector<std::int32_t> a = values_of(first), b = values_of(second);
  const py::gil_scoped_release release;
  (space.*kCall)(a, b, stream);
}

template <BatchCall kCall>
void single(SlotSpace& space, std::int64_t slot, std::int64_t tokens, Stream stream) {
  const std::int32_t s = to_int32(slot, "slot"), t = to_int32(tokens, "length");
  (space.*kCall)({&s, 1}, {&t, 1}, stream);
}

py::array_t<std::int32_t> kept_lengths(SlotSpace& space) {
  const std::vector<KeptRange> kept = without_gil([&] { return space.kept_lengths(); });
  py::array_t<std::int32_t> out({kept.size(), std::size_t{2}});
  std::int32_t* data = out.mutable_data();
  for (std::size_t i = 0; i < kept.size(); ++i) {
    data[2 * i] = static_cast<std::int32_t>(kept[i].lowest);
    data[2 * i + 1] = static_cast<std::int32_t>(kept[i].tokens);
  }
  return out;
}

// One row per slot: pages, shared pages, copied bytes.
py::array_t<std::int64_t> usage(SlotSpace& space, const Int32Array& slots) {
  const std::vector<std::int32_t> list = values_of(slots);
  const std::vector<SlotUsage> usages = without_gil([&] { return space.usage(list); });
  py::array_t<std::int64_t> out({usages.size(), std::size_t{3}});
  std::int64_t* data = out.mutable_data();
  for (const SlotUsage& u : usages) {
    *data++ = static_cast<std::int64_t>(u.pages);
    *data++ = static_cast<std::int64_t>(u.shared_pages);
    *data++ = static_cast<std::int64_t>(u.copied_bytes);
  }
  return out;
}

void bind_kept(py::class_<SlotSpace, std::shared_ptr<SlotSpace>>& space) {
  space
      .def(
          "kept",
          [](SlotSpace& s, std::uint32_t slot) {
            const KeptRange kept = without_gil([&] { return s.kept(slot); });
            return py::make_tuple(kept.lowest, kept.tokens);
          },
          py::arg("slot"))
      .def("kept_lengths", &kept_lengths)
      .def("reopen", &SlotSpace::reopen, py::arg("slot"), py::arg("tokens"), NoGil())
      .def("forget", &SlotSpace::forget, py::arg("slot"), NoGil())
      .def("touch", &SlotSpace::touch, py::arg("slot"), NoGil())
      .def(
          "evict_first",
          [](SlotSpace& s, const Int32Array& slots) {
            const std::vector<std::int32_t> list = values_of(slots);
            without_gil([&] { s.evict_first(list); });
          },
          py::arg("slots").noconvert())
      .def("sole_pages", &SlotSpace::sole_pages, py::arg("slot"), NoGil())
      .def("evictions", &SlotSpace::evictions)
      .def(
          "pages_needed_many",
          [](SlotSpace& s, const Int32Array& slots, const Int32Array& tokens) {
            const std::vector<std::int32_t> a = values_of(slots), b = values_of(tokens);
            return without_gil([&] { return s.pages_needed_many(a, b); });
          },
          py::arg("slots").noconvert(), py::arg("tokens").noconvert())
      .def(
          "admission_pages",
          [](SlotSpace& s, std::size_t tokens, std::optional<std::uint32_t> source,
             std::size_t shared_tokens, bool in_place, std::size_t anchor, bool new_only) {
            return s.admission_pages({tokens, source, shared_tokens, in_place, anchor, new_only});
          },
          py::arg("tokens"), py::arg("source") = py::none(), py::arg("shared_tokens") = 0,
          py::arg("in_place") = false, py::arg("anchor") = 0, py::arg("new_only") = false, NoGil())
      .def("anchor", &SlotSpace::anchor, py::arg("slot"), NoGil())
      .def("saved_bytes", &SlotSpace::saved_bytes, py::arg("slot"), NoGil())
      .def(
          "copy_out",
          [](SlotSpace& s, std::uint32_t slot, Address host, std::size_t bytes, Stream stream) {
            s.copy_out(slot, reinterpret_cast<void*>(host), bytes, stream);
          },
          py::arg("slot"), py::arg("host"), py::arg("bytes"), py::arg("stream") = 0, NoGil())
      .def(
          "copy_in",
          [](SlotSpace& s, std::uint32_t slot, std::size_t tokens, std::size_t anchor, Address host,
             std::size_t bytes, std::size_t first_token, Stream stream) {
            s.copy_in(slot, tokens, anchor, reinterpret_cast<const void*>(host), bytes, first_token,
                      stream);
          },
          py::arg("slot"), py::arg("tokens"), py::arg("anchor"), py::arg("host"), py::arg("bytes"),
          py::arg("first_token") = 0, py::arg("stream") = 0, NoGil());
}

void bind_space(py::module_& module) {
  py::class_<SlotSpace, std::shared_ptr<SlotSpace>> bound(module, "SlotSpace");
  bind_kept(bound);
  bound
      .def(py::init([](std::shared_ptr<PagePool> pool, const std::vector<RegionSpec>& regions,
                       std::uint32_t slots, std::size_t max_tokens,
                       const std::vector<std::uint32_t>& tiles, bool keep_stale) {
             return std::shared_ptr<SlotSpace>(
                 new SlotSpace(std::move(pool),
                               SpaceOptions{slots, max_tokens, regions, tiles, keep_stale}),
                 &delete_without_gil<SlotSpace>);
           }),
           py::arg("pool"), py::kw_only(), py::arg("regions"), py::arg("slots"),
           py::arg("max_tokens"), py::arg("tiles"), py::arg("keep_stale") = true, NoGil())
      .def("open", &SlotSpace::open, py::arg("slot") = py::none(), py::arg("expected_tokens") = 0,
           NoGil())
      .def("release", &SlotSpace::release, py::arg("slot"), py::arg("stream") = 0,
           py::arg("keep") = false, NoGil())
      .def("ensure", &single<&SlotSpace::ensure>, py::arg("slot"), py::arg("tokens"),
           py::arg("stream") = 0, NoGil())
      .def("prepare", &single<&SlotSpace::prepare>, py::arg("slot"), py::arg("tokens"),
           py::arg("stream") = 0, NoGil())
      .def("ensure_many", &batch<&SlotSpace::ensure>, py::arg("slots").noconvert(),
           py::arg("tokens").noconvert(), py::arg("stream") = 0)
      .def("assign", &batch<&SlotSpace::assign>, py::arg("destinations").noconvert(),
           py::arg("sources").noconvert(), py::arg("stream") = 0)
      .def("prepare_async", &prepare_async, py::arg("mapper"), py::arg("slots").noconvert(),
           py::arg("tokens").noconvert(), py::arg("stream") = 0)
      .def("truncate", &SlotSpace::truncate, py::arg("slot"), py::arg("tokens"),
           py::arg("stream") = 0, NoGil())
      .def("fork", &SlotSpace::fork, py::arg("source"), py::arg("tokens"), py::arg("stream") = 0,
           NoGil())
      .def("trim", &SlotSpace::trim, NoGil())
      .def("mark_dirty", &SlotSpace::mark_dirty, py::arg("slot"), NoGil())
      .def("tokens", &SlotSpace::tokens, py::arg("slot"), NoGil())
      .def("lowest", &SlotSpace::lowest, py::arg("slot"), NoGil())
      .def("generation", &SlotSpace::generation, py::arg("slot"), NoGil())
      .def("is_open", &SlotSpace::is_open, py::arg("slot"), NoGil())
      .def("pages_needed", &SlotSpace::pages_needed, py::arg("slot"), py::arg("tokens"), NoGil())
      .def("first_token", &SlotSpace::first_token, py::arg("slot"), py::arg("region"), NoGil())
      .def("stats", &space_stats)
      .def("usage", &usage, py::arg("slots").noconvert())
      .def(
          "page_states",
          [](SlotSpace& space, std::uint32_t slot, std::uint32_t region) {
            return page_array<std::uint8_t>(
                space, region, without_gil([&] { return space.page_states(slot, region); }));
          },
          py::arg("slot"), py::arg("region"))
      .def(
          "recycled",
          [](SlotSpace& space, std::uint32_t slot, std::uint32_t region) {
            return page_array<bool>(space, region,
                                    without_gil([&] { return space.recycled(slot, region); }));
          },
          py::arg("slot"), py::arg("region"))
      .def(
          "overview",
          [](SlotSpace& space, std::uint32_t cells) {
            if (cells == 0) throw std::invalid_argument("cells must be positive");
            py::list out;
            for (const SlotCells& row : without_gil([&] { return space.overview(cells); })) {
              const auto* data = reinterpret_cast<const char*>(row.cells.data());
              out.append(py::make_tuple(row.slot, row.tokens, row.kept,
                                        py::bytes(data, row.cells.size())));
            }
            return out;
          },
          py::arg("cells"))
      .def(
          "page_ids",
          [](SlotSpace& space, std::uint32_t slot, std::uint32_t region) {
            return page_array<std::uint32_t>(
                space, region, without_gil([&] { return space.page_ids(slot, region); }));
          },
          py::arg("slot"), py::arg("region"))
      .def(
          "address",
          [](const SlotSpace& space, std::uint32_t slot, std::uint32_t region) {
            const Region& r = space.regions().at(region);
            if (slot >= r.slots()) throw std::invalid_argument("no such slot");
            return r.address(slot, 0);
          },
          py::arg("slot"), py::arg("region"))
      .def("dlpack", &dlpack, py::arg("region"), py::arg("offset_bytes"), py::arg("shape"),
           py::arg("strides"), py::arg("code"), py::arg("bits"))
      .def("check", &SlotSpace::check, NoGil());
}

}  // namespace

void bind_cache(py::module_& module) {
  py::class_<RegionSpec>(module, "RegionSpec")
      .def(py::init([](std::uint32_t runs, std::size_t token_bytes, std::size_t capacity_tokens,
                       std::size_t window_tokens, std::uint8_t type_tag) {
             return RegionSpec{runs, token_bytes, capacity_tokens, window_tokens, type_tag};
           }),
           py::kw_only(), py::arg("runs"), py::arg("token_bytes"), py::arg("capacity_tokens"),
           py::arg("window_tokens") = 0, py::arg("type_tag") = 0)
      .def_readonly("runs", &RegionSpec::runs)
      .def_readonly("token_bytes", &RegionSpec::token_bytes)
      .def_readonly("capacity_tokens", &RegionSpec::capacity_tokens)
      .def_readonly("window_tokens", &RegionSpec::window_tokens)
      .def_readonly("type_tag", &RegionSpec::type_tag);

  py::enum_<PageState>(module, "PageState")
      .value("UNMAPPED", PageState::kUnmapped)
      .value("LIVE", PageState::kLive)
      .value("SHARED", PageState::kShared)
      .value("COVER", PageState::kCover)
      .value("STALE", PageState::kStale)
      .value("KEPT", PageState::kKept);

  bind_space(module);
}

}  // namespace vattn
