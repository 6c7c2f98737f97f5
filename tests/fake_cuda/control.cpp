// The control API: settings, streams, kernels, bytes. Results are in report.cpp.
#include "control.h"

#include <cstring>
#include <optional>
#include <utility>

#include "submit.h"
#include "text.h"

namespace fake {
namespace {

// Changes a setting if it is `valid` and, for one that objects depend on, if there are `none`.
template <typename Change>
int configure(bool valid, bool only_when_empty, Change&& change) {
  World& world = World::get();
  const Lock lock(world.mutex);
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  if (only_when_empty && world.objects_exist()) return CUDA_ERROR_ILLEGAL_STATE;
  std::forward<Change>(change)(world);
  return CUDA_SUCCESS;
}

// False: no such name. "*" is any.
bool parse_name(const char* name, std::optional<Api>* out) {
  out->reset();
  if (!name) return false;
  if (std::strcmp(name, "*") == 0) return true;
  for (std::size_t i = 0; i < kApis; ++i) {
    if (std::strcmp(name, kApiNames[i]) == 0) *out = static_cast<Api>(i);
  }
  return out->has_value();
}

template <typename Action>
int with_stream(CUstream handle, int unknown, Action&& action) {
  World& world = World::get();
  const Lock lock(world.mutex);
  const StreamPtr stream = find_stream(world, handle, true);
  return stream ? std::forward<Action>(action)(world, stream) : unknown;
}

bool valid_mode(int mode) { return mode >= FAKE_IMMEDIATE && mode <= FAKE_LAZY; }

// What a pointer access by the CPU would meet.
CUresult check_cpu_access(World& world, CUdeviceptr address, std::size_t bytes, bool write) {
  if (world.backing.elide()) return CUDA_ERROR_NOT_SUPPORTED;
  const bool good = world.inaccessible(Range{address, bytes}, -1, write).empty();
  return good ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

}  // namespace
}  // namespace fake

using fake::configure, fake::Lock, fake::Mode, fake::Range, fake::Stream, fake::StreamPtr,
    fake::with_stream, fake::Work, fake::World;

int fake_config_defaults() {
  return configure(true, true, [](World& world) {
    world.config = {};
    world.backing.set_elide(world.config.elide);
    world.streams.default_mode = world.config.stream_mode;
    world.oom_at = UINT64_MAX;
  });
}

int fake_config_device_bytes(size_t bytes) {
  return configure(bytes > 0, false, [=](World& world) { world.config.device_bytes = bytes; });
}

int fake_config_granularity(size_t bytes) {
  const bool valid = bytes >= fake::kHostPage && (bytes & (bytes - 1)) == 0;
  return configure(valid, true, [=](World& world) { world.config.granularity = bytes; });
}

int fake_config_devices(int count) {
  const bool valid = count >= 0 && count <= fake::kMaxDevices;
  return configure(valid, true, [=](World& world) { world.config.devices = count; });
}

int fake_config_poison(int on) {
  return configure(true, false, [=](World& world) { world.config.poison = on != 0; });
}

int fake_config_elide(int on) {
  return configure(true, true, [=](World& world) {
    world.config.elide = on != 0;
    world.backing.set_elide(on != 0);
  });
}

int fake_config_watchdog_ms(unsigned milliseconds) {
  return configure(milliseconds > 0, false,
                   [=](World& world) { world.config.watchdog_ms = milliseconds; });
}

int fake_config_oom_at(size_t bytes) {
  return configure(true, false, [=](World& world) {
    const std::uint64_t created = world.counters.bytes_created;
    world.oom_at = bytes > UINT64_MAX - created ? UINT64_MAX : created + bytes;
  });
}

int fake_config_stream_mode(int mode) {
  return configure(fake::valid_mode(mode), false, [=](World& world) {
    world.config.stream_mode = static_cast<Mode>(mode);
    world.streams.default_mode = world.config.stream_mode;
  });
}

int fake_fail(const char* name, uint64_t nth, int code, int count) {
  std::optional<fake::Api> api;
  const bool valid = fake::parse_name(name, &api) && nth > 0 && code > 0 && count >= -1;
  return configure(valid, false, [=](World& world) {
    world.injector.fail(api, nth, static_cast<CUresult>(code), count);
  });
}

void fake_clear_failures() {
  configure(true, false, [](World& world) { world.injector.clear_failures(); });
}

void fake_sticky(int code) {
  configure(true, false, [=](World& world) { world.injector.sticky(static_cast<CUresult>(code)); });
}

int fake_latency(const char* name, uint64_t nanoseconds) {
  std::optional<fake::Api> api;
  const bool valid = fake::parse_name(name, &api);
  return configure(valid, false, [=](World& world) { world.injector.latency(api, nanoseconds); });
}

int fake_stream_mode(CUstream stream, int mode) {
  if (!fake::valid_mode(mode)) return CUDA_ERROR_INVALID_VALUE;
  return with_stream(stream, CUDA_ERROR_INVALID_HANDLE, [=](World& world, const StreamPtr& found) {
    world.streams.set_mode(found, static_cast<Mode>(mode));
    return CUDA_SUCCESS;
  });
}

int fake_stream_hold(CUstream stream) { return fake_stream_mode(stream, FAKE_HELD); }
int fake_stream_release(CUstream stream) { return fake_stream_mode(stream, FAKE_IMMEDIATE); }

int fake_stream_step(CUstream stream, int count) {
  return with_stream(stream, -1, [=](World& world, const StreamPtr& found) {
    return world.streams.step(found, count);
  });
}

int fake_stream_pending(CUstream stream) {
  return with_stream(stream, -1, [](World&, const StreamPtr& found) {
    return static_cast<int>(found->queue.size());
  });
}

size_t fake_streams(CUstream* out, size_t count) {
  World& world = World::get();
  const Lock lock(world.mutex);
  const std::vector<CUstream> handles = world.streams.handles();
  for (std::size_t i = 0; i < handles.size() && i < count; ++i) out[i] = handles[i];
  return handles.size();
}

int fake_stream_capture(CUstream stream, int on) {
  return with_stream(stream, CUDA_ERROR_INVALID_HANDLE, [=](World&, const StreamPtr& found) {
    found->capturing = on != 0;
    return CUDA_SUCCESS;
  });
}

int fake_launch(CUstream stream, const CUdeviceptr* starts, const size_t* sizes, int count,
                const char* name) {
  if (count < 0 || (count > 0 && (!starts || !sizes))) return CUDA_ERROR_INVALID_VALUE;
  Work work{.name = fake::text("kernel '%s'", name ? name : ""),
            .ranges = {},
            .after = {},
            .run = {},
            .done = {}};
  for (int i = 0; i < count; ++i) {
    if (sizes[i] > 0) work.ranges.push_back(Range{starts[i], sizes[i]});
  }
  return with_stream(stream, CUDA_ERROR_INVALID_HANDLE, [&](World& world, const StreamPtr& found) {
    ++world.counters.launches;
    check_accessible(world, work.name, work.ranges, found->device);
    if (!found->capturing) world.streams.submit(found, std::move(work));
    return CUDA_SUCCESS;
  });
}

int fake_read(CUdeviceptr address, void* out, size_t bytes) {
  World& world = World::get();
  const Lock lock(world.mutex);
  const CUresult code = fake::check_cpu_access(world, address, bytes, false);
  if (code == CUDA_SUCCESS) std::memcpy(out, reinterpret_cast<const void*>(address), bytes);
  return code;
}

int fake_write(CUdeviceptr address, const void* in, size_t bytes) {
  World& world = World::get();
  const Lock lock(world.mutex);
  const CUresult code = fake::check_cpu_access(world, address, bytes, true);
  if (code == CUDA_SUCCESS) std::memcpy(reinterpret_cast<void*>(address), in, bytes);
  return code;
}
