// The physical pages of one device: how many there may be, which exist, who uses them.
//
// One pool serves everything on its device. All of its state, and that of every cache on it, is
// guarded by one device lock; functions that take a `DeviceLock` expect it held. Page creation
// ahead of need (`refill`) is the only driver work done without it; it may pass the budget by one
// batch for a moment when somebody else takes the rest of the budget meanwhile.
#pragma once

#include <functional>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "driver.h"
#include "index_set.h"
#include "stats_page.h"

namespace vattn {

// Index of a page in its pool; 0 is no page.
using PageId = std::uint32_t;
inline constexpr PageId kNoPage = 0;

using DeviceLock = std::unique_lock<std::mutex>;

// What the bytes of a page are known to be. Kernels multiply masked positions by V, and 0 x NaN is
// NaN: a page that may hold non-finite numbers of the reader's type is zeroed before it is read.
enum class Content : std::uint8_t { kZero = 0, kDirty = 1, kFinite = 2 /* + type tag */ };
inline Content finite(std::uint8_t type_tag) noexcept {
  return static_cast<Content>(static_cast<std::uint8_t>(Content::kFinite) + type_tag);
}

class PagePool;

// How far to go for pages. Each step includes those before it.
enum class Effort : std::uint8_t {
  kNone,  // only pages that nobody has: free ones and new ones
  kIdle,  // stale pages whose kernels have finished
  kKept,  // and of those, pages with content that a kept slot remembers
  kWait,  // and those whose kernels must be waited for
};

// Something that holds pages which it can do without: stale mappings of a cache.
class Reclaimer {
 public:
  virtual ~Reclaimer() = default;
  // Gives back at least `pages` pages if it can and returns how many reached the pool's free list.
  virtual std::size_t reclaim(std::size_t pages, Effort effort, DeviceLock& lock) = 0;
  // Pages that it could give and that the pool takes for live, because it uses them again without
  // the device lock: the number may have changed by the next moment, and some may have to be waited
  // for.
  virtual std::size_t idle_pages(const DeviceLock&) noexcept { return 0; }
};

// References to pages, given back to the pool on destruction. The device lock must be held then.
class PageRefs {
 public:
  PageRefs() = default;
  explicit PageRefs(PagePool& pool) : pool_(&pool) {}
  ~PageRefs() { clear(); }
  PageRefs(PageRefs&& other) noexcept : pool_(other.pool_), ids_(std::move(other.ids_)) {
    other.ids_.clear();
  }
  PageRefs& operator=(PageRefs&& other) noexcept {
    if (this != &other) {
      clear();
      pool_ = other.pool_;
      ids_ = std::move(other.ids_);
      other.ids_.clear();
    }
    return *this;
  }

  std::size_t size() const noexcept { return ids_.size(); }
  PageId operator[](std::size_t i) const noexcept { return ids_[i]; }
  void adopt(PageId id) { ids_.push_back(id); }  // takes over a reference that the caller holds
  void clear() noexcept;

 private:
  PagePool* pool_ = nullptr;
  std::vector<PageId> ids_;
};

// Pages that reclaim() must leave where they are while an operation has plans with them, though
// nobody uses them for the moment. The device lock must be held on destruction.
class PagePins {
 public:
  explicit PagePins(PagePool& pool) : pool_(pool) {}
  ~PagePins();
  PagePins(const PagePins&) = delete;
  PagePins& operator=(const PagePins&) = delete;

  void add(PageId id);

 private:
  PagePool& pool_;
  std::vector<PageId> ids_;
};

struct PoolOptions {
  std::size_t page_bytes = 0;    // 0: the driver's default
  std::size_t budget_bytes = 0;  // most physical memory that may exist at once
  std::size_t low_bytes = 0;     // fewer free bytes than this wakes the refill; 0: never
  std::size_t high_bytes = 0;    // and it creates up to this many
};

struct PoolStats {
  std::size_t page_bytes, budget_pages, created_pages, free_pages, used_pages;
  std::size_t stale_pages;  // used, but by stale mappings only
  std::size_t peak_created_pages;
  std::uint64_t pages_created_total, pages_destroyed_total;
};

class PagePool {
 public:
  PagePool(std::shared_ptr<Driver> driver, const PoolOptions& options);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  Driver& driver() const noexcept { return *driver_; }
  const std::shared_ptr<Driver>& driver_ptr() const noexcept { return driver_; }
  std::size_t page_bytes() const noexcept { return page_bytes_; }
  // Throws DriverError in a forked child, where the thread that held the lock may not exist.
  DeviceLock lock() {
    driver_->ensure_usable();
    return DeviceLock(mutex_);
  }
  // The same without waiting: it may not own the lock.
  DeviceLock try_lock() {
    driver_->ensure_usable();
    return DeviceLock(mutex_, std::try_to_lock);
  }

  // A page with one reference for each address that one will be mapped at, in that order; all or
  // none. Takes free pages first, those at home there before others, then creates within the
  // budget, then reclaims stale ones. Throws OutOfPages. `reserved` pages are stale and cannot be
  // had, because the operation has plans with them.
  PageRefs acquire(std::span<const Address> homes, DeviceLock& lock, std::size_t reserved = 0,
                   Effort most = Effort::kWait);
  // Pages that acquire() could give at most: free, creatable and stale.
  std::size_t available(const DeviceLock&) const noexcept;
  // Those of them that could be had without taking what a free slot keeps, whatever cache it is of.
  std::size_t unkept(const DeviceLock&) const noexcept;
  // Those that nobody has mapped: free and creatable.
  std::size_t unclaimed() const noexcept;

