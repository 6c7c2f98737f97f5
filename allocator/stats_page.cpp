#include "stats_page.h"

#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>

namespace vattn {
namespace {

StatsPage* make_page() {
  void* memory = MAP_FAILED;
  const int fd = ::memfd_create("vattn-stats", MFD_CLOEXEC);
  if (fd >= 0 && ::ftruncate(fd, sizeof(StatsPage)) == 0) {
    memory = ::mmap(nullptr, sizeof(StatsPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  // The descriptor stays open: it is what a reader finds.
  if (memory == MAP_FAILED) {
    memory = ::mmap(nullptr, sizeof(StatsPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                    -1, 0);
  }
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* page = new (memory) StatsPage{};
  for (PoolFigures& each : page->pools) each.device.store(-1);
  for (TagFigures& each : page->tags) each.device.store(-1);
  for (RangeFigures& each : page->ranges) each.device.store(-1);
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  page->version = 1;
  page->bytes = sizeof(StatsPage);
  page->pid = static_cast<std::uint64_t>(::getpid());
  page->start_ns = static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 +
                   static_cast<std::uint64_t>(now.tv_nsec);
  std::atomic_thread_fence(std::memory_order_release);
  page->magic = StatsPage::kMagic;
  return page;
}

std::mutex& entries_mutex() {
  static std::mutex* const mutex = new std::mutex;
  return *mutex;
}

}  // namespace

StatsPage& StatsPage::of_process() {
  static StatsPage* const page = make_page();
  return *page;
}

TagFigures& StatsPage::add_tag(int device, std::string_view name) {
  static TagFigures* const nobodys = new TagFigures{};
  const std::lock_guard guard(entries_mutex());
  for (TagFigures& entry : tags) {
    if (entry.device.load() != -1) continue;
    const std::size_t n = std::min(name.size(), sizeof entry.name - 1);
    std::memset(entry.name, 0, sizeof entry.name);
    std::memcpy(entry.name, name.data(), n);
    for (Figure* figure : {&entry.live, &entry.peak_live, &entry.blocks, &entry.mapped,
                           &entry.budget, &entry.allocations}) {
      figure->store(0);
    }
    entry.state.store(0);
    entry.device.store(device);
    return entry;
  }
  return *nobodys;
}

RangeFigures& StatsPage::add_range(int device) {
  static RangeFigures* const nobodys = new RangeFigures{};
  const std::lock_guard guard(entries_mutex());
  for (RangeFigures& entry : ranges) {
    if (entry.device.load() != -1) continue;
    for (Figure* figure : {&entry.base, &entry.stream, &entry.reserved, &entry.mapped}) {
      figure->store(0);
    }
    entry.device.store(device);
    return entry;
  }
  return *nobodys;
}

PoolFigures& StatsPage::pool(int device) {
  static PoolFigures* const nobodys = new PoolFigures{};
  const std::lock_guard guard(entries_mutex());
  for (PoolFigures& entry : pools) {
    if (entry.device.load() == device) return entry;
  }
  for (PoolFigures& entry : pools) {
    if (entry.device.load() != -1) continue;
    entry.device.store(device);
    return entry;
  }
  return *nobodys;
}

}  // namespace vattn
