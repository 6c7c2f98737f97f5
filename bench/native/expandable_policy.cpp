// PyTorch's policy under expandable_segments:True: for each stream and pool a range of addresses of
// 1 1/8 of the device's memory, in which pages of 2 MiB (small blocks) or 20 MiB (large ones) are
// mapped at the lowest addresses at which the request fits. Pages are unmapped only when the device
// is out of memory, where a free block covers them whole.
#include <algorithm>
#include <list>

#include "torch_policy.h"

namespace bench {
namespace {

constexpr std::size_t kSmallPage = 2 * kMiB;
constexpr std::size_t kLargePage = 20 * kMiB;

bool available(const Block* block) { return block != nullptr && !block->used; }

// Whether so many bytes of addresses follow from this block on, mapped or not, unused.
bool has_room(const Block* block, std::size_t bytes) {
  std::size_t found = 0;
  for (; found < bytes && available(block); block = block->after) found += block->bytes;
  return found >= bytes;
}

// A free block before unmapped addresses counts as large as it can grow, so that others go first.
std::size_t reach(const Block* block) {
  const Block* const next = block->after;
  return block->bytes + (next != nullptr && !next->mapped ? next->bytes : 0);
}

class ExpandablePolicy final : public TorchPolicy {
 public:
  using TorchPolicy::TorchPolicy;

  const char* name() const noexcept override { return "expandable"; }

 private:
  // Of the smallest that fit, one step further as long as the next cannot grow as far.
  Block* choose(Pool& pool, std::uint32_t stream, std::size_t bytes) override {
    auto best = smallest(pool, stream, bytes);
    if (best == pool.free.end()) return nullptr;
    for (auto next = std::next(best);
         next != pool.free.end() && (*next)->stream == stream && reach(*next) < reach(*best);
         ++next) {
      best = next;
    }
    Block* const block = *best;
    pool.free.erase(best);
    return block;
  }

  Block* grow(Pool& pool, std::uint32_t stream, std::size_t bytes) override {
    Block* block = find_room(pool, stream, bytes);
    if (!block->mapped && !map_front(block, std::min(block->bytes, bytes))) return nullptr;
    while (block->bytes < bytes) {
      Block* const next = block->after;
      if (!map_front(next, std::min(bytes - block->bytes, next->bytes))) return nullptr;
      block = next;  // which took `block` in
    }
    pool.free.erase(block);
    return block;
  }

  bool worth_cutting(const Pool&, std::size_t rest) const override { return rest >= kAlignment; }

  void release_cached(Pool& pool) override {
    // unmap() changes the set.
    const std::vector<Block*> cached(pool.free.begin(), pool.free.end());
    for (Block* block : cached) {
      unmap(block);
      if (!block->mapped && block->alone()) drop_range(block);
    }
  }

  // The unmapped block with the lowest address that has room, or the free one before it; a new
  // range if there is none.
  Block* find_room(Pool& pool, std::uint32_t stream, std::size_t bytes) {
    Block key;
    key.stream = stream;
    for (auto it = pool.unmapped.lower_bound(&key);
         it != pool.unmapped.end() && (*it)->stream == stream; ++it) {
      Block* const first = available((*it)->before) ? (*it)->before : *it;
      if (has_room(first, bytes)) return first;
    }
    const std::size_t page_bytes = pool.small ? kSmallPage : kLargePage;
    const std::size_t range_bytes = round_up(device_.bytes() + device_.bytes() / 8, page_bytes);
    ranges_.push_back({device_.reserve(range_bytes), range_bytes, page_bytes});
    auto* const block = new Block{.address = ranges_.back().base,
                                  .bytes = range_bytes,
                                  .stream = stream,
                                  .pool = &pool,
                                  .range = &ranges_.back(),
                                  .mapped = false};
    pool.unmapped.insert(block);
    return block;
  }

  // Maps whole pages for the first `bytes` of an unmapped block, which becomes a free block with
  // its free neighbours; false if the device has no memory.
  bool map_front(Block* block, std::size_t bytes) {
    const std::size_t page_bytes = block->range->page_bytes;
    const std::size_t mapped = round_up(bytes, page_bytes);
    if (!device_.create(mapped / page_bytes, page_bytes)) return false;
    device_.map(mapped / page_bytes);
    Pool& pool = *block->pool;
    pool.unmapped.erase(block);
    if (mapped < block->bytes) {
      pool.unmapped.insert(cut_back(block, mapped));
    }
    block->mapped = true;
    merge(block);
    pool.free.insert(block);
    return true;
  }

  // Unmaps the pages that a free block covers whole. What sticks out stays free; the block itself
  // stands for the unmapped addresses, with those of its neighbours.
  void unmap(Block* block) {
    const Range& range = *block->range;
    const Address begin = range.base + round_up(block->address - range.base, range.page_bytes);
    const Address end = range.base + (block->address + block->bytes - range.base) /
                                         range.page_bytes * range.page_bytes;
    if (begin >= end) return;
    device_.unmap((end - begin) / range.page_bytes, range.page_bytes);
    Pool& pool = *block->pool;
    pool.free.erase(block);
    if (begin > block->address) pool.free.insert(cut_front(block, begin - block->address));
    if (end < block->address + block->bytes) {
      pool.free.insert(cut_back(block, end - block->address));
    }
    block->mapped = false;
    merge(block);
    pool.unmapped.insert(block);
  }

  // A new block for what follows the first `bytes` of `block`.
  static Block* cut_back(Block* block, std::size_t bytes) {
    auto* const back = new Block(*block);
    back->address += bytes;
    back->bytes -= bytes;
    back->before = block;
    if (back->after != nullptr) back->after->before = back;
    block->after = back;
    block->bytes = bytes;
    return back;
  }

  void drop_range(Block* block) {
    device_.address_free();
    ranges_.remove_if([&](const Range& range) { return &range == block->range; });
    block->pool->unmapped.erase(block);
    delete block;
  }

  std::list<Range> ranges_;
};

}  // namespace

std::unique_ptr<Policy> make_expandable_policy(const PolicyOptions& options) {
  return std::make_unique<ExpandablePolicy>(options.device_bytes);
}

}  // namespace bench
