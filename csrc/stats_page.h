// Figures of this process that another one can read while it runs: a page of memory behind a memfd,
// which a reader finds among the process's open files. Nothing is left over when the process dies.
// The figures live here and nowhere else, so that they cost one store each and are never out of
// date; a reader may see two of them a moment apart. vattn/allocator/figures_page.py reads them: a
// change of what follows needs a new version there and here.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

namespace vattn {

using Figure = std::atomic<std::uint64_t>;
static_assert(Figure::is_always_lock_free && sizeof(Figure) == 8);

inline constexpr std::uint32_t kNoEntry = ~std::uint32_t{0};  // an index of an entry: none is shown
inline constexpr std::size_t kStatsLine = 64;  // entries of different threads share no cache line

enum class EntryState : std::uint32_t { kVacant = 0, kTaken = 1, kShown = 2 };

// A pool of pages. Bytes.
struct alignas(kStatsLine) PoolFigures {
  std::atomic<EntryState> entry;
  std::uint32_t unused;
  char name[24];  // of its driver
  Figure page;
  Figure budget;
  Figure created;
  Figure peak_created;
  Figure free;
  Figure stale;    // held by sequences and kept prefixes that can be evicted
  Figure refused;  // requests for pages that it could not meet, whoever knew a way out
};

// A caching allocator.
struct alignas(kStatsLine) AllocatorFigures {
  std::atomic<EntryState> entry;
  std::atomic<std::uint32_t> pool;  // index of its PoolFigures
  Figure mapped;                    // bytes
  Figure idle_pages;                // of them in whole pages of free blocks: others can have them
  Figure limit;                     // bytes; 0: none
  Figure out_of_memory;             // errors so far
};

// A tag of an allocator: what is apart from the rest. Bytes.
struct alignas(kStatsLine) TagFigures {
  std::atomic<EntryState> entry;
  std::atomic<std::uint32_t> allocator;  // index of its AllocatorFigures
  char name[56];
  std::atomic<std::uint32_t> state;  // 0 in use, 1 paused, 2 graph pool
  std::uint32_t unused;
  Figure live;  // blocks, each rounded up to 512
  Figure peak_live;
  Figure blocks;       // that are live
  Figure mapped;       // physical memory
  Figure budget;       // 0: none
  Figure allocations;  // since the start
};

// One range of addresses of a tag. Bytes.
struct alignas(kStatsLine) RangeFigures {
  std::atomic<EntryState> entry;
  std::atomic<std::uint32_t> tag;  // index of its TagFigures
  Figure base;
  Figure stream;
  Figure kind;  // 0 for small requests, 1 for large ones
  Figure reserved;
  Figure mapped;
};

// An entry of a table, given back on destruction. When all are taken it is memory that nobody is
// shown: whoever has one counts in it all the same.
template <typename T>
class StatsEntry {
 public:
  StatsEntry() = default;
  explicit StatsEntry(std::span<T> table) {
    for (T& each : table) {
      EntryState vacant = EntryState::kVacant;
      if (!each.entry.compare_exchange_strong(vacant, EntryState::kTaken)) continue;
      // What the one before left. Readers skip an entry that is not shown.
      std::memset(reinterpret_cast<std::byte*>(&each) + sizeof each.entry, 0,
                  sizeof(T) - sizeof each.entry);
      entry_ = &each;
      index_ = static_cast<std::uint32_t>(&each - table.data());
      return;
    }
    unseen_ = std::make_unique<T>();
    entry_ = unseen_.get();
  }
  ~StatsEntry() { give_back(); }
  StatsEntry(StatsEntry&& other) noexcept
      : entry_(std::exchange(other.entry_, nullptr)),
        index_(std::exchange(other.index_, kNoEntry)),
        unseen_(std::move(other.unseen_)) {}
  StatsEntry& operator=(StatsEntry&& other) noexcept {
    if (this != &other) {
      give_back();
      entry_ = std::exchange(other.entry_, nullptr);
      index_ = std::exchange(other.index_, kNoEntry);
      unseen_ = std::move(other.unseen_);
    }
    return *this;
  }

  T* operator->() const noexcept { return entry_; }
  T& operator*() const noexcept { return *entry_; }
  // In its table, kNoEntry if it is in none.
  std::uint32_t index() const noexcept { return index_; }
  // From now on readers see it.
  void show() noexcept { entry_->entry.store(EntryState::kShown, std::memory_order_release); }

 private:
  void give_back() noexcept {
    if (entry_ != nullptr) entry_->entry.store(EntryState::kVacant, std::memory_order_release);
  }

  T* entry_ = nullptr;
  std::uint32_t index_ = kNoEntry;
  std::unique_ptr<T> unseen_;
};

struct alignas(kStatsLine) StatsPage {
  static constexpr std::uint64_t kMagic = 0x31746174736e7476;  // "vtnstat1"
  static constexpr std::uint32_t kVersion = 1;
  static constexpr std::size_t kPools = 16, kAllocators = 16, kTags = 64, kRanges = 256;

  std::atomic<std::uint64_t> magic;  // written last
  std::uint32_t version;
  std::uint32_t bytes;
  std::uint64_t pid;       // a child that inherits the file is not this process
  std::uint64_t start_ns;  // CLOCK_REALTIME
  PoolFigures pools[kPools];
  AllocatorFigures allocators[kAllocators];
  TagFigures tags[kTags];
  RangeFigures ranges[kRanges];

  // This process's page, made on first use; memory that nobody else sees where there is no memfd.
  // A forked child gets one of its own, and what it inherited writes to a copy.
  static StatsPage& of_process();
};

// Entries with what stays the same filled in; the caller shows them.
StatsEntry<PoolFigures> pool_entry(std::string_view driver, std::size_t page_bytes);
StatsEntry<AllocatorFigures> allocator_entry(std::uint32_t pool);
StatsEntry<TagFigures> tag_entry(std::uint32_t allocator, std::string_view name);
StatsEntry<RangeFigures> range_entry(std::uint32_t tag, std::uint64_t stream, std::uint64_t kind,
                                     std::uint64_t base, std::uint64_t bytes);

}  // namespace vattn
