// One reserved virtual range that holds the K and V of some layers for all slots, with the table of
// which page is mapped where, and the transaction that changes it.
//
// A slot's stretch of a region is `runs` runs of `pages_per_run` pages each. In a run, tokens are
// evenly spaced, `token_bytes` apart. An entry of the table is addressed by (slot, index), where
// index = run * pages_per_run + page.
#pragma once

#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "page_pool.h"

namespace vattn {

struct RegionSpec {
  std::uint32_t runs = 1;           // per slot
  std::size_t token_bytes = 0;      // from one token of a run to the next
  std::size_t capacity_tokens = 0;  // of a run; capacity_tokens * token_bytes is whole pages
  std::size_t window_tokens = 0;    // 0: every token stays; else only those a query can reach
  std::uint8_t type_tag = 0;        // element type, for what a page is known to hold
};

// Owns reserved addresses; tensors over a region keep it alive after the cache is gone.
class Reservation {
 public:
  Reservation(std::shared_ptr<Driver> driver, std::size_t bytes, std::size_t alignment)
      : driver_(std::move(driver)), bytes_(bytes), base_(driver_->reserve(bytes, alignment)) {}
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  Address base() const noexcept { return base_; }
  std::size_t bytes() const noexcept { return bytes_; }
  DlpackDevice dlpack_device() const noexcept { return driver_->dlpack_device(); }

 private:
  std::shared_ptr<Driver> driver_;
  std::size_t bytes_;
  Address base_;
};

// Pages [begin, end) of each run of one slot: those in use. What is mapped outside is stale.
struct PageWindow {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
  std::uint32_t size() const noexcept { return end - begin; }
  bool contains(std::uint32_t page) const noexcept { return begin <= page && page < end; }
  bool operator==(const PageWindow&) const = default;
};

class Region {
 public:
  Region(PagePool& pool, const RegionSpec& spec, std::uint32_t slots);
  ~Region();
  Region(Region&&) = default;
  Region& operator=(Region&&) = delete;

  const RegionSpec& spec() const noexcept { return spec_; }
  std::uint32_t slots() const noexcept { return static_cast<std::uint32_t>(windows_.size()); }
  std::uint32_t pages_per_run() const noexcept { return pages_per_run_; }
  std::uint32_t entries_per_slot() const noexcept { return spec_.runs * pages_per_run_; }
  std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  const std::shared_ptr<Reservation>& reservation() const noexcept { return reservation_; }

  Address address(std::uint32_t slot, std::uint32_t index) const noexcept {
    return reservation_->base() + slot * slot_bytes_ + std::size_t{index} * page_bytes_;
  }
  PageId at(std::uint32_t slot, std::uint32_t index) const noexcept {
    return table_[std::size_t{slot} * entries_per_slot() + index];
  }
  // Whether the entry is in the window and was mapped already when it came into it: its page served
  // another sequence before, and went over where it was.
  bool recycled(std::uint32_t slot, std::uint32_t index) const noexcept {
    return recycled_[std::size_t{slot} * entries_per_slot() + index] != 0;
  }
  // Pages of a run at or above this index are not mapped in `slot`.
  std::uint32_t top(std::uint32_t slot) const noexcept { return tops_[slot]; }
  std::uint32_t mapped(std::uint32_t slot) const noexcept { return mapped_[slot]; }
  PageWindow window(std::uint32_t slot) const noexcept { return windows_[slot]; }
  // Pages of each run whose content the slot remembers while it is free. All of them are mapped.
  PageWindow kept(std::uint32_t slot) const noexcept { return kept_[slot]; }
  // Mapped entries that are neither in use nor kept.
  std::uint32_t idle(std::uint32_t slot) const noexcept {
    return mapped_[slot] - live_[slot] - spec_.runs * kept_[slot].size();
  }

