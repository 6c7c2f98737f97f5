// The memory of one stream, for small or for large requests, in one scope: ranges of addresses,
// their blocks, and what is free of them. It knows where pages are mapped and asks nobody for any;
// the allocator does (grow.cpp). All of it is guarded by the allocator's lock.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <unordered_map>
#include <vector>

#include "block.h"
#include "quick_lists.h"
#include "slab.h"

namespace vattn {

struct Scope;

enum class SizeKind : std::uint8_t { kSmall = 0, kLarge = 1 };
inline constexpr std::size_t kSmallMaxBytes = std::size_t{1} << 20;
inline SizeKind size_kind(std::size_t bytes) noexcept {
  return bytes <= kSmallMaxBytes ? SizeKind::kSmall : SizeKind::kLarge;
}

// Where a request could go: free addresses, some of them without pages yet.
struct Window {
  Range* range = nullptr;
  Block* first = nullptr;  // the free or unmapped block in which it begins
  Address begin = 0;
  std::size_t bytes = 0;
  std::size_t missing_pages = 0;
  std::size_t used_pages = 0;  // those, and idle ones that it takes
  std::size_t run_bytes = 0;   // of the free addresses around it
};

// A fence on a stream. Null if the program has destroyed it: then all work of the device is done on
// return. Not while a graph is captured.
std::shared_ptr<Fence> fence_in(const std::shared_ptr<Driver>& driver, Stream stream);

class Arena {
 public:
  struct Parts {
    Scope& scope;
    Stream stream;
    SizeKind kind;
    std::shared_ptr<Driver> driver;
    std::size_t page_bytes;
    std::size_t range_bytes;  // of a range, unless a request is larger
    BlockStore& blocks;
    std::unordered_map<Address, Block*>& by_address;  // of live and pending blocks and quick ones
    std::atomic<std::size_t>& idle_pages;  // whole pages in trees, over all arenas that may give
    // Bytes in blocks on quick lists and in slabs without live pieces, which merging may turn into
    // idle pages.
    std::atomic<std::size_t>& quick_bytes;
    std::uint64_t& clock;  // counts what is freed
  };
  explicit Arena(const Parts& parts);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  Scope& scope() const noexcept { return scope_; }
  Stream stream() const noexcept { return stream_; }
  SizeKind kind() const noexcept { return kind_; }
  std::size_t page_bytes() const noexcept { return page_bytes_; }
  const std::vector<std::unique_ptr<Range>>& ranges() const noexcept { return ranges_; }

  // A mapped block of exactly `bytes` (a multiple of 512), claimed; null if no free block holds it.
  Block* take(std::size_t bytes);
  // The same, out of what is left over of pages that are in use anyway.
  Block* take_hole(std::size_t bytes, std::size_t align);
  // The same at an address that is a multiple of the slab size.
  Block* take_slab_block();
  // Takes a block back that was live, pending or claimed, and mapped.
  void give(Block* block);
  // Merges what is on quick lists with its neighbours.
  void flush();

  // The window for `bytes` that lacks the fewest pages; makes a range if none has room. `align`:
  // the begin is a multiple of it (512 or the slab size).
  // `revivable`: whether the pages of a shadow could be had back.
  using Revivable = std::function<bool(const Block*)>;
  Window best_window(std::size_t bytes, std::size_t align, const Revivable& revivable);
  // Turns a window, with the rest of its last page, into claimed blocks: first to last, by address.
  std::vector<Block*> claim(const Window& window);
  // Undoes it. Blocks are what they were: shadows, free, or unmapped.
  void unclaim(const std::vector<Block*>& claimed);
  // Makes one claimed block of them, of which what lies beyond `bytes` from `begin` becomes free.
  Block* merge_claimed(const std::vector<Block*>& claimed, Address begin, std::size_t bytes);

