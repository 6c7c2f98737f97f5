// Blocks that more streams use than the one they were allocated for, and graph captures.
#include <algorithm>

#include "caching_allocator.h"

namespace vattn {
namespace {

constexpr int kManyReleased = 8;

}  // namespace

void CachingAllocator::record_stream(void* address, Stream stream) {
  if (address == nullptr) return;
  const Lock guard = lock();
  const Address at = reinterpret_cast<Address>(address);
  Stream own = 0;
  Block* block = block_at(at);
  Slab* slab = block == nullptr ? slab_at(at) : nullptr;
  std::uint64_t bit = 0;
  if (slab != nullptr) {
    const std::uint32_t piece = slab->piece_of(at);
    if (slab->at(piece) != at || !slab->is_live(piece)) throw_unknown("record_stream", at);
    bit = std::uint64_t{1} << piece;
    own = slab->block->range->arena.stream();
  } else if (block != nullptr) {
    own = block->range->arena.stream();
  } else {
    throw_unknown("record_stream", at);
  }
  if (stream == own) return;
  std::vector<Stream>& users = users_[at];
  if (std::find(users.begin(), users.end(), stream) == users.end()) users.push_back(stream);
  if (slab != nullptr) {
    slab->users_mask |= bit;
  } else {
    block->has_users = true;
  }
}

// Whether a stream is being captured, as far as those who capture have told us.
bool CachingAllocator::capturing(Stream stream) {
  return std::any_of(captures_.begin(), captures_.end(), [&](const Capture& capture) {
    try {
      return capture.filter(stream);
    } catch (const std::exception&) {
      return true;  // PyTorch's asks the driver; without an answer no event is recorded
    }
  });
}

// Marks the end of what other streams do with a block that is freed now. An event in a stream that
// is being captured would become part of the graph, and a capture begins a moment after it was told
// to us: during one such blocks wait for its end. Those whose events the driver refuses wait, too:
// whoever frees a tensor cannot be told.
bool CachingAllocator::begin_pending(Address address) {
  const auto found = users_.find(address);
  if (found == users_.end()) return false;
  PendingFree pending{address, found->second, {}};
  try {
    if (!captures_.empty()) {
      deferred_.push_back(address);
      return true;
    }
    for (const Stream stream : found->second) {
      if (auto fence = fence_in(pool_->driver_ptr(), stream)) {
        pending.fences.push_back(std::move(fence));
      }
    }
  } catch (const DriverError&) {
    deferred_.push_back(address);
    return true;
  }
  pending_.push_back(std::move(pending));
  users_.erase(found);
  return true;
}

void CachingAllocator::start_deferred() {
  std::vector<Address> waiting = std::exchange(deferred_, {});
  for (const Address address : waiting) {
    if (!begin_pending(address)) finish_free(address);
  }
}

// Frees those blocks whose streams are done: the oldest ones, or of all those that are. On a
// request's way only the oldest is asked about, which costs one query.
void CachingAllocator::poll_pending(bool all, bool wait) {
  if (all && captures_.empty()) start_deferred();
  const auto is_done = [wait](const PendingFree& pending) {
    for (const auto& fence : pending.fences) {
      if (wait) fence->wait();
      if (!fence->done()) return false;
    }
    return true;
  };
  for (std::size_t i = 0; i < pending_.size();) {
    bool done = false, failed = false;
    try {
      done = is_done(pending_[i]);
    } catch (const DriverError& error) {
      if (error.fatal()) throw;
      failed = true;  // an event that got into a graph, or the like: others take its place
    }
    if (done || failed) {
      PendingFree pending = std::move(pending_[i]);
      pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(i));
      if (done) {
        finish_free(pending.address);
      } else {
        users_[pending.address] = std::move(pending.users);
        deferred_.push_back(pending.address);
      }
    } else if (all) {
      ++i;
    } else {
      return;
    }
  }
}

