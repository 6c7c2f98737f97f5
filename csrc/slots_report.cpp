// What a cache tells about itself: figures, maps, and whether its invariants hold.
#include <algorithm>
#include <string>

#include "slots.h"

namespace vattn {
namespace {

// How the pages of a cache are used, one byte per page of the pool.
enum Use : std::uint8_t {
  kUsedStale = 1,
  kUsedCover = 2,
  kUsedLive = 4,
  kUsedShared = 8,
  kUsedKept = 16
};

// By PageState: of the pages of a cell, the one with the largest number is seen.
constexpr std::uint8_t kSeen[] = {0, 4, 5, 3, 1, 2};

}  // namespace

std::size_t SlotSpace::tokens(std::uint32_t slot) {
  const DeviceLock lock = enter();
  return open_slot(slot).tokens;
}

std::uint32_t SlotSpace::generation(std::uint32_t slot) {
  const DeviceLock lock = enter();
  return slots_[checked_index(slot)].generation;
}

bool SlotSpace::is_open(std::uint32_t slot) {
  const DeviceLock lock = enter();
  return slots_[checked_index(slot)].open;
}

std::size_t SlotSpace::first_token(std::uint32_t slot, std::uint32_t region) {
  const DeviceLock lock = enter();
  open_slot(slot);
  const Region& r = regions_.at(region);
  const std::size_t bytes = r.window(slot).begin * pool_->page_bytes();
  return (bytes + r.spec().token_bytes - 1) / r.spec().token_bytes;
}

SpaceStats SlotSpace::stats() {
  const DeviceLock lock = enter();
  SpaceStats out = totals_;
  out.evicted_tokens = evictions();
  std::vector<std::uint8_t> uses(pool_->page_slots(), 0);
  for (std::uint32_t slot = 0; slot < slots(); ++slot) {
    const Slot& s = slots_[slot];
    out.open_slots += s.open;
    out.kept_slots += s.kept.tokens > 0;
    out.tokens += s.tokens;
    for (const Region& region : regions_) {
      const PageWindow window = region.window(slot), kept = region.kept(slot);
      const std::size_t live_end = held_pages(region, s.tokens);
      const std::size_t first = window.begin * pool_->page_bytes() / region.spec().token_bytes;
      out.token_bytes +=
          (s.tokens - std::min(first, s.tokens)) * region.spec().token_bytes * region.spec().runs;
      for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
        for (std::uint32_t p = 0; p < region.top(slot); ++p) {
          const PageId id = region.at(slot, run * region.pages_per_run() + p);
          if (id == kNoPage) continue;
          const bool live = window.contains(p) && p < live_end;
          if (live && (uses[id] & kUsedLive) != 0) uses[id] |= kUsedShared;
          uses[id] |= live ? kUsedLive : window.contains(p) ? kUsedCover : kUsedStale;
          if (kept.contains(p)) uses[id] |= kUsedKept;
        }
      }
    }
  }
  const std::size_t page = pool_->page_bytes();
  for (const std::uint8_t use : uses) {
    if ((use & kUsedLive) != 0) {
      out.live_bytes += page;
    } else if ((use & kUsedCover) != 0) {
      out.cover_bytes += page;
    } else if ((use & kUsedStale) != 0) {
      out.stale_bytes += page;
      if ((use & kUsedKept) != 0) out.kept_bytes += page;
    }
    if ((use & kUsedShared) != 0) out.shared_bytes += page;
  }
  out.scratch_bytes = scratch_.bytes();
  for (const Region& region : regions_) out.reserved_bytes += region.reservation()->bytes();
  return out;
}

// Pages of one slot are distinct, since a page is shared between equal entries only.
SlotUsage SlotSpace::usage_of(std::uint32_t slot) const {
  const Slot& s = slots_[slot];
  SlotUsage out;
  out.copied_bytes = s.copied_bytes;
  for (const Region& region : regions_) {
    const std::uint32_t begin = region.window(slot).begin, end = held_pages(region, s.tokens);
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = begin; p < end; ++p) {
        ++out.pages;
        out.shared_pages += pool_->was_shared(region.at(slot, run * region.pages_per_run() + p));
      }
    }
  }
  return out;
}

std::vector<SlotUsage> SlotSpace::usage(std::span<const std::int32_t> slots) {
  const DeviceLock lock = enter();
  std::vector<SlotUsage> out;
  out.reserve(slots.size());
  for (const std::int32_t slot : slots) {
    open_slot(slot);
    out.push_back(usage_of(static_cast<std::uint32_t>(slot)));
  }
  return out;
}