  // Moves the window and declares pages live or stale accordingly. Entries of the new window that
  // are not mapped yet are left for Remap::commit().
  void set_window(std::uint32_t slot, PageWindow window);
  // Pre: every entry of the new window is mapped.
  void set_kept(std::uint32_t slot, PageWindow kept);
  // Whether a reader of the region's type can stand what the page holds, whatever it is.
  bool safe(PageId page) const noexcept;
  // Zeroes what the slot takes over as it is from byte `from` of each run on, where that is not
  // safe to read: pages that came into the window, and those of `before` beyond its own tokens.
  void clean_adopted(std::uint32_t slot, PageWindow before, std::size_t from, Stream stream);
  // Unmaps idle entries [first, first + n) of one run, all of them mapped, and gives up their
  // pages. Returns how many pages became free.
  std::size_t unmap_stale(std::uint32_t slot, std::uint32_t first, std::uint32_t n);

 private:
  friend class Remap;
  struct Free {
    void operator()(void* table) const noexcept { std::free(table); }
  };
  // Calls act(index, page) for the mapped entries that are in window `in` and not in `out`.
  template <typename Act>
  void for_difference(std::uint32_t slot, PageWindow in, PageWindow out, Act act);
  void set_recycled(std::uint32_t slot, std::uint32_t index, bool recycled) noexcept {
    recycled_[std::size_t{slot} * entries_per_slot() + index] = recycled;
  }
  // Stores `page` and moves the references; the window decides what is live.
  void store(std::uint32_t slot, std::uint32_t index, PageId page);
  void lower_top(std::uint32_t slot) noexcept;
  void abandon(std::uint32_t slot, std::uint32_t index) noexcept;

  PagePool* pool_;
  RegionSpec spec_;
  std::size_t page_bytes_;
  std::uint32_t pages_per_run_;
  std::size_t slot_bytes_;
  std::shared_ptr<Reservation> reservation_;
  std::unique_ptr<PageId[], Free> table_;           // zeroed by the kernel on first touch: sparse
  std::unique_ptr<std::uint8_t[], Free> recycled_;  // as sparse
  std::vector<PageWindow> windows_;
  std::vector<PageWindow> kept_;
  std::vector<std::uint32_t> tops_;
  std::vector<std::uint32_t> mapped_;
  std::vector<std::uint32_t> live_;  // mapped entries inside the window
};

// A set of changes to mapping tables that happens as a whole: execute() makes the driver calls and
// undoes them if one fails; commit() then changes tables and references. Destruction after
// execute() without commit() undoes it too.
class Remap {
 public:
  // `lost` is set when a driver call failed and undoing failed as well, or cannot help (a fatal
  // error): tables and mappings no longer agree.
  Remap(PagePool& pool, bool& lost) : pool_(pool), lost_(lost) {}
  ~Remap();
  Remap(const Remap&) = delete;
  Remap& operator=(const Remap&) = delete;

  // `page` will be mapped at the entry, in place of what is there now; kNoPage only unmaps. A fresh
  // page holds nothing that anybody wants; others are shared as they are.
  enum class Use : std::uint8_t { kFresh, kShared };
  void set(Region& region, std::uint32_t slot, std::uint32_t index, PageId page,
           Use use = Use::kFresh);
  bool empty() const noexcept { return changes_.empty(); }
  bool unmaps() const noexcept { return unmaps_; }

  void execute();
  // Makes what the fresh pages hold safe for readers of the region's type. After execute(). Work
  // that touches the new mappings may follow on the same stream; undoing waits for it.
  void clean(Stream stream);
  void commit();

 private:
  struct Change {
    Region* region;
    std::uint32_t slot, index;
    PageId old_page, new_page;
    Use use;
    Address address() const noexcept { return region->address(slot, index); }
  };

  // Calls visit(first, last) for each stretch of neighbouring addresses among the first `limit`
  // changes whose page `side` is set.
  template <typename Visit>
  void for_ranges(PageId Change::* side, std::size_t limit, Visit visit);
  void map_range(PageId Change::* side, std::size_t first, std::size_t last);
  void unmap_range(std::size_t first, std::size_t last);
  void undo() noexcept;

  PagePool& pool_;
  std::vector<Change> changes_;
  std::size_t unmapped_ = 0, mapped_ = 0;  // how far execute() came, in changes
  std::optional<Stream> stream_;           // where work on the new mappings was submitted
  bool unmaps_ = false;
  bool pending_ = false;
  bool& lost_;
};

}  // namespace vattn
