// What an allocator counts, under the names of torch.cuda.memory_stats.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "scope.h"

namespace vattn {

struct Stat {
  std::int64_t current = 0, peak = 0, allocated = 0, freed = 0;

  void add(std::int64_t amount) noexcept {
    current += amount;
    allocated += amount;
    peak = std::max(peak, current);
  }
  void remove(std::int64_t amount) noexcept {
    current -= amount;
    freed += amount;
  }
  void reset_peak() noexcept { peak = current; }
  void reset_accumulated() noexcept { allocated = freed = 0; }
};

// `allocated`: what the program holds. `active`: that, and what was freed while other streams have
// yet to finish with it. Bytes are rounded up to 512; `requested` are as asked for. `reserved`:
// physical memory; `segment`: stretches of it with one address range each, counted on demand.
struct StatGroup {
  Stat allocation, active, allocated_bytes, active_bytes, requested_bytes, reserved_bytes;
  std::int64_t segments = 0;

  template <typename F>
  void for_each(F visit) {
    for (Stat* s : {&allocation, &active, &allocated_bytes, &active_bytes, &requested_bytes,
                    &reserved_bytes}) {
      visit(*s);
    }
  }
};

struct Figures {
  StatGroup all;
  std::array<StatGroup, 2> kinds;   // small, large
  std::uint64_t alloc_retries = 0;  // times that memory had to be taken from elsewhere
  std::uint64_t ooms = 0;
  std::uint64_t bad_frees = 0;
  std::uint64_t growths = 0;      // requests that nothing mapped could hold
  std::uint64_t pages_moved = 0;  // from one address of the allocator to another
  std::size_t page_bytes = 0;
  std::size_t limit_bytes = 0;
  std::size_t idle_bytes = 0;      // in whole pages that could be had at once or after an event
  std::size_t pending_blocks = 0;  // freed, waiting for other streams
};

// A mapped stretch of a range, for snapshots.
struct BlockInfo {
  Address address;
  std::size_t bytes, asked_bytes;
  const char* state;  // as in torch's snapshots
};
struct SegmentInfo {
  Address address;
  std::size_t bytes;
  Stream stream;
  SizeKind kind;
  std::string scope;
  GraphPoolId graph;
  std::vector<BlockInfo> blocks;
};

}  // namespace vattn
