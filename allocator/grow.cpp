// A request that nothing mapped can hold: which addresses it gets, and which pages.
#include "grow.h"

#include <algorithm>
#include <string>
#include <utility>

namespace vattn {
namespace {

// Of the most that was ever live: so much more is created before idle pages are moved. It lets a
// program that repeats itself find an arrangement of pages that needs no moves; with none, a
// recorded training step still moved some in every iteration (bench/allocator.py).
constexpr std::size_t kHeadroomPercent = 4;
// And at least so much: in small programs moves would save next to nothing.
constexpr std::size_t kHeadroomBytes = std::size_t{8} << 20;

constexpr std::size_t kNoBound = ~std::size_t{0};

}  // namespace

DeviceLock CachingAllocator::park_and_lock_pool() {
  const Parked parked(parked_);
  return pool_->lock();
}

Block* CachingAllocator::take_again(Arena& arena, std::size_t bytes, std::size_t align) {
  return align == kBlockBytes ? arena.take(bytes) : arena.take_slab_block();
}

Block* CachingAllocator::grow(Scope& scope, Arena& arena, std::size_t bytes, std::size_t align) {
  DeviceLock pool_lock = park_and_lock_pool();
  const Busy busy(busy_);
  ++book_.growths;
  flush_all();
  poll_pending(true, false);
  drop_released_scopes(false, pool_lock);
  if (Block* block = take_again(arena, bytes, align)) return block;
  if (bytes / page_bytes_ > pool_->stats_locked(pool_lock).budget_pages) {
    throw_out_of_memory(scope, bytes, pool_lock, "it is more than the whole budget");
  }
  Growth growth(scope, arena, bytes);
  const Window window = claim_window(growth, align);
  try {
    find_pages(growth, pool_lock);
    make_room(growth);
    map_claimed(growth, pool_lock);
  } catch (const OutOfPages& error) {
    abandon(growth);
    throw_out_of_memory(scope, bytes, pool_lock, error.what());
  } catch (...) {
    abandon(growth);
    throw;
  }
  commit(growth);
  Block* block = arena.merge_claimed(growth.claimed, window.begin, bytes);
  drop_shadows_in_background();
  return block;
}

// Addresses --------------------------------------------------------------------------------------

// The free blocks whose pages a growing block may have without waiting, to be found by address.
class CachingAllocator::IdleIndex {
 public:
  explicit IdleIndex(std::vector<Block*> blocks) : blocks_(std::move(blocks)) {
    std::sort(blocks_.begin(), blocks_.end(),
              [](const Block* a, const Block* b) { return a->address < b->address; });
    for (const Block* block : blocks_) starts_.push_back(block->address);
  }

  // The free block that holds a page, null if there is none. Blocks may have been cut since.
  Block* find(const Place& place) const {
    if (place.range == nullptr) return nullptr;  // it is nobody's but its shadows'
    const Address address = place.address();
    const auto after = std::upper_bound(starts_.begin(), starts_.end(), address);
    if (after == starts_.begin()) return nullptr;
    Block* block = blocks_[static_cast<std::size_t>(after - starts_.begin()) - 1];
    if (block->range != place.range) return nullptr;
    while (block != nullptr && block->end() <= address) block = block->next;
    const bool whole = block != nullptr && block->state == BlockState::kFree &&
                       block->address <= address &&
                       address + place.range->page_bytes <= block->end();
    return whole ? block : nullptr;
  }

