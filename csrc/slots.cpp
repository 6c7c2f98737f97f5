#include "slots.h"

#include <algorithm>
#include <string>

namespace vattn {
namespace {

std::size_t round_up(std::size_t n, std::size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

std::size_t checked_max_tokens(const SpaceOptions& options) {
  if (options.slots == 0 || options.max_tokens == 0 || options.regions.empty()) {
    throw std::invalid_argument("a cache needs at least one slot, one token and one region; got " +
                                std::to_string(options.slots) + ", " +
                                std::to_string(options.max_tokens) + " and " +
                                std::to_string(options.regions.size()));
  }
  for (const std::uint32_t tile : options.tiles) {
    if (tile == 0) throw std::invalid_argument("a tile of 0 tokens; give a positive size");
    for (const RegionSpec& region : options.regions) {
      if (region.capacity_tokens < round_up(options.max_tokens, tile)) {
        throw std::invalid_argument("a slot of " + std::to_string(region.capacity_tokens) +
                                    " tokens cannot cover " + std::to_string(options.max_tokens) +
                                    " tokens in tiles of " + std::to_string(tile));
      }
    }
  }
  return options.max_tokens;
}

}  // namespace

SlotSpace::SlotSpace(std::shared_ptr<PagePool> pool, const SpaceOptions& options)
    : pool_(std::move(pool)),
      max_tokens_(checked_max_tokens(options)),
      tiles_(options.tiles),
      keep_stale_(options.keep_stale),
      slots_(options.slots),
      scratch_(*pool_) {
  regions_.reserve(options.regions.size());
  for (const RegionSpec& spec : options.regions) {
    regions_.emplace_back(*pool_, spec, options.slots);
  }
  pool_->attach(this);
}

SlotSpace::~SlotSpace() {
  // In a forked child another thread may have held the lock for good, and nothing is mapped.
  if (!pool_->driver().usable()) return;
  pool_->detach(this);
  const DeviceLock lock = pool_->lock();
  // Kernels of released slots may still run; open slots are the owner's to have finished.
  for (Slot& slot : slots_) {
    try {
      before_unmap(slot);
    } catch (const std::exception&) {
      // The context is lost, and with it every kernel that could touch the pages.
    }
  }
  for (int tries = 2; tries > 0; --tries) {
    try {
      scratch_.clear();
      break;
    } catch (const std::exception&) {
      // As for the regions: a driver that refuses twice is gone.
    }
  }
  regions_.clear();
}

// Checks and arithmetic --------------------------------------------------------------------------

DeviceLock SlotSpace::enter() {
  pool_->driver().ensure_usable();
  DeviceLock lock = pool_->lock();
  if (lost_) {
    throw DriverError("cache", 0,
                      "an earlier driver call failed and could not be undone, so the mappings are "
                      "unknown; drop this cache and make a new one",
                      true);
  }
  return lock;
}

std::uint32_t SlotSpace::checked_index(std::int64_t slot) const {
  if (slot < 0 || slot >= static_cast<std::int64_t>(slots_.size())) {
    throw std::invalid_argument("slot " + std::to_string(slot) + " is not one of the " +
                                std::to_string(slots_.size()) + " slots of this cache");
  }
  return static_cast<std::uint32_t>(slot);
}

SlotSpace::Slot& SlotSpace::open_slot(std::int64_t slot) {
  Slot& s = slots_[checked_index(slot)];
  if (!s.open) {
    throw std::invalid_argument("slot " + std::to_string(slot) +
                                " is not open (released already?); call open() first");
  }
  return s;
}

void SlotSpace::check_tokens(std::int64_t tokens) const {
  if (tokens < 0) {
    throw std::invalid_argument("a length of " + std::to_string(tokens) +
                                " tokens; lengths are not negative");
  }
  if (static_cast<std::size_t>(tokens) > max_tokens_) {
    throw std::invalid_argument(std::to_string(tokens) + " tokens are more than the " +
                                std::to_string(max_tokens_) +
                                " reserved per sequence; raise max_tokens");
  }
}

std::size_t SlotSpace::cover(std::size_t tokens) const noexcept {
  std::size_t most = tokens;
  for (const std::uint32_t tile : tiles_) most = std::max(most, round_up(tokens, tile));
  return most;
}

PageWindow SlotSpace::window_of(const Region& region, std::size_t anchor,
                                std::size_t tokens) const noexcept {
  if (tokens == 0) return {};
  const RegionSpec& spec = region.spec();
  const std::size_t page = pool_->page_bytes();
  PageWindow window;
  window.end = static_cast<std::uint32_t>(round_up(cover(tokens) * spec.token_bytes, page) / page);
  if (spec.window_tokens > 0 && anchor > spec.window_tokens) {
    // The kernel loads the window's first tile whole: the bound is the tile, not the window.
    std::size_t low = anchor - spec.window_tokens;
    for (const std::uint32_t tile : tiles_) {
      low = std::min(low, (anchor - spec.window_tokens) / tile * tile);
    }
    window.begin = static_cast<std::uint32_t>(low * spec.token_bytes / page);
  }
  return window;
}

// The most tokens whose cover lies in the slot's windows.
std::size_t SlotSpace::ready_of(std::uint32_t slot) const noexcept {
  std::size_t ready = max_tokens_;
  for (const Region& region : regions_) {
    const std::size_t held =
        region.window(slot).end * pool_->page_bytes() / region.spec().token_bytes;
    for (const std::uint32_t tile : tiles_) ready = std::min(ready, held / tile * tile);
  }
  return ready;
}

SlotSpace::Windows SlotSpace::windows(std::uint32_t slot) const {
  Windows out;
  out.reserve(regions_.size());
  for (const Region& region : regions_) out.push_back(region.window(slot));
  return out;
}

void SlotSpace::set_windows(std::uint32_t slot, const Windows& windows) {
  for (std::size_t i = 0; i < regions_.size(); ++i) regions_[i].set_window(slot, windows[i]);
}

void SlotSpace::fence(Slot& slot, Stream stream) {
  if (slot.fence) slot.fence->order_before(stream);  // the new fence implies the old one
  slot.fence = std::make_shared<Fence>(pool_->driver_ptr(), stream);
}

// After a failure: what was submitted to the stream may still touch pages that become stale now.
void SlotSpace::fence_off(Slot& slot, Stream stream) noexcept {
  try {
    fence(slot, stream);
  } catch (...) {
    try {
      pool_->driver().synchronize(stream);
    } catch (...) {
      lost_ = true;
    }
  }
}

// Ending a sequence does not fail for want of an event: the thread waits in its place.
void SlotSpace::fence_or_wait(Slot& slot, Stream stream) {
  try {
    fence(slot, stream);
  } catch (const DriverError& error) {
    if (error.fatal()) throw;
    pool_->driver().synchronize(stream);
    if (slot.fence) slot.fence->wait();
    slot.fence.reset();
  }
}

// Kernels may read a slot beyond its sequence where that reads as zeros, so what a dirty sequence
// leaves behind is not left mapped for the next one.
void SlotSpace::drop_dirty(std::uint32_t slot) {
  if (!slots_[slot].dirty) return;
  drop_stale(slot, SIZE_MAX, Stale::kAll);
  slots_[slot].dirty = false;
}

void SlotSpace::before_unmap(Slot& slot) {
  if (slot.fence) slot.fence->wait();
}

// Open and release -------------------------------------------------------------------------------

void SlotSpace::throw_out_of_slots() const {
  throw OutOfSlots("all " + std::to_string(slots()) +
                   " slots are open; release a sequence or raise max_seqs");
}

// Of the slots that keep nothing, the smallest set of stale pages that suffices, else the largest;
// among equals the first slot, since neighbours make denser batches. Not knowing the length is like
// expecting a long one. A slot without pages is only taken when no other is free.
std::optional<std::uint32_t> SlotSpace::best_fit(std::size_t expected_tokens) const {
  const Region& gauge = regions_.front();
  const std::uint32_t wanted = window_of(gauge, 0, std::min(expected_tokens, max_tokens_)).end;
  std::optional<std::uint32_t> best;
  std::uint32_t best_pages = 0;
  for (std::uint32_t i = 0; i < slots(); ++i) {
    if (slots_[i].open || slots_[i].kept.tokens > 0) continue;
    const std::uint32_t pages = gauge.mapped(i) / gauge.spec().runs;
    const bool fits = wanted > 0 && pages >= wanted;
    const bool best_fits = wanted > 0 && best_pages >= wanted;
    const bool better = fits ? !best_fits || pages < best_pages : !best_fits && pages > best_pages;
    if (!best || better) {
      best = i;
      best_pages = pages;
    }
  }
  return best;
}

// Whether `a` loses what it keeps before `b` does.
bool SlotSpace::goes_before(std::uint32_t a, std::uint32_t b) const noexcept {
  const Slot &x = slots_[a], &y = slots_[b];
  if (x.turn != y.turn) return y.turn == 0 || (x.turn > 0 && x.turn < y.turn);
  return x.released_at < y.released_at;
}

// Whether what a slot keeps ends with a page of its own, which its next user can have where it is.
bool SlotSpace::adoptable(std::uint32_t slot) const noexcept {
  const Region& gauge = regions_.front();
  const PageWindow kept = gauge.kept(slot);
  const PageId last = kept.size() > 0 ? gauge.at(slot, kept.end - 1) : kNoPage;
  return last != kNoPage && pool_->refs(last) == 1;
}

// The kept slot whose content goes first; `to_adopt` prefers those whose pages can be had where
// they are, unless somebody has said who goes first: then it is that one or, if it cannot, none.
std::optional<std::uint32_t> SlotSpace::first_to_go(std::optional<std::uint32_t> except,
                                                    bool to_adopt) const {
  std::optional<std::uint32_t> first, adopted;
  for (std::uint32_t i = 0; i < slots(); ++i) {
    if (slots_[i].open || slots_[i].kept.tokens == 0 || i == except) continue;
    if (!first || goes_before(i, *first)) first = i;
    if (to_adopt && adoptable(i) && (!adopted || goes_before(i, *adopted))) adopted = i;
  }
  if (to_adopt && first && slots_[*first].turn > 0 && adopted != first) return std::nullopt;
  return adopted ? adopted : first;
}

// Pages of a sequence that shares nothing.
std::size_t SlotSpace::fresh_pages(std::size_t anchor, std::size_t tokens) const noexcept {
  std::size_t pages = 0;
  for (const Region& region : regions_) {
    pages += std::size_t{window_of(region, anchor, tokens).size()} * region.spec().runs;
  }
  return pages;
}

// A kept slot is taken when there is no other, or when most of what it holds has to go anyway.
std::uint32_t SlotSpace::pick_free(std::size_t expected_tokens, const DeviceLock& lock) const {
  const auto plain = best_fit(expected_tokens);
  std::size_t lacking = 0;
  if (plain) {
    const std::size_t has = pool_->unkept(lock);
    const std::size_t wanted = fresh_pages(0, std::min(expected_tokens, max_tokens_));
    if (wanted <= has) return *plain;
    lacking = wanted - has;
  }
  const auto kept = first_to_go(std::nullopt, plain.has_value());
  if (!kept && !plain) throw_out_of_slots();
  if (!kept) return *plain;
  std::size_t holds = 0;
  for (const Region& region : regions_) {
    holds += std::size_t{region.kept(*kept).size()} * region.spec().runs;
  }
  return plain && 2 * lacking < holds ? *plain : *kept;
}

std::uint32_t SlotSpace::open(std::optional<std::uint32_t> slot, std::size_t expected_tokens) {
  const DeviceLock lock = enter();
  if (slot && slots_[checked_index(*slot)].open) {
    throw std::invalid_argument("slot " + std::to_string(*slot) +
                                " is open already; release it first");
  }
  const std::uint32_t index = slot ? *slot : pick_free(expected_tokens, lock);
  lose(index, 0);
  drop_dirty(index);
  Slot& s = slots_[index];
  s.open = true;
  s.was_kept = false;
  s.turn = 0;
  ++s.generation;
  return index;
}

void SlotSpace::release(std::uint32_t slot, Stream stream, bool keep) {
  DeviceLock lock = enter();
  Slot& s = open_slot(slot);
  if (keep && !keep_stale_) {
    throw std::invalid_argument(
        "a cache with reuse_stale=False keeps nothing in its free slots; release without keep");
  }
  fence_or_wait(s, stream);
  if (keep) {
    s.kept = {lowest_length(slot), s.anchor, s.tokens};
    for (Region& region : regions_) {
      region.set_kept(slot, {region.window(slot).begin, held_pages(region, s.tokens)});
    }
  }
  set_windows(slot, Windows(regions_.size()));
  s.open = false;
  s.was_kept = keep;
  s.anchor = s.tokens = s.ready = 0;
  s.copied_bytes = 0;
  s.released_at = ++clock_;
  try {
    if (!keep_stale_) drop_stale(slot, SIZE_MAX, Stale::kAll);
    if (!keep) drop_dirty(slot);
  } catch (const DriverError& error) {
    // The sequence is released; giving its memory back is tried again by whoever needs it.
    if (error.fatal()) throw;
  }
  give_back(lock);
}

// Shortening -------------------------------------------------------------------------------------

void SlotSpace::truncate(std::uint32_t slot, std::size_t tokens, Stream stream) {
  DeviceLock lock = enter();
  Slot& s = open_slot(slot);
  if (tokens > s.tokens) {
    throw std::invalid_argument("truncate to " + std::to_string(tokens) + " tokens, but slot " +
                                std::to_string(slot) + " holds " + std::to_string(s.tokens) +
                                "; use ensure to grow");
  }
  const std::size_t anchor = std::min(s.anchor, tokens);
  Windows wanted = windows_at(slot, anchor, tokens);
  if (s.ready == 0) {  // reopened: the cover may be missing
    for (std::size_t i = 0; i < regions_.size(); ++i) {
      wanted[i].end = std::min(wanted[i].end, held_pages(regions_[i], tokens));
    }
  }
  if (wanted != windows(slot)) fence_or_wait(s, stream);
  set_windows(slot, wanted);
  s.tokens = tokens;
  s.ready = s.ready == 0 ? 0 : tokens;
  s.anchor = anchor;
  give_back(lock);
}

// Of a pool over its budget. The operation that made it possible has succeeded whatever comes of
// it.
void SlotSpace::give_back(DeviceLock& lock) {
  try {
    if (pool_->over_budget(lock)) pool_->settle(lock);
  } catch (const DriverError& error) {
    if (error.fatal()) throw;  // else it is tried again by whoever needs memory
  }
}

// The windows that a slot with the pages of `source` has at another length. Throws when a window
// layer no longer holds the tokens that a query at `anchor` reaches back to.
SlotSpace::Windows SlotSpace::windows_at(std::uint32_t source, std::size_t anchor,
                                         std::size_t tokens) const {
  Windows out;
  for (const Region& region : regions_) {
    out.push_back(window_of(region, anchor, tokens));
    const PageWindow now = held(region, source);
    if (out.back().begin < now.begin && out.back().end > out.back().begin) {
      const std::size_t first =
          round_up(now.begin * pool_->page_bytes(), region.spec().token_bytes) /
          region.spec().token_bytes;
      throw std::invalid_argument(
          "slot " + std::to_string(source) + " cannot go back to " + std::to_string(tokens) +
          " tokens: a sliding-window layer holds tokens from " + std::to_string(first) +
          " on; go back to at least " + std::to_string(slots_[source].anchor));
    }
  }
  return out;
}

void SlotSpace::mark_dirty(std::uint32_t slot) {
  const DeviceLock lock = enter();
  open_slot(slot).dirty = true;
  for (const Region& region : regions_) {
    // Pages that its windows have left, too.
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = 0; p < region.top(slot); ++p) {
        const PageId id = region.at(slot, run * region.pages_per_run() + p);
        if (id != kNoPage) pool_->set_content(id, Content::kDirty);
      }
    }
  }
}

void SlotSpace::copy(Address dst, Address src, std::size_t bytes, Stream stream) {
  pool_->driver().copy(dst, src, bytes, stream);
  totals_.copied_bytes += bytes;
}

}  // namespace vattn
