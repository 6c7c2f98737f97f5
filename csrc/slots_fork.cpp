// A new sequence that shares the beginning of another.
#include <algorithm>
#include <string>

#include "slots.h"

namespace vattn {

// Pages of a run that its first `tokens` tokens fill: nobody will write them again.
std::size_t SlotSpace::full_pages(const Region& region, std::size_t tokens) const noexcept {
  return tokens * region.spec().token_bytes / pool_->page_bytes();
}

// Bytes of the page after those: the partial tail of a run.
std::size_t SlotSpace::tail_bytes(const Region& region, std::size_t tokens) const noexcept {
  return tokens * region.spec().token_bytes % pool_->page_bytes();
}

// Pages of a run that hold its first `tokens` tokens.
std::uint32_t SlotSpace::held_pages(const Region& region, std::size_t tokens) const noexcept {
  return static_cast<std::uint32_t>(full_pages(region, tokens) +
                                    (tail_bytes(region, tokens) > 0 ? 1 : 0));
}

// Bytes of the partial tails of all runs.
std::size_t SlotSpace::tails_bytes(std::size_t tokens) const {
  std::size_t total = 0;
  for_tails(tokens, [&](const Region&, std::uint32_t, std::size_t bytes) { total += bytes; });
  return total;
}

// What a partial tail holds, its copy holds too.
bool SlotSpace::tails_dirty(std::uint32_t slot, std::size_t tokens) const {
  bool dirty = false;
  for_tails(tokens, [&](const Region& region, std::uint32_t index, std::size_t) {
    dirty = dirty || pool_->content(region.at(slot, index)) == Content::kDirty;
  });
  return dirty;
}

void SlotSpace::mark_tails_dirty(std::uint32_t slot, std::size_t tokens) {
  for_tails(tokens, [&](const Region& region, std::uint32_t index, std::size_t) {
    pool_->set_content(region.at(slot, index), Content::kDirty);
  });
}

// Of the free slots that keep nothing, the one whose stale pages agree longest with the prefix of
// `source`, so that least is remapped; among equals, the best fit. If there is none, the kept slot
// whose content goes first, but never the source.
std::uint32_t SlotSpace::pick_for_prefix(std::uint32_t source, std::size_t tokens) const {
  const Region& gauge = regions_.front();
  const std::size_t full = full_pages(gauge, tokens);
  std::optional<std::uint32_t> best = best_fit(tokens);
  if (!best) best = first_to_go(source, false);
  if (!best) throw_out_of_slots();
  std::size_t best_agree = 0;
  for (std::uint32_t i = 0; i < slots(); ++i) {
    if (slots_[i].open || slots_[i].kept.tokens > 0) continue;
    std::size_t agree = 0;
    for (auto p = held(gauge, source).begin; p < full; ++p) {
      if (gauge.at(i, p) == kNoPage || gauge.at(i, p) != gauge.at(source, p)) break;
      ++agree;
    }
    if (agree > best_agree) {
      best = i;
      best_agree = agree;
    }
  }
  return *best;
}

// Plans that `slot` shares the full pages of the first `tokens` tokens of `source`.
void SlotSpace::alias_prefix(Remap& remap, Region& region, std::uint32_t slot, std::uint32_t source,
                             std::size_t tokens) {
  const auto full = static_cast<std::uint32_t>(full_pages(region, tokens));
  for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
    for (std::uint32_t p = region.window(slot).begin; p < full; ++p) {
      const std::uint32_t index = run * region.pages_per_run() + p;
      remap.set(region, slot, index, region.at(source, index), Remap::Use::kShared);
      ++totals_.pages_aliased;
    }
  }
}

// The anchor of a sequence that begins with the first tokens of `source`. Throws if they are not
// there.
std::size_t SlotSpace::source_anchor(std::uint32_t source, std::size_t tokens) const {
  const Slot& parent = slots_[checked_index(source)];
  if (!parent.open) return std::min(kept_slot(source, tokens).kept.anchor, tokens);
  if (tokens > parent.tokens) {
    throw std::invalid_argument("fork of " + std::to_string(tokens) + " tokens, but slot " +
                                std::to_string(source) + " holds " + std::to_string(parent.tokens));
  }
  return std::min(parent.anchor, tokens);
}

