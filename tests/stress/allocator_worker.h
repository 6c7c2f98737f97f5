// One thread's life with the allocator: blocks of its own on all streams, every operation in random
// order, and the bytes of every block compared again and again.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <thread>

#include "allocator_device.h"
#include "caching_allocator.h"

namespace stress {

using vattn::CachingAllocator;
using vattn::TagId;

// A live block, as its owner knows it.
struct Held {
  Address address = 0;
  std::size_t bytes = 0;
  Stream stream = 0;
  std::vector<Stream> users;  // others that were given work with it
  bool tagged = false;
  bool known = true;  // its bytes are what the marks say
  Marks marks;
};

// Which addresses are somebody's, by the program's own account: no two blocks overlap.
class LiveMap {
 public:
  void add(Address address, std::size_t bytes);
  void remove(Address address);

 private:
  std::mutex mutex_;
  std::map<Address, std::size_t> blocks_;
};

// Blocks on their way from one thread to another.
class Exchange {
 public:
  void put(Held block);
  std::optional<Held> take();

 private:
  std::mutex mutex_;
  std::vector<Held> blocks_;
};

// Every operation enters it; what must not happen during any closes it.
class Gate {
 public:
  std::shared_lock<std::shared_mutex> enter() {
    while (closing_) std::this_thread::yield();  // else nobody could close it among so many
    return std::shared_lock(mutex_);
  }
  template <typename F>
  void closed(F act) {
    closing_ = true;
    const std::unique_lock lock(mutex_);
    closing_ = false;
    act();
  }

 private:
  std::shared_mutex mutex_;
  std::atomic<bool> closing_ = false;
};

struct Shared {
  CachingAllocator& allocator;
  const Device& device;
  LiveMap live{};
  Exchange exchange{};
  Gate gate{};
  std::atomic<std::uint64_t> allocations{0}, out_of_memory{0}, failures{0}, pauses{0}, captures{0},
      replays{0};
};

// Memory for `bytes` on `stream`, marked; nothing when there is none or a failure was injected.
std::optional<Held> allocate(Shared& shared, Random& random, std::size_t bytes, Stream stream);
// Work with the block on `stream`, behind what others do with it.
void use_on(Shared& shared, Random& random, Held& block, Stream stream);
void verify(Shared& shared, const Held& block);
// Nobody's from now on. Work of its streams may go on.
void free(Shared& shared, const Held& block);

class GraphPools;

class AllocatorWorker {
 public:
  AllocatorWorker(Shared& shared, GraphPools& graphs, std::uint32_t seed);

  void run(std::size_t operations);
  // Gives everything back.
  void finish();

 private:
  void step();
  void allocate_one();
  void free_one(std::size_t i);
  void bad_input();
  void pause();
  bool resume();
  Held& any_block() { return blocks_[random_.below(blocks_.size())]; }

  Shared& shared_;
  GraphPools& graphs_;
  Random random_;
  const TagId tag_;
  bool paused_ = false;
  bool backed_up_ = false;
  std::vector<Held> blocks_;
};

}  // namespace stress
