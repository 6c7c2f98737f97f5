#include "arena.h"

#include <algorithm>
#include <string>
#include <tuple>
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

// Windows ---------------------------------------------------------------------------------------

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

// After a pause ---------------------------------------------------------------------------------

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
