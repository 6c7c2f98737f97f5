// What an allocator tells, and what must hold.
#include <cstdio>

#include "grow.h"

namespace vattn {

std::string size_text(std::size_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", value, kUnits[unit]);
  return text;
}

void CachingAllocator::count_mapped(Range& range, std::ptrdiff_t pages) {
  Arena& arena = range.arena;
  Scope& scope = arena.scope();
  owned_pages_ += static_cast<std::size_t>(pages);
  scope.owned_pages += static_cast<std::size_t>(pages);
  scope.figures->mapped.store(scope.owned_pages * page_bytes_, std::memory_order_relaxed);
  const std::int64_t bytes = pages * static_cast<std::int64_t>(page_bytes_);
  figures_->mapped.store(owned_pages_ * page_bytes_, std::memory_order_relaxed);
  range.figures->mapped.store(
      range.figures->mapped.load(std::memory_order_relaxed) + static_cast<std::uint64_t>(bytes),
      std::memory_order_relaxed);
  for (StatGroup* group : {&book_.all, &book_.kinds[static_cast<std::size_t>(arena.kind())]}) {
    group->reserved_bytes.add(bytes);
  }
}

// Out of memory ---------------------------------------------------------------------------------

void CachingAllocator::throw_out_of_memory(const Scope& scope, std::size_t bytes,
                                           DeviceLock& pool_lock, const std::string& why) {
  ++book_.ooms;
  figures_->out_of_memory.fetch_add(1, std::memory_order_relaxed);
  recorder_.note(EventKind::kOutOfMemory, scope.tag, 0, bytes, 0);
  const PoolStats stats = pool_->stats_locked(pool_lock);
  const std::size_t ours = owned_pages_;
  const std::size_t stale = stats.stale_pages;
  const std::size_t others = stats.used_pages - std::min(stats.used_pages, ours + stale);
  std::string text =
      "CUDA out of memory. Tried to allocate " + size_text(bytes) + " on " +
      pool_->driver().name() + (scope.tag != kNoTag ? " under the tag '" + scope.name + "'" : "") +
      ": " + why + ". The pool has " + size_text(stats.budget_pages * page_bytes_) +
      ", of which tensors hold " + size_text(static_cast<std::size_t>(requests_.active_bytes()));
  std::string tags;
  for (const auto& each : scopes_) {
    const std::uint64_t live = each->figures->live.load(std::memory_order_relaxed);
    if ((each->tag == kNoTag && !each->is_graph) || (live == 0 && each->owned_pages == 0)) continue;
    tags += (tags.empty() ? "" : ", ") + each->name + ": " + size_text(live) +
            (each->paused ? " (paused)" : "");
  }
  if (!tags.empty()) text += " (" + tags + ")";
  text += ", their mapped memory is " + size_text(ours * page_bytes_) + ", of which " +
          size_text(idle_pages_.load() * page_bytes_) +
          " is idle; sequences and prefixes of KV caches" + " hold " +
          size_text(others * page_bytes_) + ", and " + size_text(stale * page_bytes_) +
          " can be evicted. Free tensors, end sequences, pause a tag, or raise the budget.";
  throw OutOfMemory(text);
}

// Figures ---------------------------------------------------------------------------------------

Figures CachingAllocator::figures() {
  const Lock guard = lock();
  Figures out = book_;
  requests_.fill(out);
  out.page_bytes = page_bytes_;
  out.limit_bytes = limit_pages_ * page_bytes_;
  out.idle_bytes = idle_pages_.load() * page_bytes_;
  out.shadow_bytes = shadow_pages_ * page_bytes_;
  out.pending_blocks = pending_.size() + deferred_.size();
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) {
      std::int64_t segments = 0;
      for (const auto& range : arena->ranges()) {
        const std::vector<bool> shadow = shadow_pages(*range);
        segments += static_cast<std::int64_t>(
            stretches(*range, true, [&](std::size_t i) { return !shadow[i]; }).size());
      }
      out.all.segments += segments;
      out.kinds[static_cast<std::size_t>(arena->kind())].segments += segments;
    }
  }
  return out;
}

void CachingAllocator::reset_peaks() {
  const Lock guard = lock();
  requests_.reset_peaks();
  for_each_group(
      [](StatGroup& group) { group.reserved_bytes.peak = group.reserved_bytes.current; });
}

