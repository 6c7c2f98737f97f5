#include "torch_policy.h"

#include <functional>
#include <tuple>

namespace bench {
namespace {

constexpr std::size_t kSmallLimit = kMiB;

void absorb(Block* block, Block* gone) {
  if (gone == block->before) {
    block->address = gone->address;
    block->before = gone->before;
    if (block->before != nullptr) block->before->after = block;
  } else {
    block->after = gone->after;
    if (block->after != nullptr) block->after->before = block;
  }
  block->bytes += gone->bytes;
  delete gone;
}

std::string where(const Block& block) {
  return "block of " + std::to_string(block.bytes) + " bytes at " + std::to_string(block.address);
}

void require(bool holds, const Block& block, const char* what) {
  if (!holds) throw std::logic_error(where(block) + ": " + what);
}

}  // namespace

bool BySize::operator()(const Block* a, const Block* b) const noexcept {
  return std::tie(a->stream, a->bytes, a->address) < std::tie(b->stream, b->bytes, b->address);
}

bool ByAddress::operator()(const Block* a, const Block* b) const noexcept {
  return std::tie(a->stream, a->address) < std::tie(b->stream, b->address);
}

TorchPolicy::~TorchPolicy() {
  for (const Block* block : all_blocks()) delete block;
}

void* TorchPolicy::allocate(std::size_t requested, std::uint32_t stream) {
  const std::size_t bytes = live_bytes(requested);
  const std::lock_guard lock(mutex_);
  Pool& pool = bytes <= kSmallLimit ? small_ : large_;
  Block* block = choose(pool, stream, bytes);
  if (block == nullptr) block = grow(pool, stream, bytes);
  if (block == nullptr) {
    release_cached(large_);
    release_cached(small_);
    block = grow(pool, stream, bytes);
  }
  if (block == nullptr) {
    throw OutOfMemory(std::to_string(requested) + " bytes do not fit: the policy holds " +
                      std::to_string(device_.physical()) + " of the device's " +
                      std::to_string(device_.bytes()));
  }
  if (block->bytes > bytes && worth_cutting(pool, block->bytes - bytes)) {
    Block* const rest = block;
    block = cut_front(rest, bytes);
    pool.free.insert(rest);
  }
  block->used = true;
  used_.emplace(block->address, block);
  return reinterpret_cast<void*>(block->address);
}

void TorchPolicy::free(void* address, std::size_t, std::uint32_t) {
  const std::lock_guard lock(mutex_);
  const auto found = used_.find(reinterpret_cast<Address>(address));
  if (found == used_.end()) throw std::logic_error("free of an address that is not in use");
  Block* const block = found->second;
  used_.erase(found);
  block->used = false;
  merge(block);
  block->pool->free.insert(block);
}

std::set<Block*, BySize>::iterator TorchPolicy::smallest(Pool& pool, std::uint32_t stream,
                                                         std::size_t bytes) {
  Block key;
  key.stream = stream;
  key.bytes = bytes;
  const auto found = pool.free.lower_bound(&key);
  return found == pool.free.end() || (*found)->stream != stream ? pool.free.end() : found;
}

Block* TorchPolicy::cut_front(Block* block, std::size_t bytes) {
  auto* const front = new Block(*block);
  front->bytes = bytes;
  front->after = block;
  if (front->before != nullptr) front->before->after = front;
  block->before = front;
  block->address += bytes;
  block->bytes -= bytes;
  return front;
}

void TorchPolicy::merge(Block* block) {
  for (Block* neighbour : {block->before, block->after}) {
    if (neighbour == nullptr || neighbour->used || neighbour->mapped != block->mapped) continue;
    if (neighbour->mapped) {
      block->pool->free.erase(neighbour);
    } else {
      block->pool->unmapped.erase(neighbour);
    }
    absorb(block, neighbour);
  }
}

std::vector<const Block*> TorchPolicy::all_blocks() const {
  std::vector<const Block*> all;
  for (const auto& [address, block] : used_) all.push_back(block);
  for (const Pool* pool : {&small_, &large_}) {
    all.insert(all.end(), pool->free.begin(), pool->free.end());
    all.insert(all.end(), pool->unmapped.begin(), pool->unmapped.end());
  }
  return all;
}

void TorchPolicy::check() const {
  const std::lock_guard lock(mutex_);
  std::size_t mapped = 0;
  for (const Block* block : all_blocks()) {
    if (block->mapped) mapped += block->bytes;
    require(block->bytes > 0 && block->bytes % kAlignment == 0, *block, "not a multiple of 512");
    require(block->address % kAlignment == 0, *block, "not aligned to 512");
    require(block->mapped || !block->used, *block, "used and not mapped");
    const Block* const next = block->after;
    if (next == nullptr) continue;
    require(next->before == block, *block, "its neighbour does not know it");
    require(next->address == block->address + block->bytes, *block, "its neighbour is elsewhere");
    require(
        next->pool == block->pool && next->stream == block->stream && next->range == block->range,
        *block, "its neighbour belongs elsewhere");
    require(block->used || next->used || block->mapped != next->mapped, *block,
            "free beside a free block");
  }
  if (mapped != device_.physical()) {
    throw std::logic_error("blocks of " + std::to_string(mapped) + " bytes on " +
                           std::to_string(device_.physical()) + " bytes of memory");
  }
}

void TorchPolicy::close() {
  check();
  if (!used_.empty()) throw std::logic_error(std::to_string(used_.size()) + " blocks are in use");
  release_cached(large_);
  release_cached(small_);
  if (const std::size_t left = device_.physical(); left != 0) {
    throw std::logic_error(std::to_string(left) + " bytes are left");
  }
}

}  // namespace bench
