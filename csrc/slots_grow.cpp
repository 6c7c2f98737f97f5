// Growing sequences: which pages are needed, where they come from, and mapping them.
#include <algorithm>
#include <string>
#include <utility>

#include "slots.h"

namespace vattn {

// Entries of the slot's windows that need a page of their own: without one, or with one that
// another slot uses or keeps, from the page on that the next token goes to.
std::vector<SlotSpace::Need> SlotSpace::find_needs(std::uint32_t slot, std::size_t write_from) {
  std::vector<Need> needs;
  const std::size_t page = pool_->page_bytes();
  for (Region& region : regions_) {
    const PageWindow window = region.window(slot);
    const std::size_t written = write_from * region.spec().token_bytes;
    const auto first = std::max(window.begin, static_cast<std::uint32_t>(written / page));
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = first; p < window.end; ++p) {
        const std::uint32_t index = run * region.pages_per_run() + p;
        const PageId id = region.at(slot, index);
        if (id == kNoPage) {
          needs.push_back({&region, slot, index});
        } else if (pool_->users(id) > 1) {
          const std::size_t keep = written > p * page ? std::min(page, written - p * page) : 0;
          needs.push_back(
              {&region, slot, index, keep, keep > 0 ? user_elsewhere(region, slot, index) : slot});
        }
      }
    }
  }
  return needs;
}

// Another slot that uses or keeps the page of this entry. Pages are shared between equal entries
// only.
std::uint32_t SlotSpace::user_elsewhere(const Region& region, std::uint32_t slot,
                                        std::uint32_t index) const {
  for (std::uint32_t other = 0; other < slots(); ++other) {
    if (other != slot && region.at(other, index) == region.at(slot, index) &&
        held(region, other).contains(index % region.pages_per_run())) {
      return other;
    }
  }
  throw InvariantError("a shared page of slot " + std::to_string(slot) + " has no other user");
}

// The first bytes of pages that others go on using. A kept slot is not unmapped before they are
// copied.
void SlotSpace::copy_needs(std::span<const Need> needs, Stream stream) {
  std::vector<std::uint32_t> kept;
  for (const Need& need : needs) {
    if (need.copy_bytes == 0) continue;
    copy(need.region->address(need.slot, need.index),
         need.region->address(need.copy_slot, need.index), need.copy_bytes, stream);
    if (!slots_[need.copy_slot].open &&
        std::find(kept.begin(), kept.end(), need.copy_slot) == kept.end()) {
      kept.push_back(need.copy_slot);
    }
  }
  for (const std::uint32_t slot : kept) fence(slots_[slot], stream);
}

// A page that the slot is about to write in place may be stale in slots whose kernels still read
// it: the write comes after them.
void SlotSpace::order_after_readers(const Region& region, std::uint32_t slot, std::size_t from,
                                    Stream stream) {
  const PageWindow window = region.window(slot);
  const auto first = static_cast<std::uint32_t>(from / pool_->page_bytes());
  for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
    for (std::uint32_t p = std::max(window.begin, first); p < window.end; ++p) {
      const std::uint32_t index = run * region.pages_per_run() + p;
      const PageId id = region.at(slot, index);
      if (id == kNoPage || pool_->users(id) > 1 || pool_->refs(id) == 1) continue;
      for (std::uint32_t other = 0; other < slots(); ++other) {
        if (other != slot && slots_[other].fence && region.at(other, index) == id) {
          slots_[other].fence->order_before(stream);
        }
      }
    }
  }
}

// Pages of this slot that its windows have left behind, if no kernel can still be reading them.
std::vector<std::pair<Region*, std::uint32_t>> SlotSpace::recyclable(std::uint32_t slot) {
  std::vector<std::pair<Region*, std::uint32_t>> out;
  for (Region& region : regions_) {
    if (region.spec().window_tokens == 0 || region.idle(slot) == 0) continue;
    if (slots_[slot].fence && !slots_[slot].fence->done()) return out;
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = 0; p < region.window(slot).begin; ++p) {
        const std::uint32_t index = run * region.pages_per_run() + p;
        const PageId id = region.at(slot, index);
        if (id != kNoPage && pool_->refs(id) == 1) out.emplace_back(&region, index);
      }
    }
  }
  return out;
}

std::vector<Address> SlotSpace::homes_of(std::span<const Need> needs) {
  std::vector<Address> homes;
  homes.reserve(needs.size());
  for (const Need& need : needs) homes.push_back(need.region->address(need.slot, need.index));
  return homes;
}

// Stale pages that come into use where they are.
void SlotSpace::count_adopted(std::uint32_t slot, const Windows& before,
                              std::span<const Need> needs) {
  for (std::size_t i = 0; i < regions_.size(); ++i) {
    const PageWindow now = regions_[i].window(slot);
    totals_.pages_adopted += (now.end - before[i].end) * regions_[i].spec().runs;
  }
  for (const Need& need : needs) {
    const auto i = static_cast<std::size_t>(need.region - regions_.data());
    totals_.pages_adopted -= need.index % need.region->pages_per_run() >= before[i].end;
  }
}