std::uint32_t SlotSpace::fork(std::uint32_t source, std::size_t tokens, Stream stream) {
  DeviceLock lock = enter();
  const std::size_t anchor = source_anchor(source, tokens);
  const Windows wanted = windows_at(source, anchor, tokens);
  const std::uint32_t slot = pick_for_prefix(source, tokens);
  lose(slot, 0);
  drop_dirty(slot);
  Slot& parent = slots_[source];
  if (!parent.open) {
    parent.floor = tokens;
    parent.released_at = ++clock_;
    parent.turn = 0;
  }
  try {
    with_mappings(lock, [&] { fork_into(slot, source, tokens, wanted, stream, lock); });
  } catch (...) {
    parent.floor = 0;
    throw;
  }
  parent.floor = 0;
  Slot& child = slots_[slot];
  child.open = true;
  child.was_kept = false;
  child.turn = 0;
  child.dirty = slots_[source].dirty;
  ++child.generation;
  child.anchor = anchor;
  child.tokens = tokens;
  child.ready = std::max(tokens, ready_of(slot));
  child.copied_bytes = tails_bytes(tokens);
  mark_shared(slot);
  return slot;
}

// Stale pages of a kept source that a fork shares, or copies from.
std::size_t SlotSpace::reserved_for_fork(std::uint32_t source, std::size_t tokens,
                                         const Windows& wanted) const {
  std::size_t reserved = 0;
  for (std::size_t r = 0; r < regions_.size() && !slots_[source].open; ++r) {
    const Region& region = regions_[r];
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = wanted[r].begin; p < held_pages(region, tokens); ++p) {
        reserved += pool_->live(region.at(source, run * region.pages_per_run() + p)) == 0;
      }
    }
  }
  return reserved;
}

void SlotSpace::fork_into(std::uint32_t slot, std::uint32_t source, std::size_t tokens,
                          const Windows& wanted, Stream stream, DeviceLock& lock) {
  Slot& child = slots_[slot];
  Slot& parent = slots_[source];
  drop_aliases(slot, wanted, tokens);
  // Not yet the pages before its own ones: what is stale there will be replaced, and may be
  // reclaimed for that.
  for (std::size_t i = 0; i < regions_.size(); ++i) {
    const auto full = static_cast<std::uint32_t>(full_pages(regions_[i], tokens));
    regions_[i].set_window(slot, {std::max(wanted[i].begin, full), wanted[i].end});
  }
  try {
    if (child.fence) child.fence->order_before(stream);
    if (parent.fence) parent.fence->order_before(stream);
    const std::vector<Need> needs = find_needs(slot, tokens);
    for (Region& region : regions_) {
      const std::size_t written = tokens * region.spec().token_bytes;
      order_after_readers(region, slot, written, stream);
      region.clean_adopted(slot, {}, written, stream);
    }
    const PageRefs fresh =
        pool_->acquire(homes_of(needs), lock, reserved_for_fork(source, tokens, wanted));
    set_windows(slot, wanted);
    Remap remap(*pool_, lost_);
    for (Region& region : regions_) alias_prefix(remap, region, slot, source, tokens);
    for (std::size_t i = 0; i < needs.size(); ++i) {
      remap.set(*needs[i].region, slot, needs[i].index, fresh[i]);
    }
    if (remap.unmaps()) before_unmap(child);
    remap.execute();
    remap.clean(stream);
    bool copied = false;
    for_tails(tokens, [&](const Region& region, std::uint32_t index, std::size_t bytes) {
      copy(region.address(slot, index), region.address(source, index), bytes, stream);
      copied = true;
    });
    // Nothing else would keep the tails of a kept slot mapped until they are copied.
    if (copied && !parent.open) fence(parent, stream);
    remap.commit();
    if (tails_dirty(source, tokens)) mark_tails_dirty(slot, tokens);
    totals_.pages_mapped += needs.size();
  } catch (...) {
    fence_off(child, stream);
    set_windows(slot, Windows(regions_.size()));
    throw;
  }
}

}  // namespace vattn
