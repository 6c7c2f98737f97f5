#include "caching_allocator.h"

#include <algorithm>
#include <string>

namespace vattn {
namespace {

constexpr int kSpins = 200;
constexpr std::uint32_t kPollAll = 64;

void relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::size_t rounded(std::size_t bytes) { return round_up(bytes, kBlockBytes); }

std::string address_text(Address address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

StatsEntry<AllocatorFigures> shown_figures(const PagePool& pool) {
  StatsEntry<AllocatorFigures> figures = allocator_entry(pool.figures_index());
  figures.show();
  return figures;
}

}  // namespace

CachingAllocator::CachingAllocator(std::shared_ptr<PagePool> pool, std::shared_ptr<Mapper> mapper,
                                   const CachingAllocatorOptions& options)
    : pool_(std::move(pool)),
      mapper_(std::move(mapper)),
      page_bytes_(pool_->page_bytes()),
      range_bytes_(round_up(options.range_bytes != 0
                                ? options.range_bytes
                                : pool_->stats().budget_pages * page_bytes_ / 8 * 9,
                            page_bytes_)),
      figures_(shown_figures(*pool_)),
      idle_pages_(figures_->idle_pages) {
  if (mapper_ != nullptr && mapper_->pool() != pool_) {
    throw std::invalid_argument("the mapper belongs to another pool than the allocator's");
  }
  pool_->attach(this);
}

// The fast paths ---------------------------------------------------------------------------------

CachingAllocator::Lock CachingAllocator::lock() {
  require_usable();
  Lock guard(mutex_, std::try_to_lock);
  // What others do with it in hand mostly takes tens of nanoseconds: less than going to sleep.
  for (int tries = 0; !guard.owns_lock() && tries < kSpins; ++tries) {
    relax();
    guard.try_lock();
  }
  if (!guard.owns_lock()) guard.lock();
  if (lost_) {
    throw DriverError("allocate", 0, "an earlier failure of the driver could not be undone", true);
  }
  return guard;
}

void* CachingAllocator::allocate(std::size_t bytes, Stream stream) {
  if (bytes == 0) return nullptr;
  const Lock guard = lock();
  Scope& scope = scope_for(stream);
  if (scope.paused) {
    throw std::invalid_argument("memory of the tag '" + scope.name +
                                "' is paused: resume it before allocating under it");
  }
  // The oldest; all of them now and then, since one stream may be far behind the others.
  if (!pending_.empty()) poll_pending(++polls_ % kPollAll == 0, false);
  if (bytes <= kSlabMaxPiece) return allocate_piece(scope, stream, bytes);
  if (bytes > kUnknownBytes / 2) {
    DeviceLock pool_lock = park_and_lock_pool();
    throw_out_of_memory(scope, bytes, pool_lock, "no device has so much");
  }
  const std::size_t size = rounded(bytes);
  const SizeKind kind = size_kind(size);
  Block* block = allocate_block(scope, arena_for(scope, stream, kind), size);
  block->asked_bytes = bytes;
  count_allocation(scope, block->range->arena.kind(), size, bytes);
  recorder_.note(EventKind::kAlloc, scope.tag, block->address, bytes, stream);
  return reinterpret_cast<void*>(block->address);
}

Block* CachingAllocator::allocate_block(Scope& scope, Arena& arena, std::size_t bytes) {
  Block* block = arena.take(bytes);
  if (block == nullptr) block = take_hole(scope, arena, bytes, kBlockBytes);
  if (block == nullptr) block = grow(scope, arena, bytes, kBlockBytes);
  block->state = BlockState::kLive;
  block->range->arena.count_live(1);
  return block;
}

// Before a small request makes an arena grow: what is left over between large blocks of its stream.
Block* CachingAllocator::take_hole(Scope& scope, Arena& arena, std::size_t bytes,
                                   std::size_t align) {
  if (arena.kind() == SizeKind::kLarge) return nullptr;
  for (const auto& other : scope.arenas) {
    if (other->stream() == arena.stream() && other->kind() == SizeKind::kLarge) {
      return other->take_hole(bytes, align);
    }
  }
  return nullptr;
}

void CachingAllocator::free(void* address, std::size_t bytes) {
  if (address == nullptr) return;
  const Lock guard = lock();
  const Address at = reinterpret_cast<Address>(address);
  // Torch tells the size, which says where to look; without it a block that is no slab goes first.
  if (bytes <= kSlabMaxPiece || block_at(at) == nullptr) {
    Slab* slab = slab_at(at);
    if (slab != nullptr) return free_piece(*slab, at, bytes);
  }
  Block* block = block_at(at);
  if (block == nullptr) throw_bad_free(at);
  free_block(block, bytes);
}

void CachingAllocator::free_block(Block* block, std::size_t bytes) {
  if (bytes != kUnknownBytes && bytes != block->asked_bytes) {
    ++book_.bad_frees;
    throw std::invalid_argument("free of " + address_text(block->address) + " with a size of " +
                                std::to_string(bytes) + " bytes, but the block has " +
                                std::to_string(block->asked_bytes) +
                                "; give the size that was allocated");
  }
  Arena& arena = block->range->arena;
  Scope& scope = arena.scope();
  recorder_.note(EventKind::kFreeRequested, scope.tag, block->address, block->asked_bytes,
                 arena.stream());
  const bool pending = block->has_users && begin_pending(block->address);
  count_free(scope, arena.kind(), block->bytes, block->asked_bytes);
  if (pending) {
    block->state = BlockState::kPending;
    return;
  }
  finish_free(block->address);
}

// Small requests ---------------------------------------------------------------------------------

void* CachingAllocator::allocate_piece(Scope& scope, Stream stream, std::size_t bytes) {
  const std::size_t piece_bytes = rounded(bytes);
  Arena& arena = arena_for(scope, stream, SizeKind::kSmall);
  Slab*& first = arena.partial[slab_class(bytes)];
  Slab* slab = first != nullptr ? first : new_slab(scope, arena, piece_bytes);
  if (slab->empty()) quick_bytes_ -= kSlabBytes;
  const auto piece = static_cast<std::uint32_t>(std::countr_zero(slab->free_mask));
  slab->free_mask &= slab->free_mask - 1;
  slab->asked_bytes[piece] = static_cast<std::uint16_t>(bytes);
  if (slab->free_mask == 0) {
    first = slab->next;
    if (first != nullptr) first->prev = nullptr;
    slab->next = nullptr;
  }
  slab->block->range->arena.count_live(1);
  count_allocation(scope, SizeKind::kSmall, piece_bytes, bytes);
  const Address address = slab->at(piece);
  recorder_.note(EventKind::kAlloc, scope.tag, address, bytes, stream);
  return reinterpret_cast<void*>(address);
}

Slab* CachingAllocator::new_slab(Scope& scope, Arena& arena, std::size_t piece_bytes) {
  auto slab = std::make_unique<Slab>();
  Block* block = arena.take_slab_block();
  if (block == nullptr) block = take_hole(scope, arena, kSlabBytes, kSlabBytes);
  if (block == nullptr) block = grow(scope, arena, kSlabBytes, kSlabBytes);
  block->state = BlockState::kLive;
  block->is_slab = true;
  slab->block = block;
  slab->home = &arena;
  slab->piece_bytes = piece_bytes;
  slab->free_mask = slab->all_mask();
  quick_bytes_ += kSlabBytes;
  link(*slab);
  return slabs_.emplace(block->address, std::move(slab)).first->second.get();
}

void CachingAllocator::free_piece(Slab& slab, Address address, std::size_t bytes) {
  const std::uint32_t piece = slab.piece_of(address);
  const std::uint64_t bit = std::uint64_t{1} << piece;
  const bool first_byte = (address - slab.block->address) % slab.piece_bytes == 0;
  if (!first_byte || !slab.is_live(piece)) throw_bad_free(address);
  const std::size_t asked = slab.asked_bytes[piece];
  if (bytes != kUnknownBytes && bytes != asked) {
    ++book_.bad_frees;
    throw std::invalid_argument("free of " + address_text(address) + " with a size of " +
                                std::to_string(bytes) + " bytes, but the block has " +
                                std::to_string(asked) + "; give the size that was allocated");
  }
  Arena& arena = slab.block->range->arena;
  recorder_.note(EventKind::kFreeRequested, arena.scope().tag, address, asked, arena.stream());
  const bool pending = (slab.users_mask & bit) != 0 && begin_pending(address);
  count_free(arena.scope(), SizeKind::kSmall, slab.piece_bytes, asked);
  if (pending) {
    slab.pending_mask |= bit;
    return;
  }
  finish_free(address);
}

// A piece comes back; a slab without live pieces becomes free space, but for the last of its class.
void CachingAllocator::give_piece(Slab& slab, std::uint32_t piece) {
  Slab*& first = slab.home->partial[slab_class(slab.piece_bytes)];
  const bool was_full = slab.free_mask == 0;
  const std::uint64_t bit = std::uint64_t{1} << piece;
  slab.free_mask |= bit;
  slab.pending_mask &= ~bit;
  slab.users_mask &= ~bit;
  if (was_full) link(slab);
  if (!slab.empty()) return;
  quick_bytes_ += kSlabBytes;
  if (first != &slab || slab.next != nullptr) drop_slab(slab);
}

// To the front of those with free pieces.
void CachingAllocator::link(Slab& slab) noexcept {
  Slab*& first = slab.home->partial[slab_class(slab.piece_bytes)];
  slab.prev = nullptr;
  slab.next = first;
  if (first != nullptr) first->prev = &slab;
  first = &slab;
}

void CachingAllocator::drop_slab(Slab& slab) {
  Slab*& first = slab.home->partial[slab_class(slab.piece_bytes)];
  if (slab.prev != nullptr) {
    slab.prev->next = slab.next;
  } else {
    first = slab.next;
  }
  if (slab.next != nullptr) slab.next->prev = slab.prev;
  Block* block = slab.block;
  quick_bytes_ -= kSlabBytes;
  slabs_.erase(block->address);
  block->range->arena.give(block);
}

// Which memory -----------------------------------------------------------------------------------

Scope& CachingAllocator::scope_for(Stream stream) {
  for (const Capture& capture : captures_) {
    if (capture.filter(stream)) return *graph_scope(capture.id);
  }
  const TagId tag = current_tag();
  if (tag >= by_tag_.size()) by_tag_.resize(tag + 1, nullptr);
  if (by_tag_[tag] != nullptr) return *by_tag_[tag];
  return add_scope(tag);
}

Scope& CachingAllocator::add_scope(TagId tag) {
  auto scope = std::make_unique<Scope>();
  scope->name = tag == kNoTag ? "(no tag)" : tag_name(tag);
  scope->tag = tag;
  scope->figures = tag_entry(figures_.index(), scope->name);
  scope->figures.show();
  if (tag >= by_tag_.size()) by_tag_.resize(tag + 1, nullptr);
  by_tag_[tag] = scope.get();
  scopes_.push_back(std::move(scope));
  return *scopes_.back();
}

Arena& CachingAllocator::arena_for(Scope& scope, Stream stream, SizeKind kind) {
  for (const auto& arena : scope.arenas) {
    if (arena->stream() == stream && arena->kind() == kind) return *arena;
  }
  scope.arenas.push_back(std::make_unique<Arena>(
      Arena::Parts{scope, stream, kind, pool_->driver_ptr(), page_bytes_, range_bytes_, blocks_,
                   by_address_, idle_pages_, quick_bytes_, clock_}));
  if (scope.pinned()) scope.arenas.back()->set_gives(false);
  return *scope.arenas.back();
}

Block* CachingAllocator::block_at(Address address) noexcept {
  const auto found = by_address_.find(address);
  if (found == by_address_.end()) return nullptr;
  Block* block = found->second;
  return block->state == BlockState::kLive && !block->is_slab ? block : nullptr;
}

Slab* CachingAllocator::slab_at(Address address) noexcept {
  const auto found = slabs_.find(slab_base(address));
  return found == slabs_.end() ? nullptr : found->second.get();
}

bool CachingAllocator::owns(const void* address) {
  const Lock guard = lock();
  const Address at = reinterpret_cast<Address>(address);
  if (block_at(at) != nullptr) return true;
  const Slab* slab = slab_at(at);
  return slab != nullptr && (at - slab->block->address) % slab->piece_bytes == 0 &&
         slab->is_live(slab->piece_of(at));
}

void CachingAllocator::throw_bad_free(Address address) {
  ++book_.bad_frees;
  throw_unknown("free", address);
}

void CachingAllocator::throw_unknown(const char* what, Address address) {
  throw std::invalid_argument(std::string(what) + " of " + address_text(address) +
                              ", which is not a live block of " + pool_->driver().name() +
                              ": freed before, or never allocated here");
}

void* CachingAllocator::base(void* address, std::size_t* bytes) {
  const Lock guard = lock();
  const Address at = reinterpret_cast<Address>(address);
  if (Slab* slab = slab_at(at); slab != nullptr) {
    const std::uint32_t piece = slab->piece_of(at);
    if (slab->is_live(piece)) {
      if (bytes != nullptr) *bytes = slab->piece_bytes;
      return reinterpret_cast<void*>(slab->at(piece));
    }
    throw_unknown("base", at);
  }
  for (const auto& scope : scopes_) {
    for (const auto& arena : scope->arenas) {
      for (const auto& range : arena->ranges()) {
        if (at < range->base() || at >= range->end()) continue;
        Block* block = range->first;
        while (at >= block->end()) block = block->next;
        if (block->state != BlockState::kLive) throw_unknown("base", at);
        if (bytes != nullptr) *bytes = block->bytes;
        return reinterpret_cast<void*>(block->address);
      }
    }
  }
  throw_unknown("base", at);
}

// Counting ---------------------------------------------------------------------------------------

void CachingAllocator::count_allocation(Scope& scope, SizeKind kind, std::size_t bytes,
                                        std::size_t asked) {
  requests_.allocated(kind, bytes, asked);
  TagFigures& figures = *scope.figures;
  const std::uint64_t live = figures.live.load(std::memory_order_relaxed) + bytes;
  figures.live.store(live, std::memory_order_relaxed);
  if (live > figures.peak_live.load(std::memory_order_relaxed)) {
    figures.peak_live.store(live, std::memory_order_relaxed);
  }
  figures.blocks.store(figures.blocks.load(std::memory_order_relaxed) + 1,
                       std::memory_order_relaxed);
  figures.allocations.store(figures.allocations.load(std::memory_order_relaxed) + 1,
                            std::memory_order_relaxed);
}

void CachingAllocator::count_free(Scope& scope, SizeKind kind, std::size_t bytes,
                                  std::size_t asked) {
  requests_.freed(kind, bytes, asked);
  TagFigures& figures = *scope.figures;
  figures.live.store(figures.live.load(std::memory_order_relaxed) - bytes,
                     std::memory_order_relaxed);
  figures.blocks.store(figures.blocks.load(std::memory_order_relaxed) - 1,
                       std::memory_order_relaxed);
}

}  // namespace vattn