// Whether a page that the sequence uses must be replaced before it writes from token `written` on.
bool SlotSpace::moves_live(std::uint32_t slot, std::size_t written) const {
  for (const Region& region : regions_) {
    const PageWindow now = region.window(slot);
    const auto first = static_cast<std::uint32_t>(full_pages(region, written));
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = std::max(now.begin, first); p < now.end; ++p) {
        if (pool_->users(region.at(slot, run * region.pages_per_run() + p)) > 1) return true;
      }
    }
  }
  return false;
}

void SlotSpace::grow(std::uint32_t slot, std::size_t tokens, Stream stream, bool may_move,
                     DeviceLock& lock) {
  Slot& s = slots_[slot];
  tokens = std::max(tokens, s.tokens);
  // Where it begins stays: pages are left behind with a fence only, after the step that may read
  // them has been submitted.
  Windows windows;
  for (const Region& region : regions_) {
    const PageWindow now = region.window(slot), wanted = window_of(region, s.anchor, tokens);
    windows.push_back({now.size() == 0 ? wanted.begin : now.begin, std::max(now.end, wanted.end)});
  }
  if (map_windows(slot, windows, s.tokens, stream, may_move, lock, nullptr)) {
    s.ready = std::max(tokens, ready_of(slot));
  }
}

// Stale mappings, in windows that the slot is about to have, of pages that others keep. They would
// be replaced anyway, and while they counted as in use here nobody could take the pages.
void SlotSpace::drop_aliases(std::uint32_t slot, const Windows& wanted, std::size_t written) {
  bool waited = false;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    Region& region = regions_[r];
    if (region.idle(slot) == 0) continue;
    const PageWindow now = region.window(slot);
    const std::uint32_t first =
        std::max({wanted[r].begin, static_cast<std::uint32_t>(full_pages(region, written)),
                  now.size() > 0 ? now.end : 0});
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      const std::uint32_t base = run * region.pages_per_run();
      for (std::uint32_t p = first; p < wanted[r].end;) {
        std::uint32_t n = 0;
        for (; p + n < wanted[r].end; ++n) {
          const PageId id = region.at(slot, base + p + n);
          if (id == kNoPage || pool_->kept(id) == 0 || pool_->live(id) > 0) break;
        }
        if (n > 0) {
          if (!waited) before_unmap(slots_[slot]);
          waited = true;
          region.unmap_stale(slot, base + p, n);
        }
        p += n + 1;
      }
    }
  }
}

// Gives the slot these windows, with pages of its own from token `written` on, and submits what
// `fill` does to them. Declaring first what the sequence will use protects what is mapped there
// already from being reclaimed for its own sake.
bool SlotSpace::map_windows(std::uint32_t slot, const Windows& wanted, std::size_t written,
                            Stream stream, bool may_move, DeviceLock& lock,
                            const std::function<void()>& fill) {
  Slot& s = slots_[slot];
  const Windows before = windows(slot);
  const bool moves = moves_live(slot, written);
  if (moves && !may_move) return false;
  drop_aliases(slot, wanted, written);
  set_windows(slot, wanted);
  try {
    if (s.fence) s.fence->order_before(stream);
    const std::vector<Need> needs = find_needs(slot, written);
    count_adopted(slot, before, needs);
    for (std::size_t i = 0; i < regions_.size(); ++i) {
      const std::size_t bytes = written * regions_[i].spec().token_bytes;
      order_after_readers(regions_[i], slot, bytes, stream);
      regions_[i].clean_adopted(slot, before[i], bytes, stream);
    }
    if (needs.empty()) {
      if (fill) fill();
    } else {
      map_needs(slot, needs, moves, stream, lock, fill);
    }
  } catch (...) {
    fence_off(s, stream);
    set_windows(slot, before);
    throw;
  }
  mark_own(slot, written, false);
  return true;
}