// After an operation that may have brought pages which others use into the slot's windows.
void SlotSpace::mark_shared(std::uint32_t slot) {
  for (const Region& region : regions_) {
    const PageWindow window = region.window(slot);
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = window.begin; p < window.end; ++p) {
        const PageId id = region.at(slot, run * region.pages_per_run() + p);
        if (pool_->live(id) > 1) pool_->mark_shared(id);
      }
    }
  }
}

// After an operation from which on the slot writes in place behind these tokens: whatever it had in
// common with others there is gone. Partial tails count if they were written, too.
void SlotSpace::mark_own(std::uint32_t slot, std::size_t tokens, bool tails) {
  for (const Region& region : regions_) {
    const PageWindow window = region.window(slot);
    const std::size_t first = tails ? full_pages(region, tokens) : held_pages(region, tokens);
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (auto p = std::max(window.begin, static_cast<std::uint32_t>(first)); p < window.end;
           ++p) {
        const PageId id = region.at(slot, run * region.pages_per_run() + p);
        if (pool_->live(id) == 1) pool_->mark_own(id);
      }
    }
  }
}

PageState SlotSpace::state_of(const Region& region, std::uint32_t slot, std::uint32_t index) const {
  const PageId id = region.at(slot, index);
  const std::uint32_t p = index % region.pages_per_run();
  if (id == kNoPage) return PageState::kUnmapped;
  if (!region.window(slot).contains(p)) {
    return region.kept(slot).contains(p) ? PageState::kKept : PageState::kStale;
  }
  if (p >= held_pages(region, slots_[slot].tokens)) return PageState::kCover;
  return pool_->live(id) > 1 ? PageState::kShared : PageState::kLive;
}

std::vector<PageState> SlotSpace::page_states(std::uint32_t slot, std::uint32_t region) {
  const DeviceLock lock = enter();
  const Region& r = regions_.at(region);
  checked_index(slot);
  std::vector<PageState> out(r.entries_per_slot());
  for (std::uint32_t index = 0; index < out.size(); ++index) out[index] = state_of(r, slot, index);
  return out;
}

std::vector<std::uint8_t> SlotSpace::recycled(std::uint32_t slot, std::uint32_t region) {
  const DeviceLock lock = enter();
  const Region& r = regions_.at(region);
  checked_index(slot);
  std::vector<std::uint8_t> out(r.entries_per_slot());
  for (std::uint32_t index = 0; index < out.size(); ++index) out[index] = r.recycled(slot, index);
  return out;
}

std::vector<SlotCells> SlotSpace::overview(std::uint32_t cells) {
  const DeviceLock lock = enter();
  std::vector<SlotCells> out;
  for (std::uint32_t slot = 0; slot < slots(); ++slot) {
    if (std::all_of(regions_.begin(), regions_.end(),
                    [&](const Region& region) { return region.mapped(slot) == 0; })) {
      continue;
    }
    const Slot& s = slots_[slot];
    out.push_back({slot, s.tokens, s.kept.tokens, std::vector<std::uint8_t>(cells)});
    for (const Region& region : regions_) {
      for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
        for (std::uint32_t p = 0; p < region.top(slot); ++p) {
          const std::uint32_t index = run * region.pages_per_run() + p;
          const auto state = static_cast<std::uint8_t>(state_of(region, slot, index));
          std::uint8_t& cell = out.back().cells[std::size_t{p} * cells / region.pages_per_run()];
          const std::uint8_t before = cell & ~kRecycled, flag = cell & kRecycled;
          if (kSeen[state] > kSeen[before]) cell = state | flag;
          if (region.recycled(slot, index)) cell |= kRecycled;
        }
      }
    }
  }
  return out;
}

std::vector<PageId> SlotSpace::page_ids(std::uint32_t slot, std::uint32_t region) {
  const DeviceLock lock = enter();
  const Region& r = regions_.at(region);
  std::vector<PageId> out(r.entries_per_slot());
  for (std::uint32_t index = 0; index < out.size(); ++index) {
    out[index] = r.at(checked_index(slot), index);
  }
  return out;
}

// Invariants -------------------------------------------------------------------------------------

