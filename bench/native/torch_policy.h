// What PyTorch's two caching policies have in common, modelled on c10/cuda/CUDACachingAllocator.cpp
// of torch 2.11 to 2.13 with its default settings: no maximal split size, no rounding to powers of
// two, no garbage collection threshold, no graph pools, no record_stream.
//
// Requests are rounded up to 512 bytes; those of at most 1 MiB and larger ones live in pools of
// their own. A free block serves the stream that it was allocated for, the smallest that fits
// first, the lowest address among equals. Its rest stays a free block, and free neighbours merge.
// Where nothing fits, memory is taken from the device; if the device has none, what is cached is
// given back and the request tried once more.
#pragma once

#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

#include "counting_device.h"

namespace bench {

struct Pool;

// Addresses in which a pool's blocks of one stream grow (expandable segments).
struct Range {
  Address base;
  std::size_t bytes;
  std::size_t page_bytes;
};

struct Block {
  Address address = 0;
  std::size_t bytes = 0;
  std::uint32_t stream = 0;
  Pool* pool = nullptr;
  const Range* range = nullptr;  // none: a cudaMalloc's
  Block* before = nullptr;       // neighbours in the same segment or range
  Block* after = nullptr;
  bool used = false;
  bool mapped = true;

  bool alone() const noexcept { return before == nullptr && after == nullptr; }
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const noexcept;
};
struct ByAddress {
  bool operator()(const Block* a, const Block* b) const noexcept;
};

struct Pool {
  bool small;
  std::set<Block*, BySize> free{};         // mapped and not used
  std::set<Block*, ByAddress> unmapped{};  // addresses without memory
};

class TorchPolicy : public Policy {
 public:
  explicit TorchPolicy(std::size_t device_bytes) : device_(device_bytes) {}
  ~TorchPolicy() override;

  void* allocate(std::size_t bytes, std::uint32_t stream) final;
  void free(void* address, std::size_t bytes, std::uint32_t stream) final;
  std::size_t physical_bytes() const final { return device_.physical(); }
  std::size_t peak_physical_bytes() const final { return device_.peak(); }
  CallCounts driver_calls() const final { return device_.calls(); }
  void check() const final;
  void close() final;

 protected:
  // The free block that serves the request, out of the pool; null if none does.
  virtual Block* choose(Pool& pool, std::uint32_t stream, std::size_t bytes) = 0;
  // A block with memory from the device, in no set; null if the device has none.
  virtual Block* grow(Pool& pool, std::uint32_t stream, std::size_t bytes) = 0;
  // Whether a block that has this much more than was asked for is cut.
  virtual bool worth_cutting(const Pool& pool, std::size_t rest) const = 0;
  virtual void release_cached(Pool& pool) = 0;

  // The smallest free block of the stream with at least so many bytes.
  static std::set<Block*, BySize>::iterator smallest(Pool& pool, std::uint32_t stream,
                                                     std::size_t bytes);
  // A new block of `bytes` at the front of `block`, which keeps the rest. The caller takes `block`
  // out of its set first and puts it back after.
  static Block* cut_front(Block* block, std::size_t bytes);
  // Takes neighbours in that are as mapped as the block and not used; they leave their sets.
  static void merge(Block* block);

  CountingDevice device_;

 private:
  std::vector<const Block*> all_blocks() const;

  // torch takes a lock of the device and one of its table of blocks; so does the model.
  mutable std::mutex mutex_;
  Pool small_{true}, large_{false};
  std::unordered_map<Address, Block*> used_;
};

}  // namespace bench
