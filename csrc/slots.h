// The slots of one cache over all its regions: what each sequence holds, and the operations on it.
//
// Every public function takes the device lock. Functions that may call the driver say so; all of
// them leave the state as it was when they throw (stale mappings apart, which nobody can see).
// `stream` is the stream that the caller's kernels run on: copies and fills are submitted to it,
// and what they touch is not unmapped or reused before its work so far has finished.
#pragma once

#include <optional>
#include <unordered_set>
#include <vector>

#include "region.h"

namespace vattn {

struct SpaceOptions {
  std::uint32_t slots = 0;
  std::size_t max_tokens = 0;
  std::vector<RegionSpec> regions;
  // Kernels read whole tiles: the first round_up(tokens, tile) tokens are mapped for every tile.
  std::vector<std::uint32_t> tiles = {1};
  // A released slot keeps its pages mapped for its next user. Off for comparison only.
  bool keep_stale = true;
};

// Bytes of distinct pages, each counted once under the first heading that fits.
struct SpaceStats {
  std::size_t open_slots = 0;
  std::size_t tokens = 0;          // of open slots
  std::size_t token_bytes = 0;     // their K and V, counting shared prefixes in each slot
  std::size_t live_bytes = 0;      // pages with at least one token of an open slot
  std::size_t cover_bytes = 0;     // mapped ahead: tile cover and prepared growth
  std::size_t stale_bytes = 0;     // mapped, used by nobody
  std::size_t shared_bytes = 0;    // of live_bytes: pages in use by two or more slots
  std::size_t scratch_bytes = 0;   // staging for reorders
  std::size_t reserved_bytes = 0;  // virtual
  std::uint64_t pages_mapped = 0, pages_adopted = 0, pages_aliased = 0, pages_recycled = 0;
  std::uint64_t pages_reclaimed = 0, copied_bytes = 0;
};

enum class PageState : std::uint8_t { kUnmapped, kLive, kShared, kCover, kStale };

// Memory for staging copies; grows, and goes back with clear(), which its owner calls with the
// device lock held before destroying it.
class Scratch {
 public:
  explicit Scratch(PagePool& pool) : pool_(pool) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Address require(std::size_t bytes, DeviceLock& lock);
  void clear();
  std::size_t bytes() const noexcept { return pages_.size() * pool_.page_bytes(); }
  PageId page(std::size_t i) const noexcept { return pages_[i]; }

 private:
  PagePool& pool_;
  std::unique_ptr<Reservation> reservation_;
  PageRefs pages_;
};

class SlotSpace final : public Reclaimer {
 public:
  SlotSpace(std::shared_ptr<PagePool> pool, const SpaceOptions& options);
  ~SlotSpace() override;

  PagePool& pool() const noexcept { return *pool_; }
  std::size_t max_tokens() const noexcept { return max_tokens_; }
  std::uint32_t slots() const noexcept { return static_cast<std::uint32_t>(slots_.size()); }
  const std::vector<Region>& regions() const noexcept { return regions_; }

  // A free slot: the one asked for, or the one whose stale pages fit `expected_tokens` best. No
  // driver call. Throws OutOfSlots when none is free, std::invalid_argument when it is taken.
  std::uint32_t open(std::optional<std::uint32_t> slot, std::size_t expected_tokens);
  // The slot keeps its mappings for its next user.
  void release(std::uint32_t slot, Stream stream);

  // Makes the first `tokens[i]` tokens of slot `slots[i]` and their cover mapped and writable from
  // the slot's present length on, and sets its length to at least that. All slots or none.
  void ensure(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
              Stream stream);
  // The same without moving the length: maps ahead of need. Kernels may use the sequences
  // meanwhile, so one whose next token goes to a page that it shares is left as it is, for ensure()
  // to do.
  void prepare(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
               Stream stream);
  // Shortens a sequence. Its pages stay mapped until somebody needs them.
  void truncate(std::uint32_t slot, std::size_t tokens, Stream stream);

  // A new slot with the first `tokens` tokens of `source`: full pages are shared, the partial tail
  // of each run is copied.
  std::uint32_t fork(std::uint32_t source, std::size_t tokens, Stream stream);
  // Slot destinations[i] becomes what sources[i] was before the call, by sharing full pages and
  // copying partial tails. Only pages that differ are remapped.
  void assign(std::span<const std::int32_t> destinations, std::span<const std::int32_t> sources,
              Stream stream);

  // Unmaps every stale page, and gives free pages back to the device.
  std::size_t trim();
  // Declares that the slot's pages may hold non-finite values: they are zeroed before reuse.
  void mark_dirty(std::uint32_t slot);

  std::size_t tokens(std::uint32_t slot);
  std::uint32_t generation(std::uint32_t slot);
  bool is_open(std::uint32_t slot);
  // Pages that ensure(slot, tokens) would have to find.
  std::size_t pages_needed(std::uint32_t slot, std::size_t tokens);
  // First token of `region` that the slot still holds.
  std::size_t first_token(std::uint32_t slot, std::uint32_t region);
  SpaceStats stats();
  // State of each page of a slot's stretch, runs x pages_per_run.
  std::vector<PageState> page_states(std::uint32_t slot, std::uint32_t region);
  std::vector<PageId> page_ids(std::uint32_t slot, std::uint32_t region);
  void check();

  std::size_t reclaim(std::size_t pages, DeviceLock& lock) override;

