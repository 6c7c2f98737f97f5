// The reorder of many slots at once, and the memory that it is staged in.
#include <algorithm>
#include <string>

#include "slots.h"

namespace vattn {

// Scratch ----------------------------------------------------------------------------------------

// Pre: nothing uses the memory any more.
Address Scratch::require(std::size_t bytes, DeviceLock& lock) {
  if (bytes <= this->bytes()) return reservation_ ? reservation_->base() : 0;
  clear();
  const std::size_t page = pool_.page_bytes();
  const std::size_t n = (bytes + page - 1) / page;
  auto reservation =
      std::make_unique<Reservation>(pool_.driver_ptr(), n * page, pool_.driver().granularity());
  std::vector<Address> homes;
  for (std::size_t i = 0; i < n; ++i) homes.push_back(reservation->base() + i * page);
  PageRefs pages = pool_.acquire(homes, lock);
  std::vector<PageHandle> handles;
  for (std::size_t i = 0; i < n; ++i) handles.push_back(pool_.handle(pages[i]));
  pool_.driver().map(reservation->base(), handles, page);
  try {
    pool_.driver().set_access(reservation->base(), n * page);
  } catch (...) {
    pool_.driver().unmap(reservation->base(), n * page);
    throw;
  }
  for (std::size_t i = 0; i < n; ++i) pool_.set_content(pages[i], Content::kDirty);
  reservation_ = std::move(reservation);
  pages_ = std::move(pages);
  return reservation_->base();
}

void Scratch::clear() {
  if (pages_.size() == 0) return;
  pool_.driver().unmap(reservation_->base(), bytes());
  pages_.clear();
  reservation_.reset();
}

// Reorder ----------------------------------------------------------------------------------------
//
// Partial tails are overwritten in place, since remapping one page per run would cost far more than
// copying half of one. Those of a row that is source and destination at once are staged first; the
// others are gone with the first copy, so from there on a reorder goes forward and not back.

std::vector<SlotSpace::Move> SlotSpace::plan_moves(std::span<const std::int32_t> destinations,
                                                   std::span<const std::int32_t> sources) {
  if (destinations.size() != sources.size()) {
    throw std::invalid_argument("got " + std::to_string(destinations.size()) +
                                " destinations and " + std::to_string(sources.size()) +
                                " sources; give one source each");
  }
  std::vector<Move> moves;
  std::unordered_set<std::uint32_t> seen;
  for (std::size_t i = 0; i < destinations.size(); ++i) {
    open_slot(destinations[i]);
    const Slot& from = open_slot(sources[i]);
    const auto to = static_cast<std::uint32_t>(destinations[i]);
    const auto source = static_cast<std::uint32_t>(sources[i]);
    if (!seen.insert(to).second) {
      throw std::invalid_argument("slot " + std::to_string(to) + " is a destination twice");
    }
    if (to == source) continue;
    moves.push_back({to, source, from.anchor, from.tokens, windows(to),
                     windows_at(source, from.anchor, from.tokens), tails_dirty(source, from.tokens),
                     0});
  }
  return moves;
}

void SlotSpace::stage_tails(std::vector<Move>& moves, Stream stream, DeviceLock& lock) {
  std::unordered_set<std::uint32_t> sources;
  for (const Move& move : moves) sources.insert(move.from);
  std::size_t total = 0;
  for (const Move& move : moves) {
    if (sources.contains(move.to)) total += tails_bytes(slots_[move.to].tokens);
  }
  if (total == 0) return;
  if (scratch_fence_ && total > scratch_.bytes()) scratch_fence_->wait();
  Address at = scratch_.require(total, lock);
  for (Move& move : moves) {
    if (!sources.contains(move.to)) continue;
    move.staged = at;
    for_tails(slots_[move.to].tokens,
              [&](const Region& region, std::uint32_t index, std::size_t bytes) {
                copy(at, region.address(move.to, index), bytes, stream);
                at += bytes;
              });
  }
}

// Pins every page that will be shared, and every page that a destination gives up, so that nothing
// reclaims them while the tables change or before they are put back.
void SlotSpace::share_sources(const std::vector<Move>& moves, PagePins& pins,
                              std::unordered_set<PageId>& aliased) const {
  for (const Move& move : moves) {
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      const Region& region = regions_[r];
      const std::size_t full = full_pages(region, move.tokens);
      for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
        for (std::uint32_t p = move.after[r].begin; p < full; ++p) {
          const PageId id = region.at(move.from, run * region.pages_per_run() + p);
          pins.add(id);
          aliased.insert(id);
        }
        for (std::uint32_t p = move.before[r].begin; p < move.before[r].end; ++p) {
          pins.add(region.at(move.to, run * region.pages_per_run() + p));
        }
      }
    }
  }
}

// As find_needs(), and besides: pages that another row of the same reorder is about to share; pages
// that may not be finite, since another row may still want what they hold.
std::vector<SlotSpace::Need> SlotSpace::find_move_needs(const Move& move,
                                                        const std::unordered_set<PageId>& aliased) {
  std::vector<Need> needs = find_needs(move.to, move.tokens);
  for (Region& region : regions_) {
    const PageWindow window = region.window(move.to);
    const auto full = static_cast<std::uint32_t>(full_pages(region, move.tokens));
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      for (std::uint32_t p = std::max(window.begin, full); p < window.end; ++p) {
        const std::uint32_t index = run * region.pages_per_run() + p;
        const PageId id = region.at(move.to, index);
        if (id == kNoPage || pool_->users(id) > 1) continue;  // found already
        if (aliased.contains(id) || !region.safe(id)) needs.push_back({&region, move.to, index});
      }
    }
  }
  return needs;
}

