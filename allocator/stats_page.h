// Figures of this process that another one can read while it runs: a page of memory behind a memfd,
// which a reader finds among the process's open files and maps. Nothing is left over when the
// process dies. The figures live here and nowhere else, so that they cost one store each and are
// never out of date; a reader may see two of them a moment apart.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace vattn {

using Figure = std::atomic<std::uint64_t>;

// One tag on one device; the first of a device is what has no tag. Bytes.
struct TagFigures {
  char name[56];
  std::atomic<std::int32_t> device;  // -1: this entry is not in use
  std::atomic<std::uint32_t> state;  // 0 in use, 1 paused, 2 graph pool
  Figure live;                       // blocks, each rounded up to 512
  Figure peak_live;
  Figure blocks;       // that are live
  Figure mapped;       // physical memory
  Figure budget;       // 0: none
  Figure allocations;  // since the start
};

// One range of addresses. `live` counts what is live in it.
struct RangeFigures {
  std::atomic<std::int32_t> device;  // -1: not in use
  std::atomic<std::uint32_t> tag;    // index of its TagFigures
  Figure base;
  Figure stream;
  Figure reserved;
  Figure mapped;
};

// One device's pool of pages. Bytes.
struct PoolFigures {
  std::atomic<std::int32_t> device;  // -1: not in use, -2: the host's
  std::atomic<std::uint32_t> unused;
  Figure page;
  Figure budget;
  Figure created;
  Figure free;
  Figure stale;          // held by sequences and kept prefixes that can be evicted
  Figure torch_mapped;   // held by the allocator
  Figure torch_idle;     // of it, not in use
  Figure out_of_memory;  // errors so far
};

struct StatsPage {
  static constexpr std::uint64_t kMagic = 0x317474617473'7476;  // "vtstatt1"
  static constexpr std::size_t kPools = 16, kTags = 64, kRanges = 256;

  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t bytes;
  std::uint64_t pid;
  std::uint64_t start_ns;  // CLOCK_REALTIME
  PoolFigures pools[kPools];
  TagFigures tags[kTags];
  RangeFigures ranges[kRanges];

  // This process's page; memory that nobody else sees where there is no memfd. In a forked child:
  // a page of its own.
  static StatsPage& of_process();

  // An unused entry, or one that nobody shows when all are taken.
  TagFigures& add_tag(int device, std::string_view name);
  RangeFigures& add_range(int device);
  PoolFigures& pool(int device);
};

}  // namespace vattn
