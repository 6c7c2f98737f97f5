// What one growing request has in hand until it is done or given up.
#pragma once

#include "caching_allocator.h"

namespace vattn {

// "1.50 GiB"
std::string size_text(std::size_t bytes);

struct CachingAllocator::Growth {
  Growth(Scope& its_scope, Arena& its_arena, std::size_t its_bytes)
      : scope(its_scope), arena(its_arena), bytes(its_bytes) {}

  Scope& scope;
  Arena& arena;
  const std::size_t bytes;
  std::size_t need = 0;           // pages
  std::vector<Block*> claimed;    // the window
  std::vector<PageId> pages;      // for what is unmapped of it, in the order of addresses
  std::vector<PageRefs> outside;  // those of them that the pool gave
  std::vector<Block*> loans;      // claimed: where the others come from, and those of shadows
  std::vector<Block*> mapped;     // those of the claimed blocks that are mapped by now

  std::size_t lacking() const noexcept { return need - pages.size(); }
  std::size_t from_outside() const noexcept {
    std::size_t n = 0;
    for (const PageRefs& refs : outside) n += refs.size();
    return n;
  }
  std::size_t from_other_scopes() const noexcept {
    std::size_t n = from_outside();
    for (const Block* loan : loans) {
      if (&loan->range->arena.scope() != &scope) n += loan->bytes / loan->range->page_bytes;
    }
    return n;
  }
  std::vector<Block*> unmapped() const {
    std::vector<Block*> out;
    for (Block* block : claimed) {
      const auto& table = block->range->pages;
      const std::size_t page = block->range->page_index(block->address);
      if (page >= table.size() || table[page] == kNoPage) out.push_back(block);
    }
    return out;
  }
  std::vector<Address> missing_addresses(std::size_t page_bytes) const {
    std::vector<Address> out;
    for (const Block* block : unmapped()) {
      for (Address at = block->address; at < block->end(); at += page_bytes) out.push_back(at);
    }
    return out;
  }
};

// Maximal stretches [first, first + n) of pages that are mapped, or are not, and are wanted.
template <typename F>
std::vector<std::pair<std::size_t, std::size_t>> CachingAllocator::stretches(const Range& range,
                                                                             bool mapped,
                                                                             F wanted) {
  std::vector<std::pair<std::size_t, std::size_t>> out;
  for (std::size_t i = 0; i < range.pages.size(); ++i) {
    if ((range.pages[i] != kNoPage) != mapped || !wanted(i)) continue;
    if (!out.empty() && out.back().first + out.back().second == i) {
      ++out.back().second;
    } else {
      out.emplace_back(i, 1);
    }
  }
  return out;
}

}  // namespace vattn