void CachingAllocator::reset_accumulated() {
  const Lock guard = lock();
  requests_.reset_accumulated();
  for_each_group(
      [](StatGroup& group) { group.reserved_bytes.allocated = group.reserved_bytes.freed = 0; });
  book_.alloc_retries = book_.ooms = 0;
}

template <typename F>
void CachingAllocator::for_each_group(F visit) {
  visit(book_.all);
  for (StatGroup& group : book_.kinds) visit(group);
}

void CachingAllocator::set_limit(std::size_t bytes) {
  if (bytes != 0 && bytes < page_bytes_) {
    throw std::invalid_argument("a limit of " + std::to_string(bytes) +
                                " bytes is below one page of " + std::to_string(page_bytes_) +
                                "; give at least one page, or 0 for none");
  }
  const Lock guard = lock();
  limit_pages_ = bytes / page_bytes_;
  figures_->limit.store(limit_pages_ * page_bytes_, std::memory_order_relaxed);
}

void CachingAllocator::record(std::size_t max_events) {
  const Lock guard = lock();
  recorder_.start(max_events);
}

std::vector<Event> CachingAllocator::recorded(std::uint64_t* dropped) {
  const Lock guard = lock();
  if (dropped != nullptr) *dropped = recorder_.dropped();
  return recorder_.events();
}

// Segments --------------------------------------------------------------------------------------

namespace {

const char* state_name(BlockState state) {
  switch (state) {
    case BlockState::kLive:
      return "active_allocated";
    case BlockState::kPending:
      return "active_pending_free";
    default:
      return "inactive";
  }
}

}  // namespace

void CachingAllocator::add_pieces(const Slab& slab, std::vector<BlockInfo>& out) const {
  for (std::uint32_t i = 0; i < slab.pieces(); ++i) {
    const std::uint64_t bit = std::uint64_t{1} << i;
    const bool pending = (slab.pending_mask & bit) != 0;
    const bool live = (slab.free_mask & bit) == 0 && !pending;
    const BlockState state = pending ? BlockState::kPending
                             : live  ? BlockState::kLive
                                     : BlockState::kFree;
    const std::size_t asked = live ? slab.asked_bytes[i] : 0;
    out.push_back({slab.at(i), slab.piece_bytes, asked, state_name(state)});
  }
  const std::size_t rest = kSlabBytes - slab.pieces() * slab.piece_bytes;
  if (rest > 0) out.push_back({slab.at(slab.pieces()), rest, 0, "inactive"});
}

std::vector<SegmentInfo> CachingAllocator::segments() {
  const Lock guard = lock();
  std::vector<SegmentInfo> out;
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) {
      for (const auto& range : arena->ranges()) {
        bool open = false;
        for (const Block* b = range->first; b != nullptr; b = b->next) {
          const bool unmapped =
              b->state == BlockState::kUnmapped || b->state == BlockState::kShadow;
          if (unmapped) {
            open = false;
            continue;
          }
          if (!open) {
            out.push_back(
                {b->address, 0, arena->stream(), arena->kind(), scope->name, scope->graph, {}});
          }
          open = true;
          out.back().bytes += b->bytes;
          if (b->is_slab) {
            add_pieces(*slabs_.at(b->address), out.back().blocks);
          } else {
            out.back().blocks.push_back(
                {b->address, b->bytes, b->asked_bytes, state_name(b->state)});
          }
        }
      }
    }
  }
  return out;
}

// Invariants ------------------------------------------------------------------------------------

void CachingAllocator::check() {
  const Lock guard = lock();
  DeviceLock pool_lock = park_and_lock_pool();
  check_locked(pool_lock);
  pool_->check(pool_lock);
}

