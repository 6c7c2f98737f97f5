// Pages that leave their addresses: because they serve other ones by now, or go back to the pool.
#include <algorithm>
#include <thread>

#include "grow.h"

namespace vattn {

void CachingAllocator::flush_all() {
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) {
      for (Slab* slab : arena->partial) {
        while (slab != nullptr) {
          Slab* next = slab->next;
          if (slab->empty()) drop_slab(*slab);
          slab = next;
        }
      }
    }
  }
  // After all slabs: one may lie in another arena than the one on whose list it was.
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) arena->flush();
  }
}

CachingAllocator::~CachingAllocator() {
  if (!pool_->driver().usable()) return;  // a forked child: nothing of it exists there
  pool_->detach(this);
  if (mapper_ != nullptr) mapper_->drain();
  DeviceLock pool_lock = pool_->lock();
  busy_ = true;
  bool all_gone = !lost_;
  // A destructor has nobody to tell of an error: what cannot be unmapped stays until the process
  // ends, with its pages and its addresses.
  const auto attempt = [&](auto step) {
    try {
      step();
    } catch (const std::exception&) {
      all_gone = false;
    }
  };
  attempt([&] { pool_->driver().synchronize_all(); });
  attempt([&] { poll_pending(true, true); });
  attempt([&] { drop_shadows(0, true, pool_lock); });
  for (const auto& scope : scopes_) {
    attempt([&] { settled(*scope, true); });
    if (!lost_) unmap_all(*scope, pool_lock);
    for (const auto& arena : scope->arenas) all_gone = all_gone && arena->nothing_mapped();
  }
  if (all_gone) return;
  // Their ranges would be released with something mapped in them.
  for (auto& scope : scopes_) scope.release();  // NOLINT(bugprone-unused-return-value)
}

// Shadows ---------------------------------------------------------------------------------------

// Whether everything is done that used free addresses, or with `wait` once it is.
bool CachingAllocator::work_done(const Block& block, bool wait) {
  Arena& arena = block.range->arena;
  if (!settled(arena.scope(), wait)) return false;
  if (arena.known_done(&block)) return true;
  if (!captures_.empty()) return false;  // an event could become part of the graph
  if (arena.fence_done(&block)) return true;
  if (!wait) return false;
  if (const std::shared_ptr<Fence> fence = arena.fence()) fence->wait();
  return true;
}

// Unmaps shadows whose work is done, the oldest first, until at most `keep_pages` are left; with
// `wait` also those whose work is not.
void CachingAllocator::drop_shadows(std::size_t keep_pages, bool wait, DeviceLock& pool_lock) {
  if (shadow_pages_ <= keep_pages) return;
  std::vector<Block*> shadows;
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) {
      const std::vector<Block*> its = arena->shadows();
      shadows.insert(shadows.end(), its.begin(), its.end());
    }
  }
  std::sort(shadows.begin(), shadows.end(),
            [](const Block* a, const Block* b) { return a->freed_at < b->freed_at; });
  for (Block* block : shadows) {
    if (shadow_pages_ <= keep_pages) return;
    if (work_done(*block, wait)) drop_shadow(block, pool_lock);
  }
}

void CachingAllocator::drop_shadow(Block* block, DeviceLock& pool_lock) {
  pool_->driver().unmap(block->address, block->bytes);
  shadow_pages_ -= block->bytes / page_bytes_;
  forget_pages(block, pool_lock);
  // It and its neighbours without pages become one block, which may be another one.
  block->range->arena.give_unmapped(block);
}

// More shadows than this are unmapped by a thread with time for it: they cost the device's page
// tables something, and a program that needs so many does not repeat itself.
void CachingAllocator::drop_shadows_in_background() {
  const std::size_t most = 2 * owned_pages_;
  if (shadow_pages_ <= most || mapper_ == nullptr || job_queued_) return;
  try {
    job_queued_ = true;
    mapper_->submit([this] {
      job_queued_ = false;
      const Lock guard = lock();
      DeviceLock pool_lock = park_and_lock_pool();
      const Busy busy(busy_);
      drop_shadows(owned_pages_, false, pool_lock);
    });
  } catch (const std::exception&) {
    job_queued_ = false;
    // The thread has been stopped; whoever needs pages will drop shadows for them.
  }
}

