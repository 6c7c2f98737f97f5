// The control API's results: violations, leaks, counts; and the report at exit.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "control.h"
#include "state.h"

namespace fake {
namespace {

std::string join(const std::vector<std::string>& lines) {
  std::string joined;
  for (const std::string& line : lines) joined += (joined.empty() ? "" : "\n") + line;
  return joined;
}

std::size_t give(const std::string& text, char* buffer, std::size_t size) {
  if (size > 0) {
    const std::size_t length = std::min(text.size(), size - 1);
    std::memcpy(buffer, text.data(), length);
    buffer[length] = '\0';
  }
  return text.size();
}

// For programs that a test runs as a whole: FAKE_CUDA_REPORT names a file that gets one line per
// violation and per leak when the process ends, so that an empty file means a clean run.
__attribute__((destructor)) void report_at_exit() {
  const char* path = std::getenv("FAKE_CUDA_REPORT");
  if (!path) return;
  World& world = World::get();
  const Lock lock(world.mutex);
  std::FILE* file = std::fopen(path, "w");
  if (!file) {
    std::fprintf(stderr, "fake_cuda: cannot write FAKE_CUDA_REPORT=%s\n", path);
    return;
  }
  for (const std::string& line : world.violations) {
    std::fprintf(file, "violation: %s\n", line.c_str());
  }
  for (const std::string& line : world.leaks()) std::fprintf(file, "leak: %s\n", line.c_str());
  std::fclose(file);
}

}  // namespace
}  // namespace fake

using fake::Lock, fake::World;

size_t fake_reset(char* buffer, size_t size) {
  World& world = World::get();
  const Lock lock(world.mutex);
  const std::string leaks = fake::join(world.leaks());
  world.reset();
  return fake::give(leaks, buffer, size);
}

size_t fake_violations(char* buffer, size_t size) {
  World& world = World::get();
  const Lock lock(world.mutex);
  return fake::give(fake::join(world.violations), buffer, size);
}

void fake_clear_violations() {
  World& world = World::get();
  const Lock lock(world.mutex);
  world.violations.clear();
}

size_t fake_check_leaks(char* buffer, size_t size) {
  World& world = World::get();
  const Lock lock(world.mutex);
  return fake::give(fake::join(world.leaks()), buffer, size);
}

int64_t fake_calls(const char* name) {
  World& world = World::get();
  const Lock lock(world.mutex);
  if (!name) return static_cast<int64_t>(world.injector.total_calls());
  for (std::size_t i = 0; i < fake::kApis; ++i) {
    if (std::strcmp(name, fake::kApiNames[i]) == 0) {
      return static_cast<int64_t>(world.injector.calls(static_cast<fake::Api>(i)));
    }
  }
  return -1;
}

size_t fake_call_names(char* buffer, size_t size) {
  return fake::give(fake::join({fake::kApiNames.begin(), fake::kApiNames.end()}), buffer, size);
}

void fake_reset_calls() {
  World& world = World::get();
  const Lock lock(world.mutex);
  world.injector.reset_calls();
}

void fake_get_stats(fake_stats* out) {
  World& world = World::get();
  const Lock lock(world.mutex);
  const fake::Counters& counters = world.counters;
  *out = {};
  out->bytes_live = world.bytes_live();
  out->bytes_peak = counters.bytes_peak;
  out->bytes_created = counters.bytes_created;
  out->handles_live = world.handles.size();
  out->handles_peak = counters.handles_peak;
  out->mappings_live = world.mappings.size();
  out->mappings_peak = counters.mappings_peak;
  out->reservations_live = world.reservations.size();
  for (const auto& [base, reservation] : world.reservations) {
    out->reserved_bytes += reservation.size;
  }
  out->host_allocs_live = world.host_allocations.size();
  out->streams_live = world.streams.created();
  out->events_live = world.streams.events();
  for (const fake::Device& device : world.devices) {
    out->contexts_retained += static_cast<std::uint64_t>(device.retains);
  }
  out->work_pending = world.streams.pending();
  out->launches = counters.launches;
  out->copies = counters.copies;
  out->copied_bytes = counters.copied_bytes;
  out->memsets = counters.memsets;
  out->memset_bytes = counters.memset_bytes;
  out->access_regrants = counters.access_regrants;
  out->failures_injected = world.injector.failures();
  out->violations = world.violations.size();
  out->physical_bytes = world.backing.physical_bytes();
}
