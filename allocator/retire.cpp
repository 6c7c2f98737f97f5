// Pages that leave their addresses: because they serve other ones by now, or go back to the pool.
#include <algorithm>
#include <thread>

#include "grow.h"

namespace vattn {

void CachingAllocator::flush_all() {
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) {
      for (Slab* slab : arena->partial) {
        if (slab != nullptr && slab->empty()) drop_slab(*slab);
      }
      arena->flush();
    }
  }
}

CachingAllocator::~CachingAllocator() {
  pool_->detach(this);
  if (!pool_->driver().usable()) return;
  if (mapper_ != nullptr) mapper_->drain();
  DeviceLock pool_lock = pool_->lock();
  busy_ = true;
  // A destructor has nobody to tell of an error: what cannot be unmapped stays until the process
  // ends, with its pages.
  for (const Retiring& item : std::exchange(retiring_, {})) {
    try {
      item.fence->wait();
      pool_->driver().unmap(item.block->address, item.block->bytes);
      forget_pages(item.block, pool_lock);
    } catch (const std::exception&) {
    }
  }
  for (const auto& scope : scopes_) {
    try {
      wait_for_scope(*scope);
    } catch (const std::exception&) {
    }
    unmap_all(*scope, pool_lock);
    scope->figures->device.store(-1, std::memory_order_relaxed);
  }
}

// Old mappings ----------------------------------------------------------------------------------

void CachingAllocator::retire(Block* block, std::shared_ptr<Fence> fence) {
  block->state = BlockState::kRetiring;
  retiring_.push_back({block, std::move(fence)});
}

// The unmapping is for a thread with time for it. A job that found nothing done is not repeated:
// the next growth asks again.
void CachingAllocator::retire_in_background() {
  if (retiring_.empty() || mapper_ == nullptr || job_queued_) return;
  job_queued_ = true;
  mapper_->submit([this] {
    while (true) {
      const Lock guard = lock();
      job_queued_ = false;
      DeviceLock pool_lock = park_and_lock_pool();
      const Busy busy(busy_);
      if (!retire_one(pool_lock, false)) return;
    }
  });
}

void CachingAllocator::retire_done(DeviceLock& lock, bool wait) {
  if (mapper_ != nullptr && !wait) return;
  while (retire_one(lock, wait)) {
  }
}

// Unmaps one block whose work is done; false if there is none.
bool CachingAllocator::retire_one(DeviceLock& pool_lock, bool wait) {
  for (std::size_t i = 0; i < retiring_.size(); ++i) {
    const Retiring item = retiring_[i];
    if (wait) item.fence->wait();
    if (!item.fence->done()) continue;
    pool_->driver().unmap(item.block->address, item.block->bytes);
    retiring_.erase(retiring_.begin() + static_cast<std::ptrdiff_t>(i));
    forget_pages(item.block, pool_lock);
    item.block->range->arena.give_unmapped(item.block);
    return true;
  }
  return false;
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
// the pool. Those whose work is not done are left out, or with `wait` waited for.
std::size_t CachingAllocator::give_back(std::size_t pages, bool wait, DeviceLock& pool_lock) {
  flush_all();
  while (retire_one(pool_lock, wait)) {
  }
  std::size_t given = 0;
  for (Block* block : idle_blocks()) {
    if (given >= pages) break;
    Arena& arena = block->range->arena;
    if (!settled(arena.scope(), wait)) continue;
    if (!arena.fence_done(block)) {
      const std::shared_ptr<Fence> fence = wait ? arena.fence() : nullptr;
      if (fence == nullptr) continue;
      fence->wait();
    }
    given += give_block(arena.cut_pages(block, pages - given), pool_lock);
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
  std::size_t freed = 0;
  for (std::size_t i = 0; i < pages; ++i) {
    const PageId page = block->range->pages[first + i];
    pool_->drop_live(page);
    freed += pool_->refs(page) == 1;  // else an old mapping is still there
  }
  forget_pages(block, pool_lock);
  count_mapped(arena, -static_cast<std::ptrdiff_t>(pages));
  arena.give_unmapped(block);
  return freed;
}

std::size_t CachingAllocator::reclaim(std::size_t pages, Effort effort, DeviceLock& pool_lock) {
  if (busy_ || lost_) return 0;  // it is this allocator that asks the pool
  Lock guard(mutex_, std::try_to_lock);
  for (int tries = 0; !guard.owns_lock(); ++tries) {
    // Its holder waits for the lock that we hold, at rest: until we let it go its state is ours.
    if (parked_.load(std::memory_order_acquire)) break;
    if (tries < 100) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    guard = Lock(mutex_, std::try_to_lock);
  }
  const Busy busy(busy_);
  return give_back(pages, effort == Effort::kWait, pool_lock);
}

std::size_t CachingAllocator::trim(std::size_t keep_bytes) {
  const Lock guard = lock();
  DeviceLock pool_lock = park_and_lock_pool();
  const Busy busy(busy_);
  poll_pending(true, true);
  flush_all();
  const std::size_t keep = keep_bytes / page_bytes_, idle = idle_pages_.load();
  give_back(idle > keep ? idle - keep : 0, true, pool_lock);
  drop_empty_scopes();
  const std::size_t kept = idle_pages_.load() * page_bytes_;
  return pool_->trim(keep_bytes > kept ? keep_bytes - kept : 0, pool_lock);
}

void CachingAllocator::settle() {
  if (mapper_ != nullptr) mapper_->drain();
  const Lock guard = lock();
  DeviceLock pool_lock = park_and_lock_pool();
  const Busy busy(busy_);
  retire_done(pool_lock, true);
}

// Released graph pools --------------------------------------------------------------------------

// Whether what replays of a graph pool's graphs were given before its release is done. Ordinary
// scopes are always settled.
bool CachingAllocator::settled(Scope& scope, bool wait) {
  std::erase_if(scope.owed_fences, [&](Stream stream) {
    if (capturing(stream)) return false;
    try {
      scope.fences.push_back(std::make_shared<Fence>(pool_->driver_ptr(), stream));
    } catch (const DriverError& error) {
      if (error.fatal()) throw;  // a stream that is gone has nothing left to do
    }
    return true;
  });
  std::erase_if(scope.fences, [&](const std::shared_ptr<Fence>& fence) {
    if (wait) fence->wait();
    return fence->done();
  });
  return scope.owed_fences.empty() && scope.fences.empty();
}

// Scopes of released graph pools that hold nothing any more go, with their addresses.
void CachingAllocator::drop_empty_scopes() {
  std::erase_if(scopes_, [&](const std::unique_ptr<Scope>& scope) {
    if (!scope->is_graph || scope->graph_users > 0 || scope->owned_pages > 0) return false;
    for (const auto& arena : scope->arenas) {
      if (arena->has_live_blocks() || !arena->all_unmapped()) return false;
    }
    scope->figures->device.store(-1, std::memory_order_relaxed);
    return true;
  });
}

}  // namespace vattn
