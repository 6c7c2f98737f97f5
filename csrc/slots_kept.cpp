// Kept slots: free ones that remember what they hold, for whoever continues from it.
#include <algorithm>
#include <string>

#include "slots.h"

namespace vattn {

// The shortest length at which windows_at() lets a sequence go on from the slot's windows.
std::size_t SlotSpace::lowest_length(std::uint32_t slot) const noexcept {
  std::size_t lowest = 0;
  for (const Region& region : regions_) {
    const RegionSpec& spec = region.spec();
    const std::size_t begin = region.window(slot).begin * pool_->page_bytes();
    if (begin == 0) continue;
    const std::size_t first = (begin + spec.token_bytes - 1) / spec.token_bytes;
    for (const std::uint32_t tile : tiles_) {
      lowest = std::max(lowest, spec.window_tokens + (first + tile - 1) / tile * tile);
    }
  }
  return lowest;
}

const SlotSpace::Slot& SlotSpace::kept_slot(std::int64_t slot, std::size_t tokens) const {
  const Slot& s = slots_[checked_index(slot)];
  if (s.open) {
    throw std::invalid_argument("slot " + std::to_string(slot) +
                                " is open; only a free slot that was kept can be reopened");
  }
  if (!s.was_kept) {
    throw std::invalid_argument("slot " + std::to_string(slot) +
                                " is not open (released already?) and was not kept; call open(), "
                                "or release with keep=True");
  }
  if (s.kept.tokens == 0 || tokens < s.kept.lowest || tokens > s.kept.tokens) {
    const std::string left = s.kept.tokens == 0
                                 ? "nothing any more"
                                 : "lengths of " + std::to_string(s.kept.lowest) + " to " +
                                       std::to_string(s.kept.tokens) + " tokens";
    throw PagesGone("slot " + std::to_string(slot) + " keeps " + left + ", not its first " +
                    std::to_string(tokens) + " tokens; compute them again");
  }
  return s;
}

void SlotSpace::keep_tokens(std::uint32_t slot, std::size_t tokens) noexcept {
  Slot::Kept& kept = slots_[slot].kept;
  if (tokens == kept.tokens) return;
  const bool none = tokens == 0 || tokens < kept.lowest;
  for (Region& region : regions_) {
    const PageWindow now = region.kept(slot);
    region.set_kept(slot, none ? PageWindow{} : PageWindow{now.begin, held_pages(region, tokens)});
  }
  kept = none ? Slot::Kept{} : Slot::Kept{kept.lowest, std::min(kept.anchor, tokens), tokens};
}

// Somebody else takes what the slot keeps beyond so many tokens.
void SlotSpace::lose(std::uint32_t slot, std::size_t tokens) noexcept {
  const std::size_t before = slots_[slot].kept.tokens;
  keep_tokens(slot, tokens);
  evicted_.fetch_add(before - slots_[slot].kept.tokens, std::memory_order_relaxed);
}

KeptRange SlotSpace::kept(std::uint32_t slot) {
  const DeviceLock lock = enter();
  const Slot& s = slots_[checked_index(slot)];
  return {s.kept.lowest, s.kept.tokens};
}

std::size_t SlotSpace::lowest(std::uint32_t slot) {
  const DeviceLock lock = enter();
  const Slot& s = slots_[checked_index(slot)];
  return s.open ? lowest_length(slot) : s.kept.lowest;
}

std::vector<KeptRange> SlotSpace::kept_lengths() {
  const DeviceLock lock = enter();
  std::vector<KeptRange> out;
  out.reserve(slots_.size());
  for (const Slot& s : slots_) out.push_back({s.kept.lowest, s.kept.tokens});
  return out;
}

void SlotSpace::reopen(std::uint32_t slot, std::size_t tokens) {
  const DeviceLock lock = enter();
  const std::size_t anchor = std::min(kept_slot(slot, tokens).kept.anchor, tokens);
  Windows wanted = windows_at(slot, anchor, tokens);
  for (std::size_t i = 0; i < regions_.size(); ++i) {
    wanted[i].end = std::min(wanted[i].end, held_pages(regions_[i], tokens));
  }
  set_windows(slot, wanted);  // in use before they are no longer kept
  keep_tokens(slot, 0);
  Slot& s = slots_[slot];
  s.open = true;
  s.was_kept = false;
  s.turn = 0;
  ++s.generation;
  s.anchor = anchor;
  s.tokens = tokens;
  mark_shared(slot);
}

void SlotSpace::forget(std::uint32_t slot) {
  const DeviceLock lock = enter();
  if (slots_[checked_index(slot)].open) {
    throw std::invalid_argument("slot " + std::to_string(slot) +
                                " is open; only kept slots forget");
  }
  keep_tokens(slot, 0);
}

void SlotSpace::touch(std::uint32_t slot) {
  const DeviceLock lock = enter();
  Slot& s = slots_[checked_index(slot)];
  if (s.open) {
    throw std::invalid_argument("slot " + std::to_string(slot) +
                                " is open, and so in use; touch is for kept slots");
  }
  s.released_at = ++clock_;
  s.turn = 0;
}

void SlotSpace::evict_first(std::span<const std::int32_t> list) {
  const DeviceLock lock = enter();
  for (const std::int32_t slot : list) {
    if (slots_[checked_index(slot)].open) {
      throw std::invalid_argument("slot " + std::to_string(slot) +
                                  " is open, and so in use; only what free slots keep is evicted");
    }
  }
  for (Slot& s : slots_) s.turn = 0;
  std::uint64_t turn = 0;
  for (const std::int32_t slot : list) {
    Slot& s = slots_[static_cast<std::uint32_t>(slot)];
    if (s.turn == 0) s.turn = ++turn;
  }
}

std::size_t SlotSpace::sole_pages(std::uint32_t slot) {
  const DeviceLock lock = enter();
  checked_index(slot);
  std::size_t pages = 0;
  for (const Region& region : regions_) {
    const PageWindow kept = region.kept(slot);
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = kept.begin; p < kept.end; ++p) {
        pages += pool_->kept_once(region.at(slot, run * region.pages_per_run() + p));
      }
    }
  }
  return pages;
}

