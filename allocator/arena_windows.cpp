// Where a request that nothing mapped can hold could go, and the claiming of such addresses.
#include <algorithm>
#include <tuple>
#include <utility>

#include "arena.h"
#include "scope.h"

namespace vattn {

// A range with room for everything, or for what is asked for where addresses are scarce.
std::unique_ptr<Range> Arena::reserve_range(std::size_t bytes) {
  const std::size_t wanted = std::max(range_bytes_, bytes);
  try {
    return std::make_unique<Range>(*this, driver_, wanted, page_bytes_);
  } catch (const OutOfPages&) {
    if (wanted == bytes) throw;
    return std::make_unique<Range>(*this, driver_, bytes, page_bytes_);
  }
}

void Arena::add_range(std::size_t bytes) {
  auto range = reserve_range(round_up(bytes, page_bytes_));
  const std::size_t size = range->reservation.bytes();
  Block* block = blocks_.make();
  block->address = range->base();
  block->bytes = size;
  block->range = range.get();
  range->first = block;
  range->figures = range_entry(scope_.figures.index(), stream_, static_cast<std::uint64_t>(kind_),
                               range->base(), size);
  range->figures.show();
  unmapped_.insert(block);
  ranges_.push_back(std::move(range));
}

Window Arena::best_window(std::size_t bytes, std::size_t align, const Revivable& revivable) {
  for (int attempt = 0;; ++attempt) {
    Window best;
    for (Block* block : shadows_) consider(block, bytes, align, revivable, best);
    if (best.range == nullptr || best.missing_pages > 0) {
      for (Block* block : unmapped_) consider(block, bytes, align, revivable, best);
    }
    if (best.range != nullptr || attempt > 0) return best;
    add_range(bytes);
  }
}

// The windows of the run of free addresses around a block that is not free and mapped already: of
// blocks without pages, and of shadows that can have theirs back. Each begins at a block's begin or
// ends at a block's end: between those, moving it gains nothing.
void Arena::consider(Block* start, std::size_t bytes, std::size_t align, const Revivable& revivable,
                     Window& best) const {
  const auto passable = [&](const Block* b) {
    return b->free_or_unmapped() || (b->state == BlockState::kShadow && revivable(b));
  };
  if (!passable(start)) return;
  const Range& range = *start->range;
  Block* first = start;
  while (first->prev != nullptr && passable(first->prev)) {
    first = first->prev;
    if (first->state == start->state) return;  // that one has considered this run
  }
  Address end = first->address;
  for (const Block* b = first; b != nullptr && passable(b); b = b->next) end = b->end();
  const Address run = first->address;
  if (end - run < bytes) return;

  const auto try_begin = [&](Block* at, Address begin) {
    begin = round_up(begin, align);
    if (begin + bytes > end) return;
    while (at != nullptr && begin >= at->end()) at = at->next;
    if (at == nullptr) return;
    std::size_t missing = 0, used = 0;
    for (const Block* b = at; b != nullptr && b->address < begin + bytes; b = b->next) {
      if (b->state == BlockState::kFree) {
        const Address in = std::max(b->address, begin), out = std::min(b->end(), begin + bytes);
        used += range.whole_pages(b->address, b->end()) - range.whole_pages(b->address, in) -
                range.whole_pages(out, b->end());
        continue;
      }
      if (b->state != BlockState::kUnmapped) {
        used += (std::min(b->end(), begin + bytes) - std::max(b->address, begin)) / page_bytes_;
        continue;
      }
      const Address from = range.page_floor(std::max(b->address, begin));
      const Address to = range.page_ceil(std::min(b->end(), begin + bytes));
      missing += (to - from) / page_bytes_;
    }
    const std::size_t run_bytes = end - run;
    used += missing;
    const auto rank = [](const Window& w) {
      return std::tuple(w.missing_pages > 0, w.used_pages, w.missing_pages,
                        w.begin != w.range->page_floor(w.begin), w.run_bytes);
    };
    const Window window{at->range, at, begin, bytes, missing, used, run_bytes};
    if (best.range == nullptr || rank(window) < rank(best)) best = window;
  };
  for (Block* b = first; b != nullptr && b->address < end; b = b->next) {
    if (align == kBlockBytes) try_begin(b, range.page_ceil(b->address));
    try_begin(b, b->address);
    if (b->end() - run >= bytes && align == kBlockBytes) try_begin(first, b->end() - bytes);
  }
}

std::vector<Block*> Arena::claim(const Window& window) {
  std::vector<Block*> claimed;
  const Address window_end = window.begin + window.bytes;
  for (Block* b = window.first; b != nullptr && b->address < window_end; b = b->next) {
    const BlockState state = b->state;
    Address from = std::max(b->address, window.begin), to = std::min(b->end(), window_end);
    if (state != BlockState::kFree) {
      from = window.range->page_floor(from);
      to = window.range->page_ceil(to);
    }
    take_out(b);
    if (from > b->address) {
      Block* head = b;
      b = split(head, from - head->address);
      put_in(head, state);
    }
    if (to < b->end()) put_in(split(b, to - b->address), state);
    b->state = BlockState::kClaimed;
    b->is_shadow = state == BlockState::kShadow;
    claimed.push_back(b);
  }
  return claimed;
}

// Out of and into the set of its state, merging nothing.
void Arena::take_out(Block* block) {
  if (block->state == BlockState::kFree) {
    erase_free(block);
  } else if (block->state == BlockState::kUnmapped) {
    unmapped_.erase(block);
  } else {
    shadows_.erase(block);
  }
}

void Arena::put_in(Block* block, BlockState state) {
  block->state = state;
  if (state == BlockState::kFree) {
    insert_free(block);
  } else if (state == BlockState::kUnmapped) {
    unmapped_.insert(block);
  } else {
    shadows_.insert(block);
  }
}

void Arena::unclaim(const std::vector<Block*>& claimed) {
  for (Block* block : claimed) {
    const std::size_t page = block->range->page_index(block->address);
    const auto& pages = block->range->pages;
    if (std::exchange(block->is_shadow, false)) {
      put_in(block, BlockState::kShadow);
    } else if (page < pages.size() && pages[page] != kNoPage) {
      insert_merged(block);
    } else {
      give_unmapped(block);
    }
  }
}

Block* Arena::merge_claimed(const std::vector<Block*>& claimed, Address begin, std::size_t bytes) {
  Block* block = claimed.front();
  for (std::size_t i = 1; i < claimed.size(); ++i) absorb_next(block);
  if (begin > block->address) {
    Block* head = block;
    block = split(head, begin - head->address);
    insert_merged(head);
  }
  if (block->bytes > bytes) insert_merged(split(block, bytes));
  by_address_.emplace(block->address, block);
  return block;
}

Block* Arena::cut_pages(Block* block, std::size_t pages) {
  const Address end = block->range->page_floor(block->end());
  return cut(block, end - std::min(pages, idle_pages_of(block)) * page_bytes_, end);
}

Block* Arena::cut(Block* block, Address begin, Address end) {
  erase_free(block);
  if (end < block->end()) insert_free(split(block, end - block->address));
  if (begin > block->address) {
    Block* head = block;
    block = split(head, begin - head->address);
    insert_free(head);
  }
  block->state = BlockState::kClaimed;
  return block;
}

void Arena::give_shadow(Block* block) { put_in(block, BlockState::kShadow); }

}  // namespace vattn