// A page that belongs to no address any more.
void CachingAllocator::leave_home(PageId page) {
  owner_[page] = {};
  pool_->drop_live(page);
}

// The pages of a block that is not mapped any more.
void CachingAllocator::forget_pages(Block* block, const DeviceLock&) {
  Range& range = *block->range;
  const std::size_t first = range.page_index(block->address);
  for (std::size_t i = 0; i < block->bytes / page_bytes_; ++i) {
    pool_->drop_ref(range.pages[first + i]);
    range.pages[first + i] = kNoPage;
  }
  recorder_.note(EventKind::kUnmap, range.arena.scope().tag, block->address, block->bytes,
                 range.arena.stream());
}

// To the pool -----------------------------------------------------------------------------------

// Unmaps up to `pages` idle pages of free blocks, those freed longest ago first, and gives them to
// the pool. Those whose work is not done are left out, or with `wait` waited for. A page is free
// only where it is mapped nowhere: those without a shadow go first, so that what a program repeats
// stays arranged as far as it can.
std::size_t CachingAllocator::give_back(std::size_t pages, bool wait, DeviceLock& pool_lock) {
  flush_all();
  std::size_t given = give_idle(pages, wait, pool_lock);
  if (given < pages && idle_pages_.load() > 0 && shadow_pages_ > 0) {
    drop_shadows(0, wait, pool_lock);
    given += give_idle(pages - given, wait, pool_lock);
  }
  return given;
}

std::size_t CachingAllocator::give_idle(std::size_t pages, bool wait, DeviceLock& pool_lock) {
  if (pages == 0 || idle_pages_.load() == 0) return 0;
  std::size_t given = 0;
  for (Block* block : idle_blocks()) {
    if (given >= pages) break;
    if (work_done(*block, wait)) given += give_pages_of(block, pages - given, pool_lock);
  }
  return given;
}

// Those whole pages of a free block that have no shadow: others would not be free without it.
std::size_t CachingAllocator::give_pages_of(Block* block, std::size_t most, DeviceLock& pool_lock) {
  const Range& range = *block->range;
  const std::size_t first = range.page_index(range.page_ceil(block->address));
  std::size_t end = first + range.whole_pages(block->address, block->end());
  std::size_t given = 0;
  while (end > first && given < most) {
    std::size_t begin = end;
    while (begin > first && end - begin < most - given &&
           pool_->refs(range.pages[begin - 1]) == 1) {
      --begin;
    }
    if (begin == end) {
      --end;
      continue;
    }
    const Address from = range.base() + begin * page_bytes_;
    const bool all = from == block->address;
    Block* part = range.arena.cut(block, from, range.base() + end * page_bytes_);
    given += give_block(part, pool_lock);
    if (all) break;
    end = begin;
  }
  return given;
}

std::size_t CachingAllocator::give_block(Block* block, DeviceLock& pool_lock) {
  Arena& arena = block->range->arena;
  try {
    pool_->driver().unmap(block->address, block->bytes);
  } catch (...) {
    arena.unclaim({block});
    throw;
  }
  const std::size_t pages = block->bytes / page_bytes_;
  const std::size_t first = block->range->page_index(block->address);
  for (std::size_t i = first; i < first + pages; ++i) leave_home(block->range->pages[i]);
  forget_pages(block, pool_lock);
  count_mapped(*block->range, -static_cast<std::ptrdiff_t>(pages));
  arena.give_unmapped(block);
  return pages;
}

// The allocator's lock for one who holds the pool's. If its holder waits for the pool's, at rest,
// the state is ours until we let that go, and no lock is needed.
CachingAllocator::Lock CachingAllocator::lock_from_pool() {
  Lock guard(mutex_, std::try_to_lock);
  for (int tries = 0; !guard.owns_lock(); ++tries) {
    if (parked_.load(std::memory_order_acquire)) break;
    if (tries < 100) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    guard.try_lock();
  }
  return guard;
}

