#include "region.h"

#include <algorithm>
#include <bit>
#include <new>
#include <string>

namespace vattn {

Reservation::~Reservation() {
  if (!driver_->usable()) return;
  for (int tries = 2; tries > 0; --tries) {
    try {
      driver_->release(base_, bytes_);
      return;
    } catch (const std::exception&) {
      // Nobody to tell. Refused twice, the addresses stay reserved until the process ends.
    }
  }
}

Region::Region(PagePool& pool, const RegionSpec& spec, std::uint32_t slots)
    : pool_(&pool), spec_(spec), page_bytes_(pool.page_bytes()) {
  const std::size_t run_bytes = spec.capacity_tokens * spec.token_bytes;
  if (spec.runs == 0 || slots == 0 || run_bytes == 0 || run_bytes % page_bytes_ != 0) {
    throw std::invalid_argument("a region of " + std::to_string(spec.runs) + " runs of " +
                                std::to_string(run_bytes) + " bytes for " + std::to_string(slots) +
                                " slots: each must be positive and a run whole pages of " +
                                std::to_string(page_bytes_) + " bytes");
  }
  pages_per_run_ = static_cast<std::uint32_t>(run_bytes / page_bytes_);
  slot_bytes_ = run_bytes * spec.runs;
  const std::size_t alignment = std::bit_ceil(std::max(page_bytes_, pool.driver().granularity()));
  reservation_ = std::make_shared<Reservation>(pool.driver_ptr(), slot_bytes_ * slots, alignment);
  table_.reset(
      static_cast<PageId*>(std::calloc(std::size_t{slots} * entries_per_slot(), sizeof(PageId))));
  recycled_.reset(
      static_cast<std::uint8_t*>(std::calloc(std::size_t{slots} * entries_per_slot(), 1)));
  if (!table_ || !recycled_) throw std::bad_alloc();
  windows_.resize(slots);
  kept_.resize(slots);
  tops_.resize(slots);
  mapped_.resize(slots);
  live_.resize(slots);
}

Region::~Region() {
  if (!table_ || !pool_->driver().usable()) return;
  for (std::uint32_t slot = 0; slot < slots(); ++slot) {
    set_window(slot, {});
    set_kept(slot, {});
    for (std::uint32_t run = 0; run < spec_.runs; ++run) {
      const std::uint32_t first = run * pages_per_run_;
      for (std::uint32_t i = 0; i < tops_[slot];) {
        std::uint32_t n = 0;
        while (i + n < tops_[slot] && at(slot, first + i + n) != kNoPage) ++n;
        for (int tries = 2; n > 0 && tries > 0; --tries) {
          try {
            unmap_stale(slot, first + i, n);
            break;
          } catch (const std::exception&) {
            // Tried once more, then page by page.
          }
        }
        for (std::uint32_t j = first + i; j < first + i + n; ++j) abandon(slot, j);
        i += n + 1;
      }
    }
  }
}

// The region ends, and nobody will use its addresses again. After a change that could not be undone
// an entry may not be mapped, and a driver that refuses three times is gone: the pool has its page
// back.
void Region::abandon(std::uint32_t slot, std::uint32_t index) noexcept {
  if (at(slot, index) == kNoPage) return;
  try {
    unmap_stale(slot, index, 1);
  } catch (const std::exception&) {
    store(slot, index, kNoPage);
  }
}

bool Region::safe(PageId page) const noexcept {
  const Content content = pool_->content(page);
  return content == Content::kZero || content == finite(spec_.type_tag);
}

void Region::clean_adopted(std::uint32_t slot, PageWindow before, std::size_t from, Stream stream) {
  const PageWindow now = windows_[slot];
  const auto first = static_cast<std::uint32_t>(from / page_bytes_);
  for (std::uint32_t run = 0; run < spec_.runs; ++run) {
    for (std::uint32_t p = std::max(first, now.begin); p < now.end; ++p) {
      const std::uint32_t index = run * pages_per_run_ + p;
      const PageId id = at(slot, index);
      if (id == kNoPage || pool_->users(id) > 1 || safe(id)) continue;
      // Of a page that the slot's own tokens begin, only the rest.
      const std::size_t kept = before.contains(p) && p == first ? from % page_bytes_ : 0;
      pool_->driver().fill(address(slot, index) + kept, 0, page_bytes_ - kept, stream);
      if (kept == 0) pool_->set_content(id, finite(spec_.type_tag));
    }
  }
}

template <typename Act>
void Region::for_difference(std::uint32_t slot, PageWindow in, PageWindow out, Act act) {
  for (std::uint32_t run = 0; run < spec_.runs; ++run) {
    for (std::uint32_t p = in.begin; p < in.end; ++p) {
      if (out.contains(p)) p = out.end;
      if (p >= in.end) break;
      const std::uint32_t index = run * pages_per_run_ + p;
      if (const PageId id = at(slot, index); id != kNoPage) act(index, id);
    }
  }
}

// Both add the new uses first: a page in both windows must not pass through zero uses.
void Region::set_window(std::uint32_t slot, PageWindow window) {
  const PageWindow old = windows_[slot];
  if (old == window) return;
  for_difference(slot, window, old, [&](std::uint32_t index, PageId id) {
    set_recycled(slot, index, true);
    pool_->add_live(id);
    ++live_[slot];
  });
  for_difference(slot, old, window, [&](std::uint32_t index, PageId id) {
    set_recycled(slot, index, false);
    pool_->drop_live(id);
    --live_[slot];
  });
  windows_[slot] = window;
}

void Region::set_kept(std::uint32_t slot, PageWindow kept) {
  const PageWindow old = kept_[slot];
  if (old == kept) return;
  for_difference(slot, kept, old, [&](std::uint32_t, PageId id) { pool_->add_kept(id); });
  for_difference(slot, old, kept, [&](std::uint32_t, PageId id) { pool_->drop_kept(id); });
  kept_[slot] = kept;
}

void Region::store(std::uint32_t slot, std::uint32_t index, PageId page) {
  PageId& entry = table_[std::size_t{slot} * entries_per_slot() + index];
  const std::uint32_t p = index % pages_per_run_;
  const bool live = windows_[slot].contains(p);
  if (page != kNoPage) {
    pool_->add_ref(page);
    if (live) pool_->add_live(page);
    tops_[slot] = std::max(tops_[slot], p + 1);
    ++mapped_[slot];
    live_[slot] += live;
  }
  const PageId old = entry;
  entry = page;
  set_recycled(slot, index, false);
  if (old != kNoPage) {
    if (live) pool_->drop_live(old);
    pool_->drop_ref(old);
    --mapped_[slot];
    live_[slot] -= live;
  }
}

void Region::lower_top(std::uint32_t slot) noexcept {
  for (std::uint32_t& top = tops_[slot]; top > windows_[slot].end; --top) {
    for (std::uint32_t run = 0; run < spec_.runs; ++run) {
      if (at(slot, run * pages_per_run_ + top - 1) != kNoPage) return;
    }
  }
}

std::size_t Region::unmap_stale(std::uint32_t slot, std::uint32_t first, std::uint32_t n) {
  pool_->driver().unmap(address(slot, first), std::size_t{n} * page_bytes_);
  std::size_t freed = 0;
  for (std::uint32_t i = first; i < first + n; ++i) {
    freed += pool_->refs(at(slot, i)) == 1;
    store(slot, i, kNoPage);
  }
  lower_top(slot);
  return freed;
}

// Remap ------------------------------------------------------------------------------------------

Remap::~Remap() {
  if (pending_) undo();
}

void Remap::set(Region& region, std::uint32_t slot, std::uint32_t index, PageId page, Use use) {
  const PageId old = region.at(slot, index);
  if (old == page) return;
  unmaps_ = unmaps_ || old != kNoPage;
  changes_.push_back({&region, slot, index, old, page, use});
}

template <typename Visit>
void Remap::for_ranges(PageId Change::* side, std::size_t limit, Visit visit) {
  for (std::size_t i = 0; i < limit;) {
    std::size_t last = i + 1;
    if (changes_[i].*side != kNoPage) {
      while (last < limit && changes_[last].*side != kNoPage &&
             changes_[last].region == changes_[i].region &&
             changes_[last].address() == changes_[last - 1].address() + pool_.page_bytes()) {
        ++last;
      }
      visit(i, last);
    }
    i = last;
  }
}

void Remap::map_range(PageId Change::* side, std::size_t first, std::size_t last) {
  std::vector<PageHandle> handles;
  handles.reserve(last - first);
  for (std::size_t i = first; i < last; ++i) handles.push_back(pool_.handle(changes_[i].*side));
  const Address base = changes_[first].address();
  pool_.driver().map(base, handles, pool_.page_bytes());
  try {
    pool_.driver().set_access(base, handles.size() * pool_.page_bytes());
  } catch (const DriverError& error) {
    if (!error.fatal()) unmap_range(first, last);
    throw;
  } catch (const OutOfPages&) {
    unmap_range(first, last);
    throw;
  }
}

void Remap::unmap_range(std::size_t first, std::size_t last) {
  pool_.driver().unmap(changes_[first].address(), (last - first) * pool_.page_bytes());
}

void Remap::execute() {
  std::sort(changes_.begin(), changes_.end(),
            [](const Change& a, const Change& b) { return a.address() < b.address(); });
  pending_ = true;
  try {
    for_ranges(&Change::old_page, changes_.size(), [&](std::size_t first, std::size_t last) {
      unmap_range(first, last);
      unmapped_ = last;
    });
    for_ranges(&Change::new_page, changes_.size(), [&](std::size_t first, std::size_t last) {
      map_range(&Change::new_page, first, last);
      mapped_ = last;
    });
  } catch (const DriverError& error) {
    lost_ = lost_ || error.fatal();
    undo();
    throw;
  } catch (...) {
    undo();
    throw;
  }
}

void Remap::undo() noexcept {
  pending_ = false;
  if (lost_) return;
  try {
    if (stream_) Fence(pool_.driver_ptr(), *stream_).wait();
    for_ranges(&Change::new_page, mapped_,
               [&](std::size_t first, std::size_t last) { unmap_range(first, last); });
    for_ranges(&Change::old_page, unmapped_, [&](std::size_t first, std::size_t last) {
      map_range(&Change::old_page, first, last);
    });
  } catch (...) {
    lost_ = true;
  }
}

void Remap::clean(Stream stream) {
  stream_ = stream;
  const auto safe = [&](const Change& change) {
    return change.use == Use::kShared || change.region->safe(change.new_page);
  };
  for_ranges(&Change::new_page, changes_.size(), [&](std::size_t first, std::size_t last) {
    for (std::size_t i = first; i < last;) {
      std::size_t n = 0;
      while (i + n < last && !safe(changes_[i + n])) ++n;
      if (n > 0) {
        pool_.driver().fill(changes_[i].address(), 0, n * pool_.page_bytes(), stream);
      }
      i += n > 0 ? n : 1;
    }
  });
}

void Remap::commit() {
  pending_ = false;
  // References of all new pages before any old one is dropped: a page may move between entries.
  for (const Change& change : changes_) {
    if (change.new_page != kNoPage) pool_.add_ref(change.new_page);
  }
  for (const Change& change : changes_) {
    change.region->store(change.slot, change.index, change.new_page);
    if (change.new_page != kNoPage && change.use == Use::kFresh) {
      pool_.set_content(change.new_page, finite(change.region->spec().type_tag));
    }
  }
  for (const Change& change : changes_) {
    if (change.new_page != kNoPage) pool_.drop_ref(change.new_page);
  }
}

}  // namespace vattn
