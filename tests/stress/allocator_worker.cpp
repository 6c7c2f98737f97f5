#include "allocator_worker.h"

#include <algorithm>

#include "allocator_graphs.h"

namespace stress {
namespace {

constexpr std::size_t kMostBlocks = 24;  // of all threads together they hardly fit
constexpr std::size_t kMostBytes = std::size_t{64} << 20;
constexpr std::size_t kMostTaggedBytes = std::size_t{4} << 20;  // a pause copies them
constexpr std::size_t kBlockBytes = 512;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

std::size_t rounded(std::size_t bytes) {
  return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
}

template <typename F>
void expect_refused(const char* what, F act) {
  try {
    act();
  } catch (const std::invalid_argument&) {
    return;
  }
  fail(std::string("accepted: ") + what);
}

}  // namespace

void LiveMap::add(Address address, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto next = blocks_.lower_bound(address);
  const bool into_next = next != blocks_.end() && next->first < address + bytes;
  const bool into_previous =
      next != blocks_.begin() && std::prev(next)->first + std::prev(next)->second > address;
  if (into_next || into_previous) fail("two live blocks overlap at " + std::to_string(address));
  blocks_.emplace(address, bytes);
}

void LiveMap::remove(Address address) {
  const std::lock_guard lock(mutex_);
  if (blocks_.erase(address) != 1) fail("no live block at " + std::to_string(address));
}

void Exchange::put(Held block) {
  const std::lock_guard lock(mutex_);
  blocks_.push_back(std::move(block));
}

std::optional<Held> Exchange::take() {
  const std::lock_guard lock(mutex_);
  if (blocks_.empty()) return std::nullopt;
  Held block = std::move(blocks_.back());
  blocks_.pop_back();
  return block;
}

// Blocks -----------------------------------------------------------------------------------------

std::optional<Held> allocate(Shared& shared, Random& random, std::size_t bytes, Stream stream) {
  ++shared.allocations;
  Held block;
  try {
    block.address = reinterpret_cast<Address>(shared.allocator.allocate(bytes, stream));
  } catch (const vattn::OutOfMemory&) {
    ++shared.out_of_memory;
    return std::nullopt;
  } catch (const vattn::DriverError& error) {
    if (error.fatal()) throw;
    ++shared.failures;
    return std::nullopt;
  }
  if (block.address % kBlockBytes != 0) fail("a block is not aligned to 512 bytes");
  block.bytes = bytes;
  block.stream = stream;
  shared.live.add(block.address, rounded(bytes));
  block.marks.write(shared.device, block.address, bytes, stream, random);
  return block;
}

void use_on(Shared& shared, Random& random, Held& block, Stream stream) {
  shared.device.order(block.stream, stream);
  for (const Stream user : block.users) shared.device.order(user, stream);
  const bool is_new =
      std::find(block.users.begin(), block.users.end(), stream) == block.users.end();
  if (stream != block.stream && is_new) {
    shared.allocator.record_stream(pointer(block.address), stream);
    block.users.push_back(stream);
  }
  block.marks.write(shared.device, block.address, block.bytes, stream, random);
  block.known = true;
}

void verify(Shared& shared, const Held& block) {
  if (!block.known) return;
  shared.device.synchronize(block.stream);
  for (const Stream user : block.users) shared.device.synchronize(user);
  block.marks.verify();
}

void free(Shared& shared, const Held& block) {
  shared.live.remove(block.address);
  insist([&] { shared.allocator.free(pointer(block.address), block.bytes); });
}

// The worker -------------------------------------------------------------------------------------

AllocatorWorker::AllocatorWorker(Shared& shared, GraphPools& graphs, std::uint32_t seed)
    : shared_(shared),
      graphs_(graphs),
      random_(seed),
      tag_(vattn::tag_id("thread " + std::to_string(seed % 16))) {}

void AllocatorWorker::run(std::size_t operations) {
  for (std::size_t i = 0; i < operations; ++i) {
    const auto entered = shared_.gate.enter();
    step();
  }
}

void AllocatorWorker::step() {
  const std::size_t dice = random_.below(1000);
  if (blocks_.empty() || (dice < 420 && blocks_.size() < kMostBlocks)) return allocate_one();
  if (dice < 700) return free_one(random_.below(blocks_.size()));
  Held& block = any_block();
  if (block.tagged && paused_) return static_cast<void>(resume());
  if (dice < 780) return use_on(shared_, random_, block, block.stream);
  if (dice < 880) return use_on(shared_, random_, block, shared_.device.any(random_));
  if (dice < 910 && !block.tagged) {
    shared_.exchange.put(std::move(block));
    block = std::move(blocks_.back());
    blocks_.pop_back();
    return;
  }
  if (dice < 940) {
    if (std::optional<Held> taken = shared_.exchange.take()) blocks_.push_back(std::move(*taken));
    return;
  }
  if (dice < 950) return paused_ ? static_cast<void>(resume()) : pause();
  if (dice < 975) return graphs_.step(random_);
  if (dice < 985) return bad_input();
  if (dice < 995) return verify(shared_, block);
  shared_.allocator.check();
}

void AllocatorWorker::allocate_one() {
  const bool tagged = random_.below(4) == 0;
  const std::size_t bytes = random_.log_uniform(tagged ? kMostTaggedBytes : kMostBytes);
  const Stream stream = shared_.device.any(random_);
  if (tagged && paused_) {
    vattn::set_current_tag(tag_);
    expect_refused("an allocation under a paused tag",
                   [&] { shared_.allocator.allocate(bytes, stream); });
    vattn::set_current_tag(vattn::kNoTag);
    return;
  }
  if (tagged) vattn::set_current_tag(tag_);
  std::optional<Held> block = allocate(shared_, random_, bytes, stream);
  vattn::set_current_tag(vattn::kNoTag);
  if (!block) {
    if (!blocks_.empty()) free_one(random_.below(blocks_.size()));
    return;
  }
  block->tagged = tagged;
  blocks_.push_back(std::move(*block));
}

void AllocatorWorker::free_one(std::size_t i) {
  const Held block = std::move(blocks_[i]);
  blocks_[i] = std::move(blocks_.back());
  blocks_.pop_back();
  const bool gone = block.tagged && paused_;
  if (!gone && random_.below(3) == 0) verify(shared_, block);
  free(shared_, block);
}

void AllocatorWorker::bad_input() {
  const Held& block = any_block();
  CachingAllocator& allocator = shared_.allocator;
  int elsewhere = 0;
  expect_refused("a free of no block", [&] { allocator.free(&elsewhere); });
  expect_refused("a free with a wrong size",
                 [&] { allocator.free(pointer(block.address), block.bytes + 1); });
  expect_refused("a free of an inner address", [&] { allocator.free(pointer(block.address + 8)); });
  expect_refused("a record of no block", [&] { allocator.record_stream(&elsewhere, 1); });
  if (paused_) {
    expect_refused("a second pause", [&] { allocator.pause(tag_, false); });
  } else {
    expect_refused("a resume of what is not paused", [&] { allocator.resume(tag_); });
  }
}

// Pausing ----------------------------------------------------------------------------------------

void AllocatorWorker::pause() {
  backed_up_ = random_.below(3) > 0;
  try {
    shared_.allocator.pause(tag_, backed_up_);
  } catch (const std::invalid_argument&) {
    return;  // somebody captures a graph
  } catch (const vattn::DriverError& error) {
    if (error.fatal()) throw;
    ++shared_.failures;
    return;
  }
  paused_ = true;
  ++shared_.pauses;
}

bool AllocatorWorker::resume() {
  try {
    shared_.allocator.resume(tag_);
  } catch (const vattn::OutOfMemory&) {
    ++shared_.out_of_memory;
    if (!blocks_.empty()) free_one(random_.below(blocks_.size()));
    return false;
  } catch (const vattn::DriverError& error) {
    if (error.fatal()) throw;
    ++shared_.failures;
    return false;
  }
  paused_ = false;
  for (Held& block : blocks_) {
    if (!block.tagged) continue;
    block.known = block.known && backed_up_;
    if (block.known) {
      block.marks.verify();
    } else {
      use_on(shared_, random_, block, block.stream);
    }
  }
  return true;
}

void AllocatorWorker::finish() {
  while (!blocks_.empty()) free_one(blocks_.size() - 1);
  while (std::optional<Held> block = shared_.exchange.take()) {
    verify(shared_, *block);
    free(shared_, *block);
  }
  while (paused_) resume();
}

}  // namespace stress
