#include "arena.h"

#include <algorithm>
#include <utility>

#include "scope.h"

namespace vattn {

Arena::Arena(const Parts& parts)
    : scope_(parts.scope),
      stream_(parts.stream),
      kind_(parts.kind),
      driver_(parts.driver),
      page_bytes_(parts.page_bytes),
      range_bytes_(parts.range_bytes),
      blocks_(parts.blocks),
      by_address_(parts.by_address),
      idle_pages_(parts.idle_pages),
      quick_bytes_(parts.quick_bytes),
      clock_(parts.clock) {}

Arena::~Arena() {
  set_gives(false);
  for (const auto& range : ranges_) {
    for (Block* block = range->first; block != nullptr;) {
      Block* next = block->next;
      blocks_.drop(block);
      block = next;
    }
  }
}

// Taking and giving -----------------------------------------------------------------------------

Block* Arena::take(std::size_t bytes) {
  if (bytes <= QuickLists::kMaxBytes) {
    if (Block* block = quick_.take(bytes)) {
      block->state = BlockState::kClaimed;
      add_quick(-static_cast<std::ptrdiff_t>(bytes));
      return block;
    }
  }
  flush();
  const auto smallest = free_.lower_bound(bytes);
  if (smallest == free_.end()) return nullptr;
  return carve(smallest, (*smallest)->address, bytes);
}

Block* Arena::take_hole(std::size_t bytes, std::size_t align) {
  flush();
  int tries = 0;
  for (auto it = free_.lower_bound(bytes); it != free_.end() && tries < kMaxTries; ++it, ++tries) {
    const Block* block = *it;
    const Address begins[] = {round_up(block->address, align),
                              (block->end() - bytes) / align * align};
    for (const Address begin : begins) {
      if (begin < block->address || begin + bytes > block->end()) continue;
      const std::size_t left = block->range->whole_pages(block->address, begin) +
                               block->range->whole_pages(begin + bytes, block->end());
      if (left == idle_pages_of(block)) return carve(it, begin, bytes);
    }
  }
  return nullptr;
}

Block* Arena::take_slab_block() {
  flush();
  for (auto found = free_.lower_bound(kSlabBytes); found != free_.end(); ++found) {
    const Address begin = round_up((*found)->address, kSlabBytes);
    if (begin + kSlabBytes <= (*found)->end()) return carve(found, begin, kSlabBytes);
  }
  return nullptr;
}

// Takes [begin, begin + bytes) out of a free block. What is left of it stays in the tree, in the
// same node if there is one piece of it: no memory is allocated or freed then.
Block* Arena::carve(std::set<Block*, BySize>::iterator found, Address begin, std::size_t bytes) {
  auto node = free_.extract(found);
  Block* block = node.value();
  if (gives_) idle_pages_ -= idle_pages_of(block);
  if (begin > block->address) {
    Block* head = block;
    block = split(head, begin - head->address);
    insert_free(head);
  }
  if (block->bytes > bytes) {
    Block* rest = split(block, bytes);
    node.value() = rest;
    free_.insert(std::move(node));
    if (gives_) idle_pages_ += idle_pages_of(rest);
  }
  block->state = BlockState::kClaimed;
  by_address_.emplace(block->address, block);
  return block;
}

void Arena::give(Block* block) {
  block->freed_at = last_freed_ = ++clock_;
  block->asked_bytes = 0;
  block->is_slab = false;
  if (block->bytes <= QuickLists::kMaxBytes) {
    block->state = BlockState::kQuick;
    quick_.give(block);
    add_quick(static_cast<std::ptrdiff_t>(block->bytes));
    return;
  }
  insert_merged(block);
}

void Arena::flush() {
  quick_.drain([this](Block* block) {
    add_quick(-static_cast<std::ptrdiff_t>(block->bytes));
    insert_merged(block);
  });
}

void Arena::insert_merged(Block* block) {
  by_address_.erase(block->address);
  block->state = BlockState::kFree;
  if (block->next != nullptr && block->next->state == BlockState::kFree) {
    erase_free(block->next);
    absorb_next(block);
  }
  if (block->prev != nullptr && block->prev->state == BlockState::kFree) {
    block = block->prev;
    erase_free(block);
    absorb_next(block);
  }
  insert_free(block);
}

// Written with the allocator's lock held only, so no read-modify-write is needed.
void Arena::add_quick(std::ptrdiff_t bytes) noexcept {
  const std::size_t now = quick_bytes_.load(std::memory_order_relaxed);
  quick_bytes_.store(now + static_cast<std::size_t>(bytes), std::memory_order_relaxed);
}

// Blocks ----------------------------------------------------------------------------------------

// Cuts a block in two; the second part is returned, in the state of the first.
Block* Arena::split(Block* block, std::size_t bytes) {
  Block* rest = blocks_.make();
  rest->address = block->address + bytes;
  rest->bytes = block->bytes - bytes;
  rest->range = block->range;
  rest->state = block->state;
  rest->freed_at = block->freed_at;
  rest->prev = block;
  rest->next = block->next;
  if (rest->next != nullptr) rest->next->prev = rest;
  block->next = rest;
  block->bytes = bytes;
  return rest;
}

void Arena::absorb_next(Block* block) {
  Block* next = block->next;
  block->bytes += next->bytes;
  block->freed_at = std::max(block->freed_at, next->freed_at);
  block->next = next->next;
  if (block->next != nullptr) block->next->prev = block;
  blocks_.drop(next);
}

std::size_t Arena::idle_pages_of(const Block* block) const noexcept {
  return block->range->whole_pages(block->address, block->end());
}

void Arena::insert_free(Block* block) {
  block->state = BlockState::kFree;
  free_.insert(block);
  if (gives_) idle_pages_ += idle_pages_of(block);
}

void Arena::erase_free(Block* block) {
  free_.erase(block);
  if (gives_) idle_pages_ -= idle_pages_of(block);
}

void Arena::give_unmapped(Block* block) {
  if (block->state == BlockState::kShadow) shadows_.erase(block);
  block->is_shadow = false;
  block->state = BlockState::kUnmapped;
  if (block->next != nullptr && block->next->state == BlockState::kUnmapped) {
    unmapped_.erase(block->next);
    absorb_next(block);
  }
  if (block->prev != nullptr && block->prev->state == BlockState::kUnmapped) {
    block = block->prev;
    unmapped_.erase(block);
    absorb_next(block);
  }
  unmapped_.insert(block);
}

bool Arena::nothing_mapped() const noexcept {
  for (const auto& range : ranges_) {
    for (const PageId page : range->pages) {
      if (page != kNoPage) return false;
    }
  }
  return true;
}

void Arena::set_gives(bool gives) {
  if (gives == gives_) return;
  std::size_t idle = 0;
  for (const Block* block : free_) idle += idle_pages_of(block);
  if (gives) {
    idle_pages_ += idle;
  } else {
    idle_pages_ -= idle;
  }
  gives_ = gives;
}

// Fences ----------------------------------------------------------------------------------------

std::shared_ptr<Fence> fence_in(const std::shared_ptr<Driver>& driver, Stream stream) {
  constexpr int kInvalidHandle = 400;
  try {
    return std::make_shared<Fence>(driver, stream);
  } catch (const DriverError& error) {
    if (error.code() != kInvalidHandle) throw;
  }
  // The program has destroyed the stream; what it was given may be running still.
  driver->synchronize_all();
  return nullptr;
}

std::shared_ptr<Fence> Arena::fence() {
  if (done_clock_ >= last_freed_) return nullptr;
  if (fence_ != nullptr && fence_clock_ >= last_freed_) return fence_;
  fence_ = fence_in(driver_, stream_);
  fence_clock_ = clock_;
  if (fence_ == nullptr) done_clock_ = clock_;
  return fence_;
}

bool Arena::all_done() {
  const std::shared_ptr<Fence> now = fence();
  return now == nullptr || now->done();
}

bool Arena::known_done(const Block* block) {
  if (done_clock_ >= block->freed_at) return true;
  if (fence_ == nullptr || fence_clock_ < block->freed_at) return false;
  try {
    if (!fence_->done()) return false;
  } catch (const DriverError& error) {
    if (error.fatal()) throw;
    fence_ = nullptr;  // it got into a graph, or the like: the next one will tell
    return false;
  }
  done_clock_ = std::max(done_clock_, fence_clock_);
  return true;
}

bool Arena::fence_done(const Block* block) { return known_done(block) || all_done(); }

}  // namespace vattn