void SlotSpace::check_slot(std::uint32_t slot) const {
  const Slot& s = slots_[slot];
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) throw InvariantError("slot " + std::to_string(slot) + ": " + what);
  };
  require(s.anchor <= s.tokens && s.tokens <= max_tokens_ && s.ready <= max_tokens_,
          "anchor <= tokens <= max_tokens is broken");
  require(s.ready == 0 || s.tokens <= s.ready, "tokens <= ready is broken");
  require(s.open || (s.tokens == 0 && s.ready == 0), "closed but not empty");
  require(s.copied_bytes <= (s.open ? totals_.copied_bytes : 0), "more copied into it than at all");
  for (const Region& region : regions_) {
    const PageWindow window = region.window(slot);
    const PageWindow wanted = window_of(region, s.anchor, s.tokens);
    require(window.begin <= window.end && window.end <= region.pages_per_run(), "window order");
    require(window.begin <= wanted.begin, "window begins after what a query may reach");
    require(window.end >= (s.ready > 0 ? wanted.end : held_pages(region, s.tokens)),
            "a page with tokens or their cover is not mapped");
    require(s.ready <= std::max(s.tokens, ready_of(slot)), "ready is beyond what is mapped");
    std::uint32_t mapped = 0;
    for (std::uint32_t index = 0; index < region.entries_per_slot(); ++index) {
      const std::uint32_t p = index % region.pages_per_run();
      const PageId id = region.at(slot, index);
      mapped += id != kNoPage;
      require(!region.recycled(slot, index) || (id != kNoPage && window.contains(p)),
              "a recycled page that is not in use");
      require(id == kNoPage || p < region.top(slot), "a page above the top");
      if (!window.contains(p)) continue;
      require(id != kNoPage, "a hole in a window");
      require(s.ready <= s.tokens || p < full_pages(region, s.tokens) || pool_->users(id) == 1,
              "a page that may be written is shared or kept");
    }
    require(mapped == region.mapped(slot), "count of mapped pages is wrong");
  }
}

void SlotSpace::check_kept(std::uint32_t slot) const {
  const Slot& s = slots_[slot];
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) throw InvariantError("slot " + std::to_string(slot) + ": " + what);
  };
  require(!s.open || s.kept.tokens == 0, "open and kept at once");
  require(!s.open || s.turn == 0, "open, and has a turn to be evicted");
  require(s.kept.lowest <= s.kept.tokens && s.kept.anchor <= s.kept.tokens,
          "a kept slot with lowest or anchor beyond its tokens");
  require(s.was_kept || s.kept.tokens == 0, "keeps what nobody asked it to");
  require(s.floor == 0, "a floor between operations");
  for (const Region& region : regions_) {
    const PageWindow kept = region.kept(slot);
    require(kept.end == held_pages(region, s.kept.tokens),
            "kept pages are not those of the tokens");
    require(kept.begin <= kept.end, "kept window order");
    if (s.kept.tokens > 0) {
      const PageWindow wanted = window_of(region, s.kept.lowest, s.kept.lowest);
      require(kept.begin <= wanted.begin || s.kept.lowest == 0, "lowest is too low");
    }
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = kept.begin; p < kept.end; ++p) {
        require(region.at(slot, run * region.pages_per_run() + p) != kNoPage,
                "a hole in a kept window");
      }
    }
  }
}

void SlotSpace::check() {
  const DeviceLock lock = enter();
  pool_->check(lock);
  std::vector<std::uint32_t> refs(pool_->page_slots(), 0), live(refs), kept(refs);
  for (std::uint32_t slot = 0; slot < slots(); ++slot) {
    check_slot(slot);
    check_kept(slot);
    for (const Region& region : regions_) {
      for (std::uint32_t index = 0; index < region.entries_per_slot(); ++index) {
        const PageId id = region.at(slot, index);
        if (id == kNoPage) continue;
        const std::uint32_t p = index % region.pages_per_run();
        ++refs[id];
        live[id] += region.window(slot).contains(p);
        kept[id] += region.kept(slot).contains(p);
      }
    }
  }
  for (std::size_t i = 0; i < scratch_.bytes() / pool_->page_bytes(); ++i) {
    ++refs[scratch_.page(i)];
  }
  // Another cache on the same pool has pages of its own, but no page has users in two caches.
  for (PageId id = 1; id < refs.size(); ++id) {
    const bool ours = refs[id] > 0;
    if (ours && (refs[id] != pool_->refs(id) || live[id] != pool_->live(id) ||
                 kept[id] != pool_->kept(id))) {
      const auto counts = [](std::uint32_t mapped, std::uint32_t used, std::uint32_t by_free) {
        return std::to_string(mapped) + " references, " + std::to_string(used) + " of them live, " +
               std::to_string(by_free) + " kept";
      };
      throw InvariantError("page " + std::to_string(id) + " has " +
                           counts(pool_->refs(id), pool_->live(id), pool_->kept(id)) +
                           " by the pool's count, and " + counts(refs[id], live[id], kept[id]) +
                           " by the tables");
    }
  }
}

}  // namespace vattn
