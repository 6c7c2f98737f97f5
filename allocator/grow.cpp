// A request that nothing mapped can hold: which addresses it gets, and which pages.
#include "grow.h"

#include <algorithm>
#include <string>

namespace vattn {

DeviceLock CachingAllocator::park_and_lock_pool() {
  parked_.store(true, std::memory_order_release);
  DeviceLock guard = pool_->lock();
  parked_.store(false, std::memory_order_release);
  return guard;
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
  retire_done(pool_lock, false);
  if (Block* block = take_again(arena, bytes, align)) return block;
  if (bytes / page_bytes_ > pool_->stats_locked(pool_lock).budget_pages) {
    throw_out_of_memory(scope, bytes, pool_lock, "it is more than the whole budget");
  }
  Growth growth(*pool_, scope, arena);
  const Window window = arena.best_window(bytes, align);
  growth.need = window.missing_pages;
  growth.bytes = bytes;
  growth.claimed = arena.claim(window);
  try {
    find_pages(growth, pool_lock);
    map_claimed(growth);
  } catch (const OutOfPages& error) {
    abandon(growth);
    throw_out_of_memory(scope, bytes, pool_lock, error.what());
  } catch (...) {
    abandon(growth);
    throw;
  }
  commit(growth);
  Block* block = arena.merge_claimed(growth.claimed, window.begin, bytes);
  retire_in_background();
  return block;
}

// Pages -----------------------------------------------------------------------------------------

// How many more pages a scope may have: from outside of this allocator, or from other scopes.
std::size_t CachingAllocator::allowed_pages(const Scope& scope, bool from_outside) const noexcept {
  std::size_t allowed = ~std::size_t{0};
  if (scope.budget_pages != 0) {
    allowed = scope.budget_pages - std::min(scope.budget_pages, scope.owned_pages);
  }
  if (from_outside && limit_pages_ != 0) {
    allowed = std::min(allowed, limit_pages_ - std::min(limit_pages_, owned_pages_));
  }
  return allowed;
}

// Pages for all that a growth lacks, from the cheapest source first. Throws OutOfPages.
void CachingAllocator::find_pages(Growth& growth, DeviceLock& pool_lock) {
  const bool captured = capturing(growth.arena.stream());
  const auto from_pool = [&](std::size_t most, Effort effort) {
    const std::size_t allowed = allowed_pages(growth.scope, true) - growth.from_outside();
    take_from_pool(growth, std::min({growth.lacking(), most, allowed}), effort, pool_lock);
  };
  // As long as there is less than the program ever had in use at once, new pages will be needed
  // anyway. Beyond that, what lies idle serves before anything is created.
  const std::size_t peak =
      std::max(static_cast<std::size_t>(book_.all.allocated_bytes.peak),
               static_cast<std::size_t>(book_.all.allocated_bytes.current) + growth.bytes) /
      page_bytes_;
  const bool young = owned_pages_ + growth.need <= peak;
  from_pool(pool_->stats_locked(pool_lock).free_pages, Effort::kNone);
  if (young) from_pool(growth.lacking(), Effort::kNone);
  borrow(growth, captured ? Reach::kDone : Reach::kOwnOrder);
  if (!young) from_pool(growth.lacking(), Effort::kNone);
  if (growth.lacking() == 0) return;

  ++book_.alloc_retries;
  if (!captured) {
    borrow(growth, Reach::kOtherStreams);
    if (growth.lacking() > 0 && !pending_.empty()) {
      poll_pending(true, true);
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
      pages = std::min(pages - 1, pages <= there ? free : there);
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
      pages = std::min(pages, allowed_pages(growth.scope, false) - growth.from_other_scopes());
    }
    if (pages == 0 || !may_use(arena, block, growth.arena.stream(), reach)) continue;
    std::shared_ptr<Fence> fence = arena.fence();
    if (fence == nullptr) continue;
    Block* part = arena.cut_pages(block, pages);
    growth.loans.push_back({part, std::move(fence)});
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
  if (arena.fence_done(block)) return true;
  if (reach != Reach::kOtherStreams) return false;
  const std::shared_ptr<Fence> fence = arena.fence();
  if (fence == nullptr) return false;
  fence->order_before(stream);
  return true;
}

// Free blocks with whole pages that others may have, by the time they were freed.
std::vector<Block*> CachingAllocator::idle_blocks() {
  std::vector<Block*> idle;
  for (const auto& scope : scopes_) {
    if (scope->paused || scope->pinned()) continue;
    for (const auto& arena : scope->arenas) {
      if (capturing(arena->stream())) continue;  // a fence there would become part of the graph
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

void CachingAllocator::map_claimed(Growth& growth) {
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

void CachingAllocator::commit(Growth& growth) {
  std::size_t at = 0;
  for (Block* block : growth.mapped) {
    Range& range = *block->range;
    const std::size_t first = range.page_index(block->address);
    const std::size_t n = block->bytes / page_bytes_;
    if (range.pages.size() < first + n) range.pages.resize(first + n, kNoPage);
    for (std::size_t i = 0; i < n; ++i) {
      const PageId page = growth.pages[at++];
      range.pages[first + i] = page;
      pool_->add_ref(page);  // of this mapping; what the pool gave on the way goes with `growth`
    }
    recorder_.note(EventKind::kMap, growth.scope.tag, block->address, block->bytes,
                   growth.arena.stream());
  }
  for (const PageRefs& refs : growth.outside) {
    for (std::size_t i = 0; i < refs.size(); ++i) {
      pool_->add_live(refs[i]);
      pool_->set_content(refs[i], Content::kDirty);
    }
  }
  count_mapped(growth.arena, static_cast<std::ptrdiff_t>(growth.pages.size()));
  for (const Loan& loan : growth.loans) {
    count_mapped(loan.block->range->arena,
                 -static_cast<std::ptrdiff_t>(loan.block->bytes / page_bytes_));
    book_.pages_moved += loan.block->bytes / page_bytes_;
    retire(loan.block, loan.fence);
  }
}

void CachingAllocator::abandon(Growth& growth) noexcept {
  for (Block* block : growth.mapped) {
    try {
      pool_->driver().unmap(block->address, block->bytes);
    } catch (const std::exception&) {
      lost_ = true;  // mapped, and we cannot say what
    }
  }
  if (lost_) return;
  growth.arena.unclaim(growth.claimed);
  for (const Loan& loan : growth.loans) loan.block->range->arena.unclaim({loan.block});
}

}  // namespace vattn
