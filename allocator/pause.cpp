// Tags: pausing gives their physical memory back while their addresses stay, resuming brings it
// back.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "grow.h"

namespace vattn {
namespace {

// A stream of the driver's own, for copies.
class CopyStream {
 public:
  explicit CopyStream(Driver& driver) : driver_(driver), stream_(driver.create_stream()) {}
  ~CopyStream() {
    try {
      driver_.destroy_stream(stream_);
    } catch (const std::exception&) {
      // It goes with its context.
    }
  }
  CopyStream(const CopyStream&) = delete;
  CopyStream& operator=(const CopyStream&) = delete;
  Stream get() const noexcept { return stream_; }

 private:
  Driver& driver_;
  Stream stream_;
};

}  // namespace

// What takes its time without the pool's lock. Others may use the state meanwhile, and its end
// waits until they are done.
class CachingAllocator::Resting {
 public:
  explicit Resting(CachingAllocator& allocator) : allocator_(allocator) {
    allocator_.parked_.store(true, std::memory_order_release);
  }
  ~Resting() {
    try {
      const DeviceLock nobody_else = allocator_.pool_->lock();
      allocator_.parked_.store(false, std::memory_order_release);
    } catch (const std::exception&) {
      // A forked child, in which there is nobody else.
      allocator_.parked_.store(false, std::memory_order_release);
    }
  }
  Resting(const Resting&) = delete;
  Resting& operator=(const Resting&) = delete;

