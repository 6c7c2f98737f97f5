#include "stats_page.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace vattn {
namespace {

// No lock and no static with a guard: another thread may hold either when a process forks.
constinit std::atomic<StatsPage*> page_of_process{nullptr};
constinit std::atomic<bool> watches_forks{false};

void* private_memory(void* at, int more_flags) noexcept {
  return ::mmap(at, sizeof(StatsPage), PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | more_flags, -1, 0);
}

// A child must not write to its parent's page, and what it inherited does when it is destroyed: it
// finds other memory at the same addresses.
void in_forked_child() noexcept {
  StatsPage* const inherited = page_of_process.exchange(nullptr);
  if (inherited != nullptr) private_memory(inherited, MAP_FIXED);
}

// The descriptor stays open: it is what a reader finds.
void* shared_memory(int& fd) noexcept {
  void* memory = MAP_FAILED;
  fd = ::memfd_create("vattn-stats", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return memory;
  if (::ftruncate(fd, sizeof(StatsPage)) == 0) {
    memory = ::mmap(nullptr, sizeof(StatsPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  if (memory == MAP_FAILED) {
    ::close(std::exchange(fd, -1));
    return memory;
  }
  // Nobody who opens it can shorten it under us.
  ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  return memory;
}

StatsPage* make_page(int& fd) {
  void* memory = shared_memory(fd);
  if (memory == MAP_FAILED) memory = private_memory(nullptr, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* page = new (memory) StatsPage{};
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  page->version = StatsPage::kVersion;
  page->bytes = sizeof(StatsPage);
  page->pid = static_cast<std::uint64_t>(::getpid());
  page->start_ns = static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 +
                   static_cast<std::uint64_t>(now.tv_nsec);
  return page;
}

template <std::size_t N>
void set_text(char (&out)[N], std::string_view text) noexcept {
  const std::size_t n = std::min(text.size(), N - 1);
  std::copy_n(text.data(), n, out);
  out[n] = '\0';
}

}  // namespace

StatsPage& StatsPage::of_process() {
  StatsPage* page = page_of_process.load(std::memory_order_acquire);
  if (page != nullptr) return *page;
  if (!watches_forks.exchange(true)) ::pthread_atfork(nullptr, nullptr, &in_forked_child);
  int fd = -1;
  StatsPage* const made = make_page(fd);
  if (!page_of_process.compare_exchange_strong(page, made)) {  // another thread was first
    ::munmap(made, sizeof(StatsPage));
    if (fd >= 0) ::close(fd);
    return *page;
  }
  made->magic.store(kMagic, std::memory_order_release);
  return *made;
}

StatsEntry<PoolFigures> pool_entry(std::string_view driver, std::size_t page_bytes) {
  StatsEntry<PoolFigures> entry(StatsPage::of_process().pools);
  set_text(entry->name, driver);
  entry->page.store(page_bytes, std::memory_order_relaxed);
  return entry;
}

StatsEntry<AllocatorFigures> allocator_entry(std::uint32_t pool) {
  StatsEntry<AllocatorFigures> entry(StatsPage::of_process().allocators);
  entry->pool.store(pool, std::memory_order_relaxed);
  return entry;
}

StatsEntry<TagFigures> tag_entry(std::uint32_t allocator, std::string_view name) {
  StatsEntry<TagFigures> entry(StatsPage::of_process().tags);
  entry->allocator.store(allocator, std::memory_order_relaxed);
  set_text(entry->name, name);
  return entry;
}

StatsEntry<RangeFigures> range_entry(std::uint32_t tag, std::uint64_t stream, std::uint64_t kind,
                                     std::uint64_t base, std::uint64_t bytes) {
  StatsEntry<RangeFigures> entry(StatsPage::of_process().ranges);
  entry->tag.store(tag, std::memory_order_relaxed);
  entry->stream.store(stream, std::memory_order_relaxed);
  entry->kind.store(kind, std::memory_order_relaxed);
  entry->base.store(base, std::memory_order_relaxed);
  entry->reserved.store(bytes, std::memory_order_relaxed);
  return entry;
}

}  // namespace vattn