void SlotSpace::map_needs(std::uint32_t slot, std::span<const Need> needs, bool moves,
                          Stream stream, DeviceLock& lock, const std::function<void()>& fill) {
  auto recycled = recyclable(slot);
  if (recycled.size() > needs.size()) recycled.resize(needs.size());
  PagePins pins(*pool_);
  for (const auto& [region, index] : recycled) pins.add(region->at(slot, index));
  const PageRefs fresh = pool_->acquire(homes_of(needs.subspan(recycled.size())), lock);
  Remap remap(*pool_, lost_);
  for (std::size_t i = 0; i < needs.size(); ++i) {
    const Need& need = needs[i];
    if (i < recycled.size()) {
      const auto [region, index] = recycled[i];
      remap.set(*need.region, slot, need.index, region->at(slot, index));
      remap.set(*region, slot, index, kNoPage);
    } else {
      remap.set(*need.region, slot, need.index, fresh[i - recycled.size()]);
    }
  }
  // Kernels of this stream may still read what the sequence has there now.
  if (moves) Fence(pool_->driver_ptr(), stream).wait();
  if (remap.unmaps()) before_unmap(slots_[slot]);
  remap.execute();
  remap.clean(stream);
  copy_needs(needs, stream);
  if (fill) fill();
  std::vector<const Need*> dirty;
  for (const Need& need : needs) {
    if (need.copy_bytes > 0 &&
        pool_->content(need.region->at(slot, need.index)) == Content::kDirty) {
      dirty.push_back(&need);
    }
  }
  remap.commit();
  for (const Need& need : needs) slots_[slot].copied_bytes += need.copy_bytes;
  for (const Need* need : dirty) {
    pool_->set_content(need->region->at(slot, need->index), Content::kDirty);
  }
  totals_.pages_mapped += needs.size();
  totals_.pages_recycled += recycled.size();
}

// The windows of the slot once its anchor and length are these: what lies before them is left.
bool SlotSpace::leaves_pages(std::uint32_t slot, std::size_t anchor, std::size_t tokens) const {
  return std::any_of(regions_.begin(), regions_.end(), [&](const Region& region) {
    return window_of(region, anchor, tokens).begin > region.window(slot).begin;
  });
}

void SlotSpace::leave_pages(std::uint32_t slot) {
  for (Region& region : regions_) {
    const PageWindow now = region.window(slot);
    const std::uint32_t begin = window_of(region, slots_[slot].anchor, slots_[slot].tokens).begin;
    if (begin > now.begin) region.set_window(slot, {begin, now.end});
  }
}

void SlotSpace::check_batch(std::span<const std::int32_t> slots,
                            std::span<const std::int32_t> tokens) {
  if (slots.size() != tokens.size()) {
    throw std::invalid_argument("got " + std::to_string(slots.size()) + " slots and " +
                                std::to_string(tokens.size()) + " lengths; give one length each");
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {
    open_slot(slots[i]);
    check_tokens(tokens[i]);
  }
}

void SlotSpace::grow_all(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
                         Stream stream, bool advance) {
  DeviceLock lock = enter();
  check_batch(slots, tokens);
  struct Grown {
    std::uint32_t slot;
    std::size_t ready;
    Windows windows;
  };
  std::vector<Grown> grown;
  std::shared_ptr<Fence> left;
  bool leaves = false;
  try {
    for (std::size_t i = 0; i < slots.size(); ++i) {
      const auto slot = static_cast<std::uint32_t>(slots[i]);
      const auto wanted = static_cast<std::size_t>(tokens[i]);
      if (wanted <= slots_[slot].ready) continue;
      grown.push_back({slot, slots_[slot].ready, windows(slot)});
      try {
        with_mappings(lock, [&] { grow(slot, wanted, stream, advance, lock); });
      } catch (...) {
        grown.pop_back();
        throw;
      }
      leaves = leaves || (advance && leaves_pages(slot, slots_[slot].tokens, wanted));
    }
    // After all of them: by now the stream waits for whatever any slot waited for.
    if (leaves) left = std::make_shared<Fence>(pool_->driver_ptr(), stream);
  } catch (...) {
    for (auto it = grown.rbegin(); it != grown.rend(); ++it) {
      fence_off(slots_[it->slot], stream);
      set_windows(it->slot, it->windows);
      slots_[it->slot].ready = it->ready;
    }
    throw;
  }
  if (!advance) return;
  ++step_;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    Slot& s = slots_[static_cast<std::uint32_t>(slots[i])];
    const auto wanted = static_cast<std::size_t>(tokens[i]);
    if (wanted <= s.tokens) continue;
    // A slot that is named twice has one first query.
    if (std::exchange(s.step, step_) != step_) s.anchor = s.tokens;
    s.tokens = wanted;
  }
  if (!left) return;
  for (const Grown& it : grown) {
    leave_pages(it.slot);
    slots_[it.slot].fence = left;
  }
}

void SlotSpace::ensure(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
                       Stream stream) {
  grow_all(slots, tokens, stream, true);
}

bool SlotSpace::prepared(std::span<const std::int32_t> slots,
                         std::span<const std::int32_t> tokens) {
  const DeviceLock lock = pool_->try_lock();
  // What is wrong with the arguments, prepare() says.
  if (!lock.owns_lock() || lost_ || slots.size() != tokens.size()) return false;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const auto slot = static_cast<std::uint32_t>(slots[i]);
    if (slot >= slots_.size() || !slots_[slot].open || tokens[i] < 0) return false;
    if (static_cast<std::size_t>(tokens[i]) > slots_[slot].ready) return false;
  }
  return true;
}

void SlotSpace::prepare(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
                        Stream stream) {
  grow_all(slots, tokens, stream, false);
}

}  // namespace vattn