  // References and uses of one page: live, or kept by a free slot that remembers what is in it. A
  // page with references but no live use is stale, kept or not.
  void add_ref(PageId id) noexcept { ++at(id).refs; }
  void drop_ref(PageId id) noexcept;
  void pin(PageId id) noexcept { ++at(id).pins; }
  void unpin(PageId id) noexcept;
  // Whether a stale mapping of the page may be taken away in the hope of freeing it.
  bool reclaimable(PageId id) const noexcept { return users(id) == 0 && pages_[id].pins == 0; }
  void add_live(PageId id) noexcept;
  void drop_live(PageId id) noexcept;
  void add_kept(PageId id) noexcept;
  void drop_kept(PageId id) noexcept;
  std::uint32_t refs(PageId id) const noexcept { return pages_[id].refs; }
  std::uint32_t live(PageId id) const noexcept { return pages_[id].live; }
  std::uint32_t kept(PageId id) const noexcept { return pages_[id].kept; }
  // Declares that the page has two or more live uses. That is remembered until it has none: whoever
  // uses it now has used it together with somebody, who may have ended since.
  void mark_shared(PageId id) noexcept { at(id).was_shared = true; }
  // Declares that what its only user had in it is gone, and with it what it had in common with
  // others.
  void mark_own(PageId id) noexcept { at(id).was_shared = false; }
  bool was_shared(PageId id) const noexcept { return pages_[id].was_shared; }
  // Who must not see the page change: one that is about to write it and has more copies it first.
  std::uint32_t users(PageId id) const noexcept { return pages_[id].live + pages_[id].kept; }
  // Whether giving the page up would free it: one slot keeps it, and nobody uses it.
  bool kept_once(PageId id) const noexcept {
    return pages_[id].kept == 1 && pages_[id].live == 0 && pages_[id].pins == 0;
  }
  // Moves whenever a page comes to be kept once.
  std::uint64_t kept_once_changes() const noexcept { return kept_once_changes_; }
  PageHandle handle(PageId id) const noexcept { return pages_[id].handle; }
  Content content(PageId id) const noexcept { return pages_[id].content; }
  void set_content(PageId id, Content content) noexcept { at(id).content = content; }
  std::size_t page_slots() const noexcept { return pages_.size(); }  // ids are below this

  // Moves the budget. Lowering gives memory back at once as far as free and stale pages go; what
  // live sequences hold beyond it is given back as they end.
  void set_budget(std::size_t bytes);
  bool over_budget(const DeviceLock&) const noexcept { return created_ > budget_pages_; }
  // Destroys free pages beyond `keep_bytes`; returns the bytes given back.
  std::size_t trim(std::size_t keep_bytes, DeviceLock& lock);
  // Destroys pages beyond the budget, reclaiming stale ones for it.
  void settle(DeviceLock& lock, Effort most = Effort::kWait);

  // Takes stale pages from the caches into the free list, the cheapest first; returns how many
  // came.
  std::size_t reclaim(std::size_t pages, DeviceLock& lock, Effort most = Effort::kWait);

  // Creates pages ahead of need up to the high watermark. Called by the mapper's thread.
  void refill();
  // One batch of it; whether there is more to do.
  bool refill_some();
  // Called, with the lock held, when free pages fall below the low watermark.
  void on_low(std::function<void()> wake);

  void attach(Reclaimer* reclaimer);
  void detach(Reclaimer* reclaimer);

  // What other processes see of it.
  std::uint32_t figures_index() const noexcept { return figures_.index(); }

  PoolStats stats();
  PoolStats stats_locked(const DeviceLock&) const noexcept;
  void check(const DeviceLock&) const;  // throws InvariantError

 private:
  struct Page {
    PageHandle handle = 0;
    std::uint32_t refs = 0;
    std::uint32_t live = 0;
    std::uint32_t kept = 0;
    std::uint32_t pins = 0;
    Content content = Content::kDirty;
    bool exists = false;
    bool was_shared = false;
  };

  Page& at(PageId id) noexcept { return pages_[id]; }
  void find_more(std::span<const Address> homes, DeviceLock& lock, Effort most);
  std::size_t live_pages(const DeviceLock& lock) const noexcept;
  PageId free_at_home(Address home) const;
  void take_at_home(std::span<const Address> homes, std::vector<PageId>& taken);
  void create_pages(std::span<const Address> homes);
  void add_pages(std::span<const PageHandle> handles);
  std::size_t destroy_free(std::size_t n);
  void wake_if_low();
  // After each change of how many pages exist, are free or are stale.
  void publish() noexcept;
  void count_refusal(Effort most) noexcept;
  [[noreturn]] void throw_out_of_pages(std::size_t wanted, std::size_t reserved,
                                       const DeviceLock& lock) const;

  const std::shared_ptr<Driver> driver_;
  const std::size_t page_bytes_;
  const std::size_t low_pages_, high_pages_;

  std::mutex mutex_;
  std::size_t budget_pages_;
  std::size_t created_ = 0;  // pages that exist
  std::size_t stale_ = 0;
  std::size_t kept_stale_ = 0;  // of them, those that somebody keeps
  std::uint64_t kept_once_changes_ = 1;
  std::size_t peak_created_ = 0;
  std::uint64_t created_total_ = 0, destroyed_total_ = 0;
  std::vector<Page> pages_;
  std::unordered_map<PageHandle, PageId> by_handle_;
  IndexSet free_;    // exist, unreferenced
  IndexSet vacant_;  // ids without a page
  std::vector<Reclaimer*> reclaimers_;
  std::function<void()> wake_;
  StatsEntry<PoolFigures> figures_;
};

}  // namespace vattn