 private:
  CachingAllocator& allocator_;
};

Scope& CachingAllocator::tag_scope(TagId tag, const char* what) {
  if (tag == kNoTag) {
    throw std::invalid_argument(std::string(what) + " needs a tag: memory without one stays");
  }
  if (tag < by_tag_.size() && by_tag_[tag] != nullptr) return *by_tag_[tag];
  return add_scope(tag);
}

template <typename F>
void CachingAllocator::for_each_live(Scope& scope, F visit) {
  for (const auto& arena : scope.arenas) {
    for (const auto& range : arena->ranges()) {
      for (Block* b = range->first; b != nullptr; b = b->next) {
        if (b->state == BlockState::kLive || b->state == BlockState::kPending) visit(b);
      }
    }
  }
}

std::size_t CachingAllocator::tag_live_bytes(TagId tag) {
  const Lock guard = lock();
  std::size_t bytes = 0;
  for_each_live(tag_scope(tag, "tag_live_bytes"), [&](Block* b) { bytes += b->bytes; });
  return bytes;
}

bool CachingAllocator::is_paused(TagId tag) {
  const Lock guard = lock();
  return tag < by_tag_.size() && by_tag_[tag] != nullptr && by_tag_[tag]->paused;
}

void CachingAllocator::set_tag_budget(TagId tag, std::size_t bytes) {
  const Lock guard = lock();
  Scope& scope = tag_scope(tag, "a budget");
  if (bytes != 0 && bytes < page_bytes_) {
    throw std::invalid_argument("a budget of " + std::to_string(bytes) +
                                " bytes is below one page of " + std::to_string(page_bytes_) +
                                "; give at least one page, or 0 for none");
  }
  scope.budget_pages = bytes / page_bytes_;
  scope.figures->budget.store(scope.budget_pages * page_bytes_, std::memory_order_relaxed);
}

void CachingAllocator::pause(TagId tag, bool backup, void* host, std::size_t host_bytes) {
  const Lock guard = lock();
  Scope& scope = tag_scope(tag, "pause");
  if (scope.paused) throw std::invalid_argument("the tag '" + scope.name + "' is paused already");
  if (!captures_.empty()) {
    throw std::invalid_argument("a CUDA graph is being captured: pause '" + scope.name +
                                "' before or after");
  }
  poll_pending(true, true);
  flush_all();  // a slab without live pieces is no live block
  std::size_t bytes = 0;
  for_each_live(scope, [&](Block* b) { bytes += b->bytes; });
  if (backup && host != nullptr && host_bytes < bytes) {
    throw std::invalid_argument("the host buffer has " + std::to_string(host_bytes) +
                                " bytes, and the live blocks of '" + scope.name + "' have " +
                                std::to_string(bytes));
  }
  {
    // A tag's tensors are used on streams that nobody has told us of, since nothing of them is
    // freed.
    const Resting resting(*this);
    pool_->driver().synchronize_all();
  }
  if (backup) {
    try {
      save(scope, host, bytes);
    } catch (...) {
      scope.backup = {};
      throw;
    }
  }
  DeviceLock pool_lock = park_and_lock_pool();
  const Busy busy(busy_);
  flush_all();
  drop_shadows(0, true, pool_lock);
  for (const auto& arena : scope.arenas) arena->set_gives(false);
  scope.paused = true;
  scope.has_backup = backup;
  scope.figures->state.store(1, std::memory_order_relaxed);
  recorder_.note(EventKind::kPause, tag, 0, bytes, 0);
  unmap_all(scope, pool_lock);
}

// Runs copies of all live blocks on a stream of their own, and waits for them, also when one fails:
// their memory is about to go.
template <typename F>
void CachingAllocator::copy_all(const std::vector<Block*>& live, F copy) {
  const CopyStream stream(pool_->driver());
  try {
    for (Block* block : live) copy(block, stream.get());
    pool_->driver().synchronize(stream.get());
  } catch (const std::exception&) {
    try {
      Fence(pool_->driver_ptr(), stream.get()).wait();
    } catch (const std::exception&) {
      lost_ = true;  // nobody can tell when they are done
    }
    throw;
  }
}

std::vector<Block*> CachingAllocator::live_blocks(Scope& scope) {
  std::vector<Block*> live;
  for_each_live(scope, [&](Block* block) { live.push_back(block); });
  return live;
}

void CachingAllocator::save(Scope& scope, void* host, std::size_t bytes) {
  if (host == nullptr) scope.backup.resize(bytes);
  scope.backup_at = host != nullptr ? static_cast<std::byte*>(host) : scope.backup.data();
  const std::vector<Block*> live = live_blocks(scope);
  std::byte* at = scope.backup_at;
  // It takes its time. Who needs pages meanwhile, with the pool's lock, may take idle ones from us.
  const Resting resting(*this);
  copy_all(live, [&](Block* block, Stream stream) {
    block->backup_offset = static_cast<std::size_t>(at - scope.backup_at);
    pool_->driver().copy_to_host(at, block->address, block->bytes, stream);
    at += block->bytes;
  });
}

std::vector<bool> CachingAllocator::shadow_pages(const Range& range) const {
  std::vector<bool> out(range.pages.size());
  for (const Block* b = range.first; b != nullptr; b = b->next) {
    if (b->state != BlockState::kShadow) continue;
    for (std::size_t i = 0; i < b->bytes / page_bytes_; ++i) {
      out[range.page_index(b->address) + i] = true;
    }
  }
  return out;
}

// Gives back all pages of a paused scope. A stretch that the driver fails to unmap stays as it is,
// and counts as mapped: that harms nobody.
void CachingAllocator::unmap_all(Scope& scope, DeviceLock&) {
  for (const auto& arena : scope.arenas) {
    for (const auto& range : arena->ranges()) {
      const std::vector<bool> shadow = shadow_pages(*range);
      const auto own = [&](std::size_t i) { return !shadow[i]; };
      for (const auto& [first, n] : stretches(*range, true, own)) {
        try {
          pool_->driver().unmap(range->base() + first * page_bytes_, n * page_bytes_);
        } catch (const DriverError& error) {
          if (error.fatal()) lost_ = true;
          continue;
        }
        for (std::size_t i = first; i < first + n; ++i) {
          leave_home(range->pages[i]);
          pool_->drop_ref(range->pages[i]);
          range->pages[i] = kNoPage;
        }
        count_mapped(*range, -static_cast<std::ptrdiff_t>(n));
      }
    }
  }
}

void CachingAllocator::resume(TagId tag) {
  const Lock guard = lock();
  Scope& scope = tag_scope(tag, "resume");
  if (!scope.paused) throw std::invalid_argument("the tag '" + scope.name + "' is not paused");
  DeviceLock pool_lock = park_and_lock_pool();
  const Busy busy(busy_);
  flush_all();
  map_live(scope, pool_lock);
  scope.paused = false;
  for (const auto& arena : scope.arenas) {
    arena->rebuild();
    arena->set_gives(true);
  }
  scope.figures->state.store(0, std::memory_order_relaxed);
  recorder_.note(EventKind::kResume, tag, 0, 0, 0);
}

// Pages under all live blocks of a paused scope, with their contents.
void CachingAllocator::map_live(Scope& scope, DeviceLock& pool_lock) {
  struct Piece {
    Range* range;
    std::size_t first, pages;
  };
  std::vector<Piece> pieces;
  std::vector<Address> homes;
  for (const auto& arena : scope.arenas) {
    for (const auto& range : arena->ranges()) {
      std::vector<bool> wanted(range->pages.size());
      for (const Block* b = range->first; b != nullptr; b = b->next) {
        if (b->state != BlockState::kLive && b->state != BlockState::kPending) continue;
        for (std::size_t i = range->page_index(b->address); i <= range->page_index(b->end() - 1);
             ++i) {
          wanted[i] = true;
        }
      }
      for (const auto& [first, n] :
           stretches(*range, false, [&](std::size_t i) { return wanted[i]; })) {
        pieces.push_back({range.get(), first, n});
        for (std::size_t i = 0; i < n; ++i) {
          homes.push_back(range->base() + (first + i) * page_bytes_);
        }
      }
    }
  }
  PageRefs refs = pages_for_resume(scope, homes, pool_lock);
  if (owner_.size() < pool_->page_slots()) owner_.resize(pool_->page_slots());
  std::size_t at = 0, done = 0;
  try {
    for (const Piece& piece : pieces) {
      std::vector<PageHandle> handles;
      for (std::size_t i = 0; i < piece.pages; ++i) handles.push_back(pool_->handle(refs[at++]));
      const Address base = piece.range->base() + piece.first * page_bytes_;
      pool_->driver().map(base, handles, page_bytes_);
      ++done;
      pool_->driver().set_access(base, piece.pages * page_bytes_);
    }
    if (scope.has_backup) restore(scope);
  } catch (const std::exception& error) {
    for (std::size_t i = 0; i < done; ++i) {
      try {
        pool_->driver().unmap(pieces[i].range->base() + pieces[i].first * page_bytes_,
                              pieces[i].pages * page_bytes_);
      } catch (const std::exception&) {
        lost_ = true;
      }
    }
    if (dynamic_cast<const OutOfPages*>(&error) == nullptr) throw;
    throw_out_of_memory(scope, homes.size() * page_bytes_, pool_lock, error.what());
  }
  at = 0;
  for (const Piece& piece : pieces) {
    for (std::size_t i = 0; i < piece.pages; ++i, ++at) {
      piece.range->pages[piece.first + i] = refs[at];
      set_owner(refs[at], *piece.range, piece.first + i);
      pool_->add_ref(refs[at]);
      pool_->add_live(refs[at]);
      pool_->set_content(refs[at], Content::kDirty);
    }
    count_mapped(*piece.range, static_cast<std::ptrdiff_t>(piece.pages));
  }
  for_each_live(scope, [](Block* b) { b->backup_offset = kNoBackup; });
  scope.backup.clear();
  scope.backup.shrink_to_fit();
  scope.backup_at = nullptr;
  scope.has_backup = false;
}

PageRefs CachingAllocator::pages_for_resume(Scope& scope, std::span<const Address> homes,
                                            DeviceLock& pool_lock) {
  const std::size_t bytes = homes.size() * page_bytes_;
  const auto lacking = [&] {
    const std::size_t allowed = allowed_pages(scope, true);
    return homes.size() > allowed ? homes.size() - allowed : 0;
  };
  try {
    if (homes.size() > allowed_pages(scope, false)) {
      throw OutOfPages("the budget of the tag is " + size_text(scope.budget_pages * page_bytes_));
    }
    const std::size_t unclaimed = pool_->unclaimed();
    const std::size_t wanted = homes.size() - std::min(homes.size(), unclaimed);
    if (wanted > 0 || lacking() > 0) give_back(std::max(wanted, lacking()), true, pool_lock);
    if (lacking() > 0) {
      throw OutOfPages("a limit or a budget leaves too little");
    }
    return pool_->acquire(homes, pool_lock);
  } catch (const OutOfPages& error) {
    throw_out_of_memory(scope, bytes, pool_lock, error.what());
  }
}

void CachingAllocator::restore(Scope& scope) {
  copy_all(live_blocks(scope), [&](Block* block, Stream stream) {
    if (block->backup_offset == kNoBackup) return;
    pool_->driver().copy_from_host(block->address, scope.backup_at + block->backup_offset,
                                   block->bytes, stream);
  });
}

}  // namespace vattn