  // Cuts the last `pages` whole pages, at most, out of a free block, as a claimed one.
  Block* cut_pages(Block* block, std::size_t pages);
  // The same with certain pages of it.
  Block* cut(Block* block, Address begin, Address end);
  // A claimed block whose pages belong to other addresses from now on.
  void give_shadow(Block* block);
  // A claimed block, or a shadow, whose pages are unmapped.
  void give_unmapped(Block* block);
  std::vector<Block*> shadows() const { return {shadows_.begin(), shadows_.end()}; }
  // After a pause: makes the free space of all ranges anew from their tables.
  void rebuild();

  template <typename F>
  void for_each_free(F visit) const {
    for (auto it = free_.lower_bound(page_bytes_); it != free_.end(); ++it) visit(*it);
  }
  bool nothing_mapped() const noexcept;
  bool has_live_blocks() const noexcept { return live_blocks_ != 0; }
  void count_live(std::ptrdiff_t change) noexcept {
    live_blocks_ = static_cast<std::size_t>(static_cast<std::ptrdiff_t>(live_blocks_) + change);
  }
  // Whether its idle pages count as to be had by others.
  void set_gives(bool gives);
  bool gives() const noexcept { return gives_; }

  // A fence behind everything that was freed here until now; null if all of that is done.
  std::shared_ptr<Fence> fence();
  bool fence_done(const Block* block);
  bool all_done();                      // of what was freed here
  bool known_done(const Block* block);  // by a fence that there is already

  // Small pieces.
  std::array<Slab*, kSlabClasses> partial{};

  void check() const;

 private:
  struct BySize {
    using is_transparent = void;
    bool operator()(const Block* a, const Block* b) const noexcept {
      return a->bytes != b->bytes ? a->bytes < b->bytes : a->address < b->address;
    }
    bool operator()(const Block* a, std::size_t bytes) const noexcept { return a->bytes < bytes; }
  };

  struct ByAddress {
    bool operator()(const Block* a, const Block* b) const noexcept {
      return a->address < b->address;
    }
  };

  static constexpr int kMaxTries = 16;

  Block* carve(std::set<Block*, BySize>::iterator found, Address begin, std::size_t bytes);
  Block* split(Block* block, std::size_t bytes);
  void absorb_next(Block* block);
  void insert_free(Block* block);
  void erase_free(Block* block);
  void insert_merged(Block* block);
  void add_quick(std::ptrdiff_t bytes) noexcept;
  void take_out(Block* block);
  void put_in(Block* block, BlockState state);
  std::size_t idle_pages_of(const Block* block) const noexcept;
  std::unique_ptr<Range> reserve_range(std::size_t bytes);
  void add_range(std::size_t bytes);
  void consider(Block* start, std::size_t bytes, std::size_t align, const Revivable& revivable,
                Window& best) const;
  void rebuild_range(Range& range);
  void rebuild_run(Range& range, Block* first, Address end);
  void check_range(const Range& range, std::size_t& free_blocks) const;

  Scope& scope_;
  const Stream stream_;
  const SizeKind kind_;
  const std::shared_ptr<Driver> driver_;
  const std::size_t page_bytes_;
  const std::size_t range_bytes_;
  BlockStore& blocks_;
  std::unordered_map<Address, Block*>& by_address_;
  std::atomic<std::size_t>& idle_pages_;

  std::vector<std::unique_ptr<Range>> ranges_;
  std::set<Block*, BySize> free_;
  std::set<Block*, BySize> unmapped_;
  std::set<Block*, ByAddress> shadows_;
  QuickLists quick_;
  bool gives_ = true;
  std::size_t live_blocks_ = 0;
  std::atomic<std::size_t>& quick_bytes_;
  std::uint64_t& clock_;
  std::uint64_t last_freed_ = 0;
  std::shared_ptr<Fence> fence_;
  std::uint64_t fence_clock_ = 0;
  std::uint64_t done_clock_ = 0;  // all work on what was freed until then is done
};

}  // namespace vattn