 private:
  struct Slot {
    // anchor <= tokens <= ready <= max_tokens. `anchor` is the first query of the latest step: no
    // window reaches further back than from there. [tokens, ready) is mapped and ours to write.
    std::size_t anchor = 0, tokens = 0, ready = 0;
    std::uint32_t generation = 0;
    bool open = false;
    std::uint64_t released_at = 0;
    std::uint64_t step = 0;        // the latest ensure() that made it longer
    std::shared_ptr<Fence> fence;  // after it, nobody uses the slot's stale pages
  };
  struct Need {
    Region* region;
    std::uint32_t slot, index;
    Address copy_from;  // 0: nothing to keep
    std::size_t copy_bytes;
  };
  using Windows = std::vector<PageWindow>;
  struct Move {  // one part of assign(): `to` becomes what `from` was
    std::uint32_t to, from;
    std::size_t anchor, tokens;  // of `from`
    Windows before, after;       // of `to`
    bool dirty;                  // the partial tails of `from` may hold non-finite values
    Address staged;              // the partial tails of `to`, by region and run
  };

  DeviceLock enter();  // the device lock, if the cache is sound and the process the right one
  Slot& open_slot(std::int64_t slot);
  std::uint32_t checked_index(std::int64_t slot) const;
  void check_tokens(std::int64_t tokens) const;

  std::size_t cover(std::size_t tokens) const noexcept;
  PageWindow window_of(const Region& region, std::size_t anchor, std::size_t tokens) const noexcept;
  std::size_t ready_of(std::uint32_t slot) const noexcept;
  std::uint32_t pick_free(std::size_t expected_tokens) const;
  Windows windows(std::uint32_t slot) const;
  Windows windows_at(std::uint32_t source, std::size_t anchor, std::size_t tokens) const;
  void set_windows(std::uint32_t slot, const Windows& windows);

  void grow_all(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
                Stream stream, bool advance);
  void grow(std::uint32_t slot, std::size_t tokens, Stream stream, bool may_move, DeviceLock& lock);
  bool moves_live(std::span<const Need> needs, const Windows& before) const;
  std::vector<Need> find_needs(std::uint32_t slot, std::size_t write_from);
  static std::vector<Address> homes_of(std::span<const Need> needs);
  void count_adopted(std::uint32_t slot, const Windows& before, std::span<const Need> needs);
  Address live_elsewhere(const Region& region, std::uint32_t slot, std::uint32_t index) const;
  void order_after_readers(const Region& region, std::uint32_t slot, std::size_t from,
                           Stream stream);
  std::vector<std::pair<Region*, std::uint32_t>> recyclable(std::uint32_t slot);
  bool leaves_pages(std::uint32_t slot, std::size_t anchor, std::size_t tokens) const;
  void leave_pages(std::uint32_t slot);

  std::uint32_t pick_for_prefix(std::uint32_t source, std::size_t tokens) const;
  void alias_prefix(Remap& remap, Region& region, std::uint32_t slot, std::uint32_t source,
                    std::size_t tokens);
  std::size_t full_pages(const Region& region, std::size_t tokens) const noexcept;
  std::size_t tail_bytes(const Region& region, std::size_t tokens) const noexcept;
  void copy(Address dst, Address src, std::size_t bytes, Stream stream);

  bool tails_dirty(std::uint32_t slot, std::size_t tokens) const;
  void mark_tails_dirty(std::uint32_t slot, std::size_t tokens);
  void fork_into(std::uint32_t slot, std::uint32_t source, std::size_t tokens,
                 const Windows& wanted, Stream stream, DeviceLock& lock);
  // Does it again after giving up all stale mappings if the system allows no more of them.
  template <typename Work>
  void with_mappings(DeviceLock& lock, Work work) {
    try {
      work();
    } catch (const OutOfMappings&) {
      if (pool_->reclaim(SIZE_MAX, lock) == 0) throw;
      work();
    }
  }
  void reorder(std::vector<Move>& moves, Stream stream, DeviceLock& lock);
  std::vector<Move> plan_moves(std::span<const std::int32_t> destinations,
                               std::span<const std::int32_t> sources);
  void stage_tails(std::vector<Move>& moves, Stream stream, DeviceLock& lock);
  void share_sources(const std::vector<Move>& moves, PagePins& pins,
                     std::unordered_set<PageId>& aliased) const;
  std::vector<Need> find_move_needs(const Move& move, const std::unordered_set<PageId>& aliased);
  void remap_moves(const std::vector<Move>& moves, bool& copied, Stream stream, DeviceLock& lock);
  void copy_tails(const std::vector<Move>& moves, Stream stream);
  void restore_tails(const std::vector<Move>& moves, Stream stream) noexcept;
  template <typename Visit>
  void for_tails(std::size_t tokens, Visit visit) const;

  void fence(Slot& slot, Stream stream);
  void fence_off(Slot& slot, Stream stream) noexcept;
  void before_unmap(Slot& slot);
  void give_back(DeviceLock& lock);
  enum class Stale : std::uint8_t {
    kAll,
    kFreeable,  // nobody uses the page elsewhere
    kSole,      // and no other slot has it mapped
  };
  std::size_t drop_scratch();
  std::size_t drop_stale(std::uint32_t slot, std::size_t limit, Stale which);
  void check_slot(std::uint32_t slot) const;

  const std::shared_ptr<PagePool> pool_;
  const std::size_t max_tokens_;
  const std::vector<std::uint32_t> tiles_;
  const bool keep_stale_;
  std::vector<Region> regions_;
  std::vector<Slot> slots_;
  Scratch scratch_;
  bool scratch_busy_ = false;             // it holds what a reorder has staged
  std::shared_ptr<Fence> scratch_fence_;  // after it, nobody uses the scratch memory
  std::uint64_t clock_ = 0, step_ = 0;
  bool lost_ = false;
  SpaceStats totals_;  // the counters of stats(); the rest is derived
};

}  // namespace vattn
