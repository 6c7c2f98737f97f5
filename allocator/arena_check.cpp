// The free space of an arena made anew from its tables, and what must hold of it.
#include <algorithm>
#include <string>

#include "arena.h"
#include "scope.h"

namespace vattn {

void Arena::rebuild() {
  flush();
  free_.clear();
  unmapped_.clear();
  for (const auto& range : ranges_) rebuild_range(*range);
}

void Arena::rebuild_range(Range& range) {
  for (Block* block = range.first; block != nullptr; block = block->next) {
    if (!block->free_or_unmapped()) continue;
    while (block->next != nullptr && block->next->free_or_unmapped()) absorb_next(block);
    rebuild_run(range, block, block->end());
    while (block->next != nullptr && block->next->free_or_unmapped()) block = block->next;
  }
}

// Cuts one block of free addresses into those with pages and those without.
void Arena::rebuild_run(Range& range, Block* block, Address end) {
  const auto mapped_at = [&](Address address) {
    const std::size_t page = range.page_index(address);
    return page < range.pages.size() && range.pages[page] != kNoPage;
  };
  while (true) {
    const bool mapped = mapped_at(block->address);
    Address until = range.page_floor(block->address) + page_bytes_;
    // What lies beyond the table was never mapped.
    const Address table_end = range.base() + range.pages.size() * page_bytes_;
    while (until < end && mapped_at(until) == mapped) {
      until = until >= table_end ? end : until + page_bytes_;
    }
    until = std::min(until, end);
    Block* rest = until < end ? split(block, until - block->address) : nullptr;
    if (mapped) {
      insert_free(block);
    } else {
      block->state = BlockState::kUnmapped;
      unmapped_.insert(block);
    }
    if (rest == nullptr) return;
    block = rest;
  }
}

// Invariants ------------------------------------------------------------------------------------

namespace {

void require(bool holds, const char* what, Address at) {
  if (!holds) {
    throw InvariantError("block at " + std::to_string(at) + ": " + what);
  }
}

}  // namespace

void Arena::check() const {
  std::size_t free_blocks = 0;
  for (const auto& range : ranges_) check_range(*range, free_blocks);
  require(free_blocks == free_.size() + unmapped_.size() + shadows_.size(),
          "sets of free blocks are wrong", 0);
}

void Arena::check_range(const Range& range, std::size_t& free_blocks) const {
  Address at = range.base();
  const Block* before = nullptr;
  const bool paused = scope_.paused;
  for (const Block* b = range.first; b != nullptr; before = b, b = b->next) {
    require(b->address == at && b->bytes > 0 && b->range == &range, "blocks do not tile", at);
    require(b->prev == before, "list is broken", at);
    require(b->bytes % kBlockBytes == 0, "size is no multiple of 512", at);
    require(b->state != BlockState::kClaimed, "claimed between operations", at);
    at = b->end();
    const bool pages_here = b->state != BlockState::kUnmapped;
    const bool whole = b->state == BlockState::kUnmapped || b->state == BlockState::kShadow;
    if (whole) {
      require(range.page_floor(b->address) == b->address, "does not begin where a page does", at);
      require(range.page_floor(b->end()) == b->end(), "does not end where a page does", at);
    }
    if (!paused) {
      const std::size_t first = range.page_index(b->address);
      const std::size_t last = range.page_index(b->end() - 1);
      for (std::size_t i = first; i <= last && (i < range.pages.size() || pages_here); ++i) {
        require(i < range.pages.size(), "beyond the table", b->address);
        require((range.pages[i] != kNoPage) == pages_here, "table and state disagree", b->address);
      }
    }
    if (b->state == BlockState::kFree) {
      require(free_.contains(const_cast<Block*>(b)), "not in the tree", b->address);
      require(before == nullptr || before->state != BlockState::kFree, "not merged", b->address);
      ++free_blocks;
    }
    if (b->state == BlockState::kShadow) {
      require(shadows_.contains(const_cast<Block*>(b)), "not among the shadows", b->address);
      ++free_blocks;
    }
    require(!b->is_shadow, "claimed as a shadow between operations", b->address);
    if (b->state == BlockState::kUnmapped) {
      require(unmapped_.contains(const_cast<Block*>(b)), "not among the unmapped", b->address);
      ++free_blocks;
    }
    const bool known = b->state == BlockState::kLive || b->state == BlockState::kPending ||
                       b->state == BlockState::kQuick;
    const auto found = by_address_.find(b->address);
    require(known == (found != by_address_.end() && found->second == b), "index is wrong",
            b->address);
  }
  require(at == range.end(), "blocks do not fill the range", at);
}

}  // namespace vattn