// Page counts ------------------------------------------------------------------------------------

// Entries of the slot's windows at another length that lack a page of their own; with `adopted`
// also those that have one already, which is stale now.
std::size_t SlotSpace::growth_pages(std::uint32_t slot, std::size_t tokens, bool adopted) const {
  const Slot& s = slots_[slot];
  std::size_t needed = 0;
  tokens = std::max(tokens, s.tokens);
  if (tokens <= s.ready) return needed;
  for (const Region& region : regions_) {
    const PageWindow now = region.window(slot);
    const PageWindow wanted = window_of(region, s.anchor, tokens);
    const auto written = static_cast<std::uint32_t>(full_pages(region, s.tokens));
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = std::max(wanted.begin, written); p < wanted.end; ++p) {
        const PageId id = region.at(slot, run * region.pages_per_run() + p);
        const bool used = now.contains(p);
        needed += id == kNoPage || pool_->users(id) > (used ? 1U : 0U) || (adopted && !used);
      }
    }
  }
  return needed;
}

std::size_t SlotSpace::pages_needed(std::uint32_t slot, std::size_t tokens) {
  const DeviceLock lock = enter();
  open_slot(slot);
  check_tokens(static_cast<std::int64_t>(tokens));
  return growth_pages(slot, tokens, false);
}

std::size_t SlotSpace::pages_needed_many(std::span<const std::int32_t> slots,
                                         std::span<const std::int32_t> tokens) {
  const DeviceLock lock = enter();
  check_batch(slots, tokens);
  std::size_t needed = 0;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    needed += growth_pages(static_cast<std::uint32_t>(slots[i]),
                           static_cast<std::size_t>(tokens[i]), true);
  }
  return needed;
}

std::size_t SlotSpace::admission_pages(const Admission& a) {
  const DeviceLock lock = enter();
  check_tokens(static_cast<std::int64_t>(a.tokens));
  if (a.shared_tokens > a.tokens || a.anchor > a.tokens || (!a.source && a.shared_tokens > 0)) {
    throw std::invalid_argument("a sequence of " + std::to_string(a.tokens) +
                                " tokens cannot share " + std::to_string(a.shared_tokens) +
                                " with " + (a.source ? "its source" : "nobody") +
                                " and have its anchor at " + std::to_string(a.anchor));
  }
  if (!a.source) return fresh_pages(a.anchor, a.tokens);
  if (a.in_place) static_cast<void>(kept_slot(*a.source, a.shared_tokens));
  const std::size_t anchor = source_anchor(*a.source, a.shared_tokens);
  const Windows shared = windows_at(*a.source, anchor, a.shared_tokens);
  std::size_t needed = 0;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    const Region& region = regions_[r];
    const PageWindow all = window_of(region, anchor, a.tokens);
    const auto full = static_cast<std::uint32_t>(full_pages(region, a.shared_tokens));
    const std::uint32_t held = held_pages(region, a.shared_tokens);
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = all.begin; p < held; ++p) {
        const PageId id = region.at(*a.source, run * region.pages_per_run() + p);
        needed += !a.new_only && pool_->live(id) == 0;
        // The tail: a page of its own in a fork, in place if nobody else must not see it change.
        needed += p >= full && (!a.in_place || pool_->users(id) > 1);
      }
    }
    // After copy_in() no window reaches back to what lies between.
    const std::uint32_t mapped = a.in_place ? held : std::max(held, shared[r].end);
    const std::uint32_t later = std::min(window_of(region, a.anchor, a.tokens).begin, all.end);
    const std::uint32_t skipped = later > mapped ? later - mapped : 0;
    needed += std::size_t{all.end - std::max(all.begin, held) - skipped} * region.spec().runs;
  }
  return needed;
}

}  // namespace vattn