// A copy that fails when others have been submitted is tried once more: what those have overwritten
// cannot be put back.
void SlotSpace::copy_tails(const std::vector<Move>& moves, Stream stream) {
  std::vector<Address> staged(slots_.size(), 0);
  for (const Move& move : moves) staged[move.to] = move.staged;
  bool begun = false;
  for (const Move& move : moves) {
    Address at = staged[move.from];
    for_tails(move.tokens, [&](const Region& region, std::uint32_t index, std::size_t bytes) {
      const Address source = at != 0 ? at : region.address(move.from, index);
      try {
        copy(region.address(move.to, index), source, bytes, stream);
      } catch (const std::exception&) {
        if (!begun) throw;
        lost_ = true;  // unless it works now
        copy(region.address(move.to, index), source, bytes, stream);
        lost_ = false;
      }
      begun = true;
      if (at != 0) at += bytes;
    });
  }
}

// After what a reorder has submitted. Without an event the thread waits in its place.
std::shared_ptr<Fence> SlotSpace::fence_moves(Stream stream) {
  lost_ = true;  // if neither works
  std::shared_ptr<Fence> fence;
  try {
    fence = std::make_shared<Fence>(pool_->driver_ptr(), stream);
  } catch (const std::exception&) {
    pool_->driver().synchronize(stream);
  }
  lost_ = false;
  return fence;
}

void SlotSpace::remap_moves(const std::vector<Move>& moves, PagePins& pins, Stream stream,
                            DeviceLock& lock) {
  std::unordered_set<PageId> aliased;
  share_sources(moves, pins, aliased);
  for (const Move& move : moves) {
    drop_aliases(move.to, move.after, move.tokens);
    set_windows(move.to, move.after);
  }
  std::vector<Need> needs;
  for (const Move& move : moves) {
    const std::vector<Need> more = find_move_needs(move, aliased);
    needs.insert(needs.end(), more.begin(), more.end());
    for (const Region& region : regions_) {
      const std::size_t written = move.tokens * region.spec().token_bytes;
      order_after_readers(region, move.to, written, stream);
    }
  }
  const PageRefs fresh = pool_->acquire(homes_of(needs), lock);
  Remap remap(*pool_, lost_);
  for (const Move& move : moves) {
    for (Region& region : regions_) {
      alias_prefix(remap, region, move.to, move.from, move.tokens);
    }
  }
  for (std::size_t i = 0; i < needs.size(); ++i) {
    remap.set(*needs[i].region, needs[i].slot, needs[i].index, fresh[i]);
  }
  if (remap.unmaps()) {
    Fence(pool_->driver_ptr(), stream).wait();  // live pages are about to move
    for (const Move& move : moves) before_unmap(slots_[move.to]);
  }
  remap.execute();
  remap.clean(stream);
  copy_tails(moves, stream);
  const std::shared_ptr<Fence> fence = fence_moves(stream);
  remap.commit();
  for (const Move& move : moves) {
    if (move.dirty) mark_tails_dirty(move.to, move.tokens);
  }
  totals_.pages_mapped += needs.size();
  scratch_fence_ = fence;
  for (const Move& move : moves) slots_[move.to].fence = fence;
}

void SlotSpace::assign(std::span<const std::int32_t> destinations,
                       std::span<const std::int32_t> sources, Stream stream) {
  DeviceLock lock = enter();
  std::vector<Move> moves = plan_moves(destinations, sources);
  if (moves.empty()) return;
  for (const Move& move : moves) {
    for (const std::uint32_t slot : {move.to, move.from}) {
      if (slots_[slot].fence) slots_[slot].fence->order_before(stream);
    }
  }
  // Before anything can fail: the fence that a failure leaves implies this one.
  if (scratch_fence_) scratch_fence_->order_before(stream);
  with_mappings(lock, [&] { reorder(moves, stream, lock); });
  for (const Move& move : moves) {
    Slot& to = slots_[move.to];
    to.anchor = move.anchor;
    to.tokens = move.tokens;
    to.ready = std::max(move.tokens, ready_of(move.to));
    to.dirty = to.dirty || slots_[move.from].dirty;
    to.copied_bytes += tails_bytes(move.tokens);
    mark_own(move.to, move.tokens, true);
    mark_shared(move.to);
  }
}

void SlotSpace::reorder(std::vector<Move>& moves, Stream stream, DeviceLock& lock) {
  PagePins pins(*pool_);  // until a failure is put right
  scratch_busy_ = true;
  try {
    stage_tails(moves, stream, lock);
    remap_moves(moves, pins, stream, lock);
  } catch (...) {
    for (const Move& move : moves) set_windows(move.to, move.before);
    for (const Move& move : moves) fence_off(slots_[move.to], stream);
    scratch_fence_ = slots_[moves.front().to].fence;
    scratch_busy_ = false;
    throw;
  }
  scratch_busy_ = false;
}

}  // namespace vattn