 private:
  std::vector<Block*> blocks_;
  std::vector<Address> starts_;
};

// Chooses a window and claims it, and with it the pages of its shadows.
Window CachingAllocator::claim_window(Growth& growth, std::size_t align) {
  Arena& arena = growth.arena;
  const Reach reach = capturing(arena.stream()) ? Reach::kDone : Reach::kOwnOrder;
  std::vector<Block*> usable;
  // What comes from another scope would count against a tag's budget: one that has one uses its
  // own.
  const bool own_only = growth.scope.budget_pages != 0;
  if (shadow_pages_ > 0) {
    for (Block* block : idle_blocks()) {
      if (own_only && &block->range->arena.scope() != &growth.scope) continue;
      if (may_use(block->range->arena, block, arena.stream(), reach)) usable.push_back(block);
    }
  }
  const IdleIndex idle(std::move(usable));
  std::vector<Address> refused;
  while (true) {
    const Window window = arena.best_window(growth.bytes, align, [&](const Block* shadow) {
      if (std::find(refused.begin(), refused.end(), shadow->address) != refused.end()) return false;
      const std::size_t first = shadow->range->page_index(shadow->address);
      for (std::size_t i = 0; i < shadow->bytes / page_bytes_; ++i) {
        if (idle.find(owner_[shadow->range->pages[first + i]]) == nullptr) return false;
      }
      return true;
    });
    growth.claimed = arena.claim(window);
    growth.need = window.missing_pages;
    const Block* missed = revive(growth, idle);
    if (missed == nullptr) return window;
    // Two of its shadows are of the same page, or of one that the window has already.
    refused.push_back(missed->address);
    abandon(growth);
    growth.loans.clear();
  }
}

// Claims the pages of the claimed shadows where they belong now. The shadow for which that fails,
// null if none.
Block* CachingAllocator::revive(Growth& growth, const IdleIndex& idle) {
  for (Block* shadow : growth.claimed) {
    if (!shadow->is_shadow) continue;
    const std::size_t first = shadow->range->page_index(shadow->address);
    const std::size_t n = shadow->bytes / page_bytes_;
    for (std::size_t i = 0; i < n;) {
      const Place place = owner_[shadow->range->pages[first + i]];
      Block* block = idle.find(place);
      if (block == nullptr) return shadow;
      // As many as lie side by side there, too.
      std::size_t pages = 1;
      while (i + pages < n) {
        const Place next = owner_[shadow->range->pages[first + i + pages]];
        if (next.range != place.range || next.index != place.index + pages) break;
        if (next.address() + page_bytes_ > block->end()) break;
        ++pages;
      }
      Arena& owner = block->range->arena;
      const Address begin = place.address();
      growth.loans.push_back(owner.cut(block, begin, begin + pages * page_bytes_));
      i += pages;
    }
  }
  return nullptr;
}

// Pages -----------------------------------------------------------------------------------------

// How many more pages a scope may have: from outside of this allocator, or from other scopes.
std::size_t CachingAllocator::allowed_pages(const Scope& scope, bool from_outside) const noexcept {
  std::size_t allowed = kNoBound;
  if (scope.budget_pages != 0) {
    allowed = scope.budget_pages - std::min(scope.budget_pages, scope.owned_pages);
  }
  if (from_outside && limit_pages_ != 0) {
    allowed = std::min(allowed, limit_pages_ - std::min(limit_pages_, owned_pages_));
  }
  return allowed;
}

// The same with what a growth has in hand by now.
std::size_t CachingAllocator::room(const Growth& growth, bool from_outside) const noexcept {
  const auto less = [](std::size_t pages, std::size_t used) {
    return pages == kNoBound ? pages : pages - std::min(pages, used);
  };
  const std::size_t room = less(allowed_pages(growth.scope, false), growth.from_other_scopes());
  if (!from_outside || limit_pages_ == 0) return room;
  return std::min(room, less(limit_pages_, owned_pages_ + growth.from_outside()));
}

// Pages for all that a growth lacks, from the cheapest source first. Throws OutOfPages.
void CachingAllocator::find_pages(Growth& growth, DeviceLock& pool_lock) {
  const bool captured = capturing(growth.arena.stream());
  const auto from_pool = [&](std::size_t most, Effort effort) {
    const std::size_t pages = std::min({growth.lacking(), most, room(growth, true)});
    take_from_pool(growth, pages, effort, pool_lock);
  };
  // As long as there is hardly more than the program ever had in use at once, new pages are made.
  // Beyond that, what lies idle serves before anything is created.
  const std::size_t peak =
      std::max(requests_.peak_live_bytes(), requests_.live_bytes() + growth.bytes) / page_bytes_;
  const std::size_t headroom =
      std::max(peak * kHeadroomPercent / 100, kHeadroomBytes / page_bytes_);
  const bool young = owned_pages_ + growth.need <= peak + headroom;
  from_pool(pool_->stats_locked(pool_lock).free_pages, Effort::kNone);
  if (young) from_pool(growth.lacking(), Effort::kNone);
  borrow(growth, captured ? Reach::kDone : Reach::kOwnOrder);
  if (!young) from_pool(growth.lacking(), Effort::kNone);
  if (growth.lacking() == 0) return;

  ++book_.alloc_retries;
  if (!captured) {
    borrow(growth, Reach::kOtherStreams);
    if (growth.lacking() > 0) {
      poll_pending(true, true);
      for (const auto& scope : scopes_) settled(*scope, true);
      flush_all();
      borrow(growth, Reach::kOtherStreams);
    }
  }
  from_pool(growth.lacking(), Effort::kKept);
  if (!captured) from_pool(growth.lacking(), Effort::kWait);
  if (growth.lacking() > 0) throw OutOfPages(why_not(growth));
}

std::string CachingAllocator::why_not(const Growth& growth) const {
  const Scope& scope = growth.scope;
  if (scope.budget_pages != 0 && allowed_pages(scope, false) < growth.need) {
    return "the budget of the tag '" + scope.name + "' is " +
           size_text(scope.budget_pages * page_bytes_);
  }
  if (limit_pages_ != 0 && allowed_pages(scope, true) < growth.need) {
    return "the limit of this allocator is " + size_text(limit_pages_ * page_bytes_);
  }
  return std::to_string(growth.lacking()) + " of " + std::to_string(growth.need) +
         " pages are lacking";
}

// As many of `pages` as the pool gives, all at once or else those that it has.
void CachingAllocator::take_from_pool(Growth& growth, std::size_t pages, Effort effort,
                                      DeviceLock& pool_lock) {
  const std::vector<Address> missing = growth.missing_addresses(page_bytes_);
  while (pages > 0) {
    const auto homes = std::span<const Address>(missing).subspan(growth.pages.size(), pages);
    try {
      PageRefs refs = pool_->acquire(homes, pool_lock, 0, effort);
      for (std::size_t i = 0; i < refs.size(); ++i) growth.pages.push_back(refs[i]);
      growth.outside.push_back(std::move(refs));
      return;
    } catch (const OutOfPages&) {
      // What there is, then: what is still lacking comes from elsewhere.
      const std::size_t there =
          effort == Effort::kNone ? pool_->unclaimed() : pool_->available(pool_lock);
      const std::size_t free = pool_->stats_locked(pool_lock).free_pages;
      pages = std::min(pages > free ? std::max(pages / 2, free) : pages - 1, there);
    }
  }
}

// Takes idle pages from free blocks, of those first that were freed longest ago.
void CachingAllocator::borrow(Growth& growth, Reach reach) {
  if (growth.lacking() == 0) return;
  std::vector<Block*> idle = idle_blocks();
  for (Block* block : idle) {
    if (growth.lacking() == 0) return;
    Arena& arena = block->range->arena;
    std::size_t pages = growth.lacking();
    if (&arena.scope() != &growth.scope) {
      pages = std::min(pages, room(growth, false));
    }
    if (pages == 0 || !may_use(arena, block, growth.arena.stream(), reach)) continue;
    Block* part = arena.cut_pages(block, pages);
    growth.loans.push_back(part);
    const std::size_t first = part->range->page_index(part->address);
    for (std::size_t i = 0; i < part->bytes / page_bytes_; ++i) {
      growth.pages.push_back(part->range->pages[first + i]);
    }
  }
}

// Whether work that `stream` is given from now on may use a free block's pages.
bool CachingAllocator::may_use(Arena& arena, Block* block, Stream stream, Reach reach) {
  if (!settled(arena.scope(), false)) return false;
  if (reach != Reach::kDone && arena.stream() == stream) return true;
  if (arena.known_done(block)) return true;
  // During a capture no event is recorded: it could become part of the graph.
  if (!captures_.empty()) return false;
  if (arena.fence_done(block)) return true;
  if (reach != Reach::kOtherStreams) return false;
  if (const std::shared_ptr<Fence> fence = arena.fence()) fence->order_before(stream);
  return true;
}

// Free blocks with whole pages that others may have, by the time they were freed.
std::vector<Block*> CachingAllocator::idle_blocks() {
  std::vector<Block*> idle;
  for (const auto& scope : scopes_) {
    if (scope->paused || scope->pinned()) continue;
    for (const auto& arena : scope->arenas) {
      arena->for_each_free([&](Block* block) {
        if (block->range->whole_pages(block->address, block->end()) > 0) idle.push_back(block);
      });
    }
  }
  std::sort(idle.begin(), idle.end(), [](const Block* a, const Block* b) {
    return a->freed_at != b->freed_at ? a->freed_at < b->freed_at : a->address < b->address;
  });
  return idle;
}

// Mapping ---------------------------------------------------------------------------------------

void CachingAllocator::map_claimed(Growth& growth, DeviceLock& pool_lock) {
  try {
    map_unmapped(growth);
  } catch (const OutOfMappings&) {
    // Shadows are mappings that we can do without.
    if (shadow_pages_ == 0) throw;
    unmap_growth(growth);
    drop_shadows(0, false, pool_lock);
    map_unmapped(growth);
  }
}

void CachingAllocator::map_unmapped(Growth& growth) {
  Driver& driver = pool_->driver();
  std::size_t at = 0;
  std::vector<PageHandle> handles;
  for (Block* block : growth.unmapped()) {
    const std::size_t n = block->bytes / page_bytes_;
    handles.clear();
    for (std::size_t i = 0; i < n; ++i) handles.push_back(pool_->handle(growth.pages[at + i]));
    driver.map(block->address, handles, page_bytes_);
    growth.mapped.push_back(block);
    driver.set_access(block->address, block->bytes);
    at += n;
  }
}

// In the tables, before anything is mapped: a commit must not fail.
void CachingAllocator::make_room(const Growth& growth) {
  if (owner_.size() < pool_->page_slots()) owner_.resize(pool_->page_slots());
  for (const Block* block : growth.unmapped()) {
    std::vector<PageId>& pages = block->range->pages;
    const std::size_t end = block->range->page_index(block->end() - 1) + 1;
    if (pages.size() < end) pages.resize(end, kNoPage);
  }
}

void CachingAllocator::commit(Growth& growth) {
  std::size_t at = 0;
  for (Block* block : growth.mapped) {
    Range& range = *block->range;
    const std::size_t first = range.page_index(block->address);
    const std::size_t n = block->bytes / page_bytes_;
    for (std::size_t i = 0; i < n; ++i) {
      const PageId page = growth.pages[at++];
      range.pages[first + i] = page;
      pool_->add_ref(page);  // of this mapping; what the pool gave on the way goes with `growth`
      set_owner(page, range, first + i);
    }
    count_mapped(*block->range, static_cast<std::ptrdiff_t>(n));
    recorder_.note(EventKind::kMap, growth.scope.tag, block->address, block->bytes,
                   growth.arena.stream());
  }
  for (const PageRefs& refs : growth.outside) {
    for (std::size_t i = 0; i < refs.size(); ++i) {
      pool_->add_live(refs[i]);
      pool_->set_content(refs[i], Content::kDirty);
    }
  }
  for (Block* block : growth.claimed) {
    if (!std::exchange(block->is_shadow, false)) continue;
    const std::size_t first = block->range->page_index(block->address);
    const std::size_t n = block->bytes / page_bytes_;
    for (std::size_t i = first; i < first + n; ++i) {
      set_owner(block->range->pages[i], *block->range, i);
    }
    shadow_pages_ -= n;
    count_mapped(*block->range, static_cast<std::ptrdiff_t>(n));
  }
  for (Block* loan : growth.loans) {
    const std::size_t n = loan->bytes / page_bytes_;
    count_mapped(*loan->range, -static_cast<std::ptrdiff_t>(n));
    book_.pages_moved += n;
    shadow_pages_ += n;
    loan->range->arena.give_shadow(loan);
  }
}

void CachingAllocator::set_owner(PageId page, Range& range, std::size_t index) {
  owner_[page] = {&range, index};
}

void CachingAllocator::unmap_growth(Growth& growth) noexcept {
  for (Block* block : growth.mapped) {
    try {
      pool_->driver().unmap(block->address, block->bytes);
    } catch (const std::exception&) {
      lost_ = true;  // mapped, and we cannot say what
    }
  }
  growth.mapped.clear();
}

void CachingAllocator::abandon(Growth& growth) noexcept {
  unmap_growth(growth);
  if (lost_) return;
  growth.outside.clear();
  growth.pages.clear();
  growth.arena.unclaim(growth.claimed);
  for (Block* loan : growth.loans) loan->range->arena.unclaim({loan});
}

}  // namespace vattn
