// A stretch of virtual addresses of a range: a block that somebody uses, or free space. The blocks
// of a range tile it, in a list by address; what they are is told apart by their state.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "region.h"
#include "stats_page.h"

namespace vattn {

class Arena;
struct Range;

// Every request is rounded up to this, and every address is a multiple of it, as PyTorch has it.
inline constexpr std::size_t kBlockBytes = 512;

inline std::size_t round_up(std::size_t value, std::size_t multiple) noexcept {
  return (value + multiple - 1) / multiple * multiple;
}

enum class BlockState : std::uint8_t {
  kLive,      // somebody's
  kPending,   // freed, and streams that its stream knows nothing of have yet to finish with it
  kQuick,     // free and mapped, on a list of blocks of its size, not merged with its neighbours
  kFree,      // free and mapped, merged with its neighbours, in the arena's tree
  kUnmapped,  // free; no pages. Starts and ends where pages do
  kShadow,    // free; mapped, but its pages belong to other addresses by now
  kClaimed,   // in the hands of an operation
};

inline constexpr std::size_t kNoBackup = ~std::size_t{0};

struct Block {
  Address address = 0;
  std::size_t bytes = 0;
  std::size_t asked_bytes = 0;  // of a live block: what the program asked for
  Range* range = nullptr;
  Block* prev = nullptr;
  Block* next = nullptr;
  Block* chain = nullptr;      // the next one on its quick list
  std::uint64_t freed_at = 0;  // the arena's clock when it, or the last of its parts, was freed
  std::size_t backup_offset = kNoBackup;  // while paused: where its contents are
  BlockState state = BlockState::kUnmapped;
  bool is_slab = false;    // live, and cut into small pieces
  bool is_shadow = false;  // a claimed one: it was a shadow
  bool has_users = false;  // streams other than its arena's use it

  Address end() const noexcept { return address + bytes; }
  bool free_or_unmapped() const noexcept {
    return state == BlockState::kFree || state == BlockState::kUnmapped;
  }
};

// One reservation of an arena and the table of its pages. Large enough that an arena seldom needs
// a second one; addresses cost nothing.
struct Range {
  Range(Arena& owner, const std::shared_ptr<Driver>& driver, std::size_t bytes, std::size_t page)
      : arena(owner), page_bytes(page), reservation(driver, bytes, alignment(*driver)) {}

  // Of pages for the driver, and of slabs.
  static std::size_t alignment(const Driver& driver) noexcept {
    return std::bit_ceil(std::max(driver.granularity(), std::size_t{32} << 10));
  }

  Address base() const noexcept { return reservation.base(); }
  Address end() const noexcept { return base() + reservation.bytes(); }
  std::size_t page_index(Address address) const noexcept { return (address - base()) / page_bytes; }
  Address page_floor(Address address) const noexcept {
    return address - (address - base()) % page_bytes;
  }
  Address page_ceil(Address address) const noexcept {
    return base() + round_up(address - base(), page_bytes);
  }
  // Pages that lie wholly in [begin, until).
  std::size_t whole_pages(Address begin, Address until) const noexcept {
    const Address from = page_ceil(begin), to = page_floor(until);
    return to > from ? (to - from) / page_bytes : 0;
  }

  Arena& arena;
  const std::size_t page_bytes;
  Reservation reservation;
  std::vector<PageId> pages;  // kNoPage: not mapped; shorter than the range where nothing ever was
  Block* first = nullptr;
  StatsEntry<RangeFigures> figures;
};

// Blocks come and go with every split and merge; their memory is kept.
class BlockStore {
 public:
  Block* make() {
    if (spare_ == nullptr) return &blocks_.emplace_back();
    Block* block = spare_;
    spare_ = block->chain;
    *block = Block{};
    return block;
  }
  void drop(Block* block) noexcept {
    block->range = nullptr;
    block->chain = spare_;
    spare_ = block;
  }

 private:
  std::deque<Block> blocks_;
  Block* spare_ = nullptr;
};

}  // namespace vattn
