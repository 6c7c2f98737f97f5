// Giving pages back: what nobody uses first, then what free slots keep.
#include <algorithm>

#include "slots.h"

namespace vattn {

// Unmaps up to `limit` idle pages of a slot, from the end of each run, whole stretches at a time.
std::size_t SlotSpace::drop_stale(std::uint32_t slot, std::size_t limit, Stale which) {
  std::size_t freed = 0;
  bool waited = false;
  for (Region& region : regions_) {
    if (region.idle(slot) == 0) continue;
    const PageWindow window = region.window(slot), kept = region.kept(slot);
    const auto droppable = [&](std::uint32_t run, std::uint32_t p) {
      const PageId id = region.at(slot, run * region.pages_per_run() + p);
      if (id == kNoPage || window.contains(p) || kept.contains(p)) return false;
      if (which == Stale::kSole && pool_->refs(id) > 1) return false;
      return which == Stale::kAll || pool_->reclaimable(id);
    };
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t end = region.top(slot); end > 0 && freed < limit;) {
        std::uint32_t n = 0;
        while (n < end && freed + n < limit && droppable(run, end - n - 1)) ++n;
        if (n > 0) {
          if (!waited) before_unmap(slots_[slot]);
          waited = true;
          freed += region.unmap_stale(slot, run * region.pages_per_run() + end - n, n);
        }
        end -= std::min(end, n + 1);
      }
    }
  }
  totals_.pages_reclaimed += freed;
  return freed;
}

// Pages that nobody uses and no slot keeps. Longest released first; pages that one slot holds
// before those that several do. Stale pages of open slots come last: their owners are about to want
// them. More than asked is taken where it costs no more: one call unmaps a stretch, and growing
// sequences ask for a page at a time.
std::size_t SlotSpace::drop_idle(std::size_t pages, bool wait) {
  constexpr std::size_t kStride = 8;
  std::vector<std::uint32_t> order;
  for (std::uint32_t i = 0; i < slots(); ++i) {
    if (std::any_of(regions_.begin(), regions_.end(),
                    [&](const Region& region) { return region.idle(i) > 0; })) {
      order.push_back(i);
    }
  }
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    if (slots_[a].open != slots_[b].open) return slots_[b].open;
    return slots_[a].released_at < slots_[b].released_at;
  });
  std::size_t freed = 0;
  for (const Stale which : {Stale::kSole, Stale::kFreeable}) {
    for (const std::uint32_t slot : order) {
      if (freed >= pages) return freed;
      Slot& s = slots_[slot];
      if (!wait && s.fence && !s.fence->done()) continue;
      const std::size_t left = pages - freed;
      freed += drop_stale(slot, wait ? left : std::max(left, kStride), which);
    }
  }
  return freed;
}

// Kept content ------------------------------------------------------------------------------------

// The longest length at which the slot gives up `pages` pages that count or, if it has not so many,
// the last of them. All runs and regions are shortened together: a page that one of them lacks
// spoils those of the others.
template <typename Counts>
std::size_t SlotSpace::shorter(std::uint32_t slot, std::size_t pages, Counts counts) const {
  const Slot& s = slots_[slot];
  const std::size_t page = pool_->page_bytes();
  std::vector<std::uint32_t> ends;
  for (const Region& region : regions_) ends.push_back(region.kept(slot).end);
  std::size_t length = s.kept.tokens, found = 0;
  for (std::size_t next = length; found < pages && next > 0;) {
    next = 0;
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      if (ends[r] <= regions_[r].kept(slot).begin) continue;
      next = std::max(next, (ends[r] - 1) * page / regions_[r].spec().token_bytes);
    }
    if (next < s.kept.lowest) next = 0;  // nobody can go on from there: nothing is worth keeping
    if (next < s.floor) break;
    const std::size_t before = found;
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      const Region& region = regions_[r];
      const std::uint32_t begin = region.kept(slot).begin;
      const std::uint32_t end = next == 0 ? begin : std::max(begin, held_pages(region, next));
      for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
        for (std::uint32_t p = end; p < ends[r]; ++p) {
          found += counts(region.at(slot, run * region.pages_per_run() + p));
        }
      }
      ends[r] = std::min(ends[r], end);
    }
    if (found > before) length = next;
  }
  return length;
}

// Shortens kept slots in their order, and unmaps what they no longer keep. First only
// where that frees pages at once: what several slots keep, or an open one uses, is worth more and
// yields nothing. Then all of those who keep a page give it up in turn, until the last frees it.
std::size_t SlotSpace::evict(std::size_t pages, bool wait) {
  std::vector<std::uint32_t> order;
  for (std::uint32_t i = 0; i < slots(); ++i) {
    Slot& s = slots_[i];
    if (s.kept.tokens > 0 && (wait || !s.fence || s.fence->done())) order.push_back(i);
  }
  std::sort(order.begin(), order.end(),
            [&](std::uint32_t a, std::uint32_t b) { return goes_before(a, b); });
  std::size_t freed = 0;
  const auto shorten = [&](std::uint32_t slot, auto counts) {
    const std::size_t tokens = shorter(slot, pages - freed, counts);
    if (tokens == slots_[slot].kept.tokens) return false;
    lose(slot, tokens);
    freed += drop_idle(pages - freed, wait);
    return true;
  };
  for (const std::uint32_t slot : order) {
    if (freed >= pages) return freed;
    Slot& s = slots_[slot];
    if (s.searched == pool_->kept_once_changes()) continue;
    if (!shorten(slot, [&](PageId id) { return pool_->kept_once(id); })) {
      s.searched = pool_->kept_once_changes();
    }
  }
  for (bool progress = true; progress && freed < pages;) {
    progress = false;
    for (const std::uint32_t slot : order) {
      if (freed >= pages) break;
      progress |= shorten(slot, [&](PageId id) { return pool_->live(id) == 0; });
    }
  }
  return freed;
}

// The scratch memory is idle between reorders.
std::size_t SlotSpace::reclaim(std::size_t pages, Effort effort, DeviceLock&) {
  if (lost_) return 0;
  const bool wait = effort == Effort::kWait;
  std::size_t freed = !scratch_fence_ || scratch_fence_->done() ? drop_scratch() : 0;
  if (freed < pages) freed += drop_idle(pages - freed, wait);
  if (freed < pages && effort != Effort::kIdle) freed += evict(pages - freed, wait);
  return freed < pages && wait ? freed + drop_scratch() : freed;
}

std::size_t SlotSpace::drop_scratch() {
  if (scratch_busy_ || scratch_.bytes() == 0) return 0;
  if (scratch_fence_) scratch_fence_->wait();
  const std::size_t pages = scratch_.bytes() / pool_->page_bytes();
  scratch_.clear();
  return pages;
}

std::size_t SlotSpace::trim() {
  DeviceLock lock = enter();
  for (std::uint32_t slot = 0; slot < slots(); ++slot) {
    lose(slot, 0);
    drop_stale(slot, SIZE_MAX, Stale::kAll);
  }
  drop_scratch();
  return pool_->trim(0, lock);
}

}  // namespace vattn
