#include "submit.h"

#include <algorithm>
#include <chrono>

#include "text.h"

namespace fake {

StreamPtr find_stream(World& world, CUstream handle, bool even_destroyed) {
  return world.streams.find(handle, std::max(world.current_device(), 0), even_destroyed);
}

bool check_accessible(World& world, const std::string& name, const std::vector<Range>& ranges,
                      int device, bool write) {
  bool good = true;
  for (const Range& range : ranges) {
    const std::string wrong = world.inaccessible(range, device, write);
    if (wrong.empty()) continue;
    world.violate(text("%s uses [0x%llx, +%zu) but %s", name.c_str(), range.start, range.size,
                       wrong.c_str()));
    good = false;
  }
  return good;
}

CUresult block(World& world, Lock& lock, const std::vector<MarkPtr>& marks, const char* call) {
  const std::uint64_t generation = world.generation;
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(world.config.watchdog_ms);
  while (true) {
    for (const MarkPtr& mark : marks) world.streams.force(mark);
    if (world.generation != generation) return CUDA_ERROR_DEINITIALIZED;
    if (std::all_of(marks.begin(), marks.end(), [](const MarkPtr& m) { return m->done; })) {
      return CUDA_SUCCESS;
    }
    if (std::chrono::steady_clock::now() >= deadline) {
      world.violate(text("deadlock: %s blocked for %u ms on work that nobody let finish", call,
                         world.config.watchdog_ms));
      return CUDA_ERROR_LAUNCH_TIMEOUT;
    }
    world.streams.changed.wait_until(lock, deadline);
  }
}

}  // namespace fake
