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
    (amount > 0 ? allocated : freed) += amount > 0 ? amount : -amount;
    peak = std::max(peak, current);
  }
};

// `allocated`: what the program holds. `active`: that, and what was freed while other streams have
// yet to finish with it. Bytes are rounded up to 512; `requested` are as asked for. `reserved`:
// physical memory; `segment`: stretches of it with one address range each, counted on demand.
struct StatGroup {
  Stat allocation, active, allocated_bytes, active_bytes, requested_bytes, reserved_bytes;
  std::int64_t segments = 0;
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
  std::size_t shadow_bytes = 0;    // mapped a second time, where they served before
  std::size_t pending_blocks = 0;  // freed, waiting for other streams
};

// What is counted with every request. Few numbers, from which the others follow: threads that take
// turns hand each other every cache line that is written.
class RequestBook {
 public:
  void allocated(SizeKind kind, std::size_t bytes, std::size_t asked) noexcept {
    Counts& c = counts(kind);
    ++c.blocks;
    ++c.blocks_total;
    c.bytes += static_cast<std::int64_t>(bytes);
    c.bytes_total += static_cast<std::int64_t>(bytes);
    c.asked += static_cast<std::int64_t>(asked);
    c.asked_total += static_cast<std::int64_t>(asked);
    raise(peaks_[static_cast<std::size_t>(kind)], c);
    raise(peaks_[2], all());
  }
  // The program gave it back; it is active until `completed`.
  void freed(SizeKind kind, std::size_t bytes, std::size_t asked) noexcept {
    Counts& c = counts(kind);
    --c.blocks;
    c.bytes -= static_cast<std::int64_t>(bytes);
    c.asked -= static_cast<std::int64_t>(asked);
    ++c.pending_blocks;
    c.pending_bytes += static_cast<std::int64_t>(bytes);
  }
  void completed(SizeKind kind, std::size_t bytes) noexcept {
    Counts& c = counts(kind);
    --c.pending_blocks;
    c.pending_bytes -= static_cast<std::int64_t>(bytes);
  }

  std::int64_t active_blocks() const noexcept { return all().blocks + all().pending_blocks; }
  std::int64_t active_bytes() const noexcept { return all().bytes + all().pending_bytes; }
  std::size_t live_bytes() const noexcept { return static_cast<std::size_t>(all().bytes); }
  std::size_t peak_live_bytes() const noexcept {
    return static_cast<std::size_t>(most_live_bytes_);
  }

  void reset_peaks() noexcept;
  void reset_accumulated() noexcept;
  // All of a group but what is reserved.
  void fill(Figures& figures) const;

 private:
  // One cache line.
  struct alignas(64) Counts {
    std::int64_t blocks = 0, bytes = 0, asked = 0;
    std::int64_t blocks_total = 0, bytes_total = 0, asked_total = 0;
    std::int64_t pending_blocks = 0, pending_bytes = 0;
  };
  struct Peaks {
    std::int64_t blocks = 0, bytes = 0, asked = 0, active_blocks = 0, active_bytes = 0;
  };

  Counts& counts(SizeKind kind) noexcept { return counts_[static_cast<std::size_t>(kind)]; }
  Counts all() const noexcept;
  void raise(Peaks& peaks, const Counts& c) noexcept {
    if (c.blocks > peaks.blocks) peaks.blocks = c.blocks;
    if (c.bytes > peaks.bytes) peaks.bytes = c.bytes;
    if (c.asked > peaks.asked) peaks.asked = c.asked;
    const std::int64_t blocks = c.blocks + c.pending_blocks, bytes = c.bytes + c.pending_bytes;
    if (blocks > peaks.active_blocks) peaks.active_blocks = blocks;
    if (bytes > peaks.active_bytes) peaks.active_bytes = bytes;
    if (c.bytes > most_live_bytes_) most_live_bytes_ = c.bytes;
  }
  static void fill(StatGroup& group, const Counts& now, const Counts& base, const Peaks& peaks);

  std::array<Counts, 2> counts_;
  alignas(64) std::array<Peaks, 3> peaks_;  // small, large, both
  std::int64_t most_live_bytes_ = 0;        // ever: resetting peaks is for those who look at them
  std::array<Counts, 2> base_;              // as they were when accumulated figures were reset
};

inline RequestBook::Counts RequestBook::all() const noexcept {
  const Counts &a = counts_[0], &b = counts_[1];
  return {a.blocks + b.blocks,
          a.bytes + b.bytes,
          a.asked + b.asked,
          a.blocks_total + b.blocks_total,
          a.bytes_total + b.bytes_total,
          a.asked_total + b.asked_total,
          a.pending_blocks + b.pending_blocks,
          a.pending_bytes + b.pending_bytes};
}

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