std::size_t CachingAllocator::reclaim(std::size_t pages, Effort effort, DeviceLock& pool_lock) {
  if (busy_ || lost_) return 0;  // it is this allocator that asks the pool
  const Lock guard = lock_from_pool();
  const Busy busy(busy_);
  unmap_paused(pool_lock);
  return give_back(pages, effort == Effort::kWait, pool_lock);
}

std::size_t CachingAllocator::idle_pages(const DeviceLock&) noexcept {
  if (!busy_ && !lost_ && quick_bytes_.load(std::memory_order_relaxed) >= page_bytes_) {
    try {
      const Lock guard = lock_from_pool();
      flush_all();
    } catch (const std::bad_alloc&) {
      // Then what is not merged does not count.
    }
  }
  return idle_pages_.load();
}

std::size_t CachingAllocator::trim(std::size_t keep_bytes) {
  const Lock guard = lock();
  DeviceLock pool_lock = park_and_lock_pool();
  const Busy busy(busy_);
  poll_pending(true, true);
  flush_all();
  unmap_paused(pool_lock);
  const std::size_t keep = keep_bytes / page_bytes_, idle = idle_pages_.load();
  give_back(idle > keep ? idle - keep : 0, true, pool_lock);
  if (keep == 0) drop_shadows(0, true, pool_lock);
  drop_released_scopes(true, pool_lock);
  const std::size_t kept = idle_pages_.load() * page_bytes_;
  return pool_->trim(keep_bytes > kept ? keep_bytes - kept : 0, pool_lock);
}

void CachingAllocator::settle() {
  if (mapper_ != nullptr) mapper_->drain();
  const Lock guard = lock();
  DeviceLock pool_lock = park_and_lock_pool();
  const Busy busy(busy_);
  drop_shadows(2 * owned_pages_, true, pool_lock);
}

// Released graph pools --------------------------------------------------------------------------

// Whether nothing can be replaying any more that uses a scope's memory; with `wait` it is so
// afterwards, unless a graph is being captured, during which nobody may wait for the device.
bool CachingAllocator::settled(Scope& scope, bool wait) {
  if (!scope.may_replay) return true;
  if (!wait || !captures_.empty()) return false;
  pool_->driver().synchronize_all();
  for (const auto& each : scopes_) {
    if (!each->pinned()) each->may_replay = false;
  }
  return true;
}

// Released graph pools in which nothing lives go, with their addresses.
void CachingAllocator::drop_released_scopes(bool wait, DeviceLock& pool_lock) {
  if (!captures_.empty()) return;
  flush_all();  // their free blocks are known to nobody but them then
  for (std::size_t i = 0; i < scopes_.size();) {
    Scope& scope = *scopes_[i];
    const auto& arenas = scope.arenas;
    const bool empty = scope.is_graph && scope.graph_users == 0 &&
                       std::all_of(arenas.begin(), arenas.end(), [](const auto& arena) {
                         return !arena->has_live_blocks() && arena->shadows().empty();
                       });
    const bool idle = empty && settled(scope, wait) &&
                      std::all_of(arenas.begin(), arenas.end(),
                                  [](const auto& arena) { return arena->all_done(); });
    if (!idle || !unmap_free(scope, pool_lock)) {
      ++i;
      continue;
    }
    scopes_.erase(scopes_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

// Unmaps a scope in which nothing lives; false if the driver failed for some of it, which is free
// as before then.
bool CachingAllocator::unmap_free(Scope& scope, DeviceLock& pool_lock) {
  for (const auto& arena : scope.arenas) arena->set_gives(false);
  unmap_all(scope, pool_lock);
  bool all = true;
  for (const auto& arena : scope.arenas) {
    if (arena->nothing_mapped()) continue;
    all = false;
    break;
  }
  if (all) return true;
  for (const auto& arena : scope.arenas) {
    arena->rebuild();
    arena->set_gives(true);
  }
  return false;
}

// What the driver failed to unmap when its tag was paused.
void CachingAllocator::unmap_paused(DeviceLock& pool_lock) {
  for (const auto& scope : scopes_) {
    if (scope->paused && scope->owned_pages > 0) unmap_all(*scope, pool_lock);
  }
}

}  // namespace vattn