// No stream uses the block any more, but for its own, in whose order it is used again.
void CachingAllocator::finish_free(Address address) {
  const auto found = by_address_.find(address);
  Block* block = found != by_address_.end() && !found->second->is_slab ? found->second : nullptr;
  Slab* slab = block == nullptr ? slab_at(address) : nullptr;
  Arena& arena = (block != nullptr ? block : slab->block)->range->arena;
  const std::size_t bytes = block != nullptr ? block->bytes : slab->piece_bytes;
  const SizeKind kind = slab != nullptr ? SizeKind::kSmall : arena.kind();
  requests_.completed(kind, bytes);
  arena.count_live(-1);
  if (recorder_.on()) {
    const std::size_t asked =
        block != nullptr ? block->asked_bytes : slab->asked_bytes[slab->piece_of(address)];
    recorder_.note(EventKind::kFreeCompleted, arena.scope().tag, address, asked, arena.stream());
  }
  if (block != nullptr) {
    block->has_users = false;
    arena.give(block);
  } else {
    give_piece(*slab, slab->piece_of(address));
  }
}

// Graph captures ---------------------------------------------------------------------------------

Scope* CachingAllocator::graph_scope(GraphPoolId id) noexcept {
  for (const auto& scope : scopes_) {
    if (scope->is_graph && scope->graph == id && scope->graph_users > 0) return scope.get();
  }
  return nullptr;
}

void CachingAllocator::begin_graph_pool(GraphPoolId id, std::function<bool(Stream)> filter) {
  const Lock guard = lock();
  for (const Capture& capture : captures_) {
    if (capture.id == id) {
      throw std::invalid_argument("the graph pool (" + std::to_string(id.first) + ", " +
                                  std::to_string(id.second) +
                                  ") is being allocated to already; end that first");
    }
  }
  drop_released();
  mark_freed();
  Scope* scope = graph_scope(id);
  if (scope == nullptr) {
    auto made = std::make_unique<Scope>();
    made->name = "graph pool " + std::to_string(id.first) + "." + std::to_string(id.second);
    made->graph = id;
    made->is_graph = true;
    made->figures = tag_entry(figures_.index(), made->name);
    made->figures->state.store(2, std::memory_order_relaxed);
    made->figures.show();
    scope = made.get();
    scopes_.push_back(std::move(made));
  }
  ++scope->graph_users;
  captures_.push_back({id, std::move(filter)});
}

void CachingAllocator::drop_released() {
  const auto released = std::count_if(scopes_.begin(), scopes_.end(), [](const auto& scope) {
    return scope->is_graph && scope->graph_users == 0;
  });
  if (released == 0) return;
  DeviceLock pool_lock = park_and_lock_pool();
  const Busy busy(busy_);
  drop_released_scopes(released >= kManyReleased, pool_lock);
}

// Fences behind what has been freed, while there may be some: none can be recorded in a stream once
// it is captured, and then nobody could have what is idle there.
void CachingAllocator::mark_freed() {
  if (!captures_.empty()) return;
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) {
      if (scope->pinned()) continue;
      try {
        arena->fence();
      } catch (const DriverError& error) {
        if (error.fatal()) throw;  // else what is idle there stays so during the capture
      }
    }
  }
}

void CachingAllocator::end_graph_pool(GraphPoolId id) {
  const Lock guard = lock();
  const auto ended = std::find_if(captures_.begin(), captures_.end(),
                                  [&](const Capture& capture) { return capture.id == id; });
  if (ended == captures_.end()) {
    throw std::invalid_argument("nobody allocates to the graph pool (" + std::to_string(id.first) +
                                ", " + std::to_string(id.second) + ")");
  }
  captures_.erase(ended);
  if (captures_.empty()) start_deferred();
}

// The last user's release makes the pool's memory ordinary. A replay may have been on any stream,
// also on one that is not known here, so others get its pages only after one wait for the device:
// where they are asked for with time to wait, or when many such pools have gathered.
void CachingAllocator::release_graph_pool(GraphPoolId id) {
  const Lock guard = lock();
  Scope* scope = graph_scope(id);
  if (scope == nullptr) {
    throw std::invalid_argument("there is no graph pool (" + std::to_string(id.first) + ", " +
                                std::to_string(id.second) + ") to release");
  }
  if (--scope->graph_users > 0) return;
  scope->may_replay = true;
  // PyTorch destroys a graph whose capture failed without ending it.
  std::erase_if(captures_, [&](const Capture& capture) { return capture.id == id; });
  for (const auto& arena : scope->arenas) arena->set_gives(true);
  if (captures_.empty()) start_deferred();
}

}  // namespace vattn