// Every slab with free pieces is on its list, once; what is mapped and not merged is counted.
void CachingAllocator::check_slabs() const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw InvariantError(std::string("slabs: ") + what);
  };
  std::size_t with_free = 0, on_lists = 0, quick = 0;
  for (const auto& [address, slab] : slabs_) {
    with_free += slab->free_mask != 0;
    if (slab->empty()) quick += kSlabBytes;
  }
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) {
      for (const Slab* first : arena->partial) {
        const Slab* before = nullptr;
        for (const Slab* slab = first; slab != nullptr; before = slab, slab = slab->next) {
          require(slab->prev == before && slab->home == arena.get(), "a list is broken");
          require(slab->free_mask != 0, "one on a list is full");
          ++on_lists;
        }
      }
      for (const auto& range : arena->ranges()) {
        for (const Block* b = range->first; b != nullptr; b = b->next) {
          if (b->state == BlockState::kQuick) quick += b->bytes;
        }
      }
    }
  }
  require(on_lists == with_free, "one with free pieces is on no list");
  require(quick == quick_bytes_.load(), "quick bytes are miscounted");
}

void CachingAllocator::check_locked(const DeviceLock&) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw InvariantError("allocator: " + what);
  };
  std::unordered_map<PageId, std::uint32_t> owners, mappings;
  std::size_t owned = 0, idle = 0, indexed = 0, shadows = 0;
  std::int64_t active = 0, active_bytes = 0;
  for (const auto& scope : scopes_) {
    std::size_t scope_owned = 0;
    for (const auto& arena : scope->arenas) {
      arena->check();
      std::size_t live = 0;
      for (const auto& range : arena->ranges()) {
        const std::vector<bool> shadow = shadow_pages(*range);
        for (const Block* b = range->first; b != nullptr; b = b->next) {
          const bool used = b->state == BlockState::kLive || b->state == BlockState::kPending;
          indexed += used || b->state == BlockState::kQuick;
          if (b->state == BlockState::kFree && arena->gives()) {
            idle += range->whole_pages(b->address, b->end());
          }
          if (!used) continue;
          if (b->is_slab) {
            const auto slab = slabs_.find(b->address);
            require(slab != slabs_.end() && slab->second->block == b, "a slab is not known");
            const auto used_pieces = static_cast<std::size_t>(
                std::popcount(slab->second->all_mask() & ~slab->second->free_mask));
            live += used_pieces;
            active_bytes += static_cast<std::int64_t>(used_pieces * slab->second->piece_bytes);
          } else {
            ++live;
            active_bytes += static_cast<std::int64_t>(b->bytes);
          }
        }
        for (std::size_t i = 0; i < range->pages.size(); ++i) {
          const PageId page = range->pages[i];
          if (page == kNoPage) continue;
          ++mappings[page];
          if (shadow[i]) {
            ++shadows;
            const Place& home = owner_[page];
            require(home.range == nullptr || home.range->pages[home.index] == page,
                    "a shadow's page belongs to a place that has another");
            continue;
          }
          require(owner_[page].range == range.get() && owner_[page].index == i,
                  "a page belongs elsewhere than to its block");
          ++owners[page];
          ++scope_owned;
          require(pool_->live(page) == 1,
                  "a page of it has live=" + std::to_string(pool_->live(page)));
        }
      }
      require(arena->has_live_blocks() == (live > 0), "count of live blocks is wrong");
      active += static_cast<std::int64_t>(live);
    }
    require(scope_owned == scope->owned_pages, "pages of " + scope->name + " are miscounted");
    owned += scope_owned;
  }
  for (const auto& [page, n] : owners) {
    require(n == 1, "page " + std::to_string(page) + " has " + std::to_string(n) + " owners");
  }
  for (const auto& [page, n] : mappings) {
    require(pool_->refs(page) == n, "page " + std::to_string(page) + " has " +
                                        std::to_string(pool_->refs(page)) + " references and " +
                                        std::to_string(n) + " mappings");
  }
  require(owned == owned_pages_, "pages are miscounted");
  require(shadows == shadow_pages_, "shadows are miscounted");
  require(idle == idle_pages_.load(), "idle pages are miscounted");
  require(indexed == by_address_.size(), "the index has entries of no block");
  require(active == requests_.active_blocks(), "active blocks are miscounted");
  require(active_bytes == requests_.active_bytes(), "active bytes are miscounted");
  check_slabs();
  std::uint64_t live_of_tags = 0;
  for (const auto& scope : scopes_) live_of_tags += scope->figures->live.load();
  require(live_of_tags == requests_.live_bytes(), "live bytes of tags are miscounted");
  for (const PendingFree& pending : pending_) {
    require(users_.find(pending.address) == users_.end(), "a pending block has users still");
  }
}

}  // namespace vattn
