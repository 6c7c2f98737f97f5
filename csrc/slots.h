// The slots of one cache over all its regions: what each sequence holds, and the operations on it.
//
// Every public function takes the device lock. Functions that may call the driver say so; all of
// them leave the state as it was when they throw (stale mappings apart, which nobody can see).
// `stream` is the stream that the caller's kernels run on: copies and fills are submitted to it,
// and what they touch is not unmapped or reused before its work so far has finished.
#pragma once

#include <atomic>
#include <functional>
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
  std::size_t kept_slots = 0;
  std::size_t tokens = 0;          // of open slots
  std::size_t token_bytes = 0;     // their K and V, counting shared prefixes in each slot
  std::size_t live_bytes = 0;      // pages with at least one token of an open slot
  std::size_t cover_bytes = 0;     // mapped ahead: tile cover and prepared growth
  std::size_t stale_bytes = 0;     // mapped, used by nobody
  std::size_t kept_bytes = 0;      // of stale_bytes: pages with content that a free slot remembers
  std::size_t shared_bytes = 0;    // of live_bytes: pages in use by two or more slots
  std::size_t scratch_bytes = 0;   // staging for reorders
  std::size_t reserved_bytes = 0;  // virtual
  std::uint64_t pages_mapped = 0, pages_adopted = 0, pages_aliased = 0, pages_recycled = 0;
  std::uint64_t pages_reclaimed = 0, copied_bytes = 0;
  std::uint64_t evicted_tokens = 0;  // kept, and lost to somebody who needed the pages or the slot
};

// What an open slot has of the cache.
struct SlotUsage {
  std::size_t pages = 0;  // with its tokens, shared ones included
  // Of these, those that another open slot uses too, or did while this one used them already. So it
  // does not matter in which order sequences with pages in common end. What only free slots keep is
  // not shared.
  std::size_t shared_pages = 0;
  // Copied into it since it was opened, because it goes on from what another slot holds too:
  // partial tails in fork() and assign(), the beginning of a shared page before it is written. What
  // copy_in() brings back from host memory does not count.
  std::uint64_t copied_bytes = 0;
};

enum class PageState : std::uint8_t { kUnmapped, kLive, kShared, kCover, kStale, kKept };

// A slot with anything mapped, its tokens spread over cells. Each has the state that most needs to
// be seen of its pages, plus kRecycled if one of them is recycled.
struct SlotCells {
  std::uint32_t slot = 0;
  std::size_t tokens = 0, kept = 0;
  std::vector<std::uint8_t> cells;
};
inline constexpr std::uint8_t kRecycled = 0x80;

// The lengths that a kept slot can be reopened at or forked from; {0, 0} if it keeps nothing.
struct KeptRange {
  std::size_t lowest = 0, tokens = 0;
  bool operator==(const KeptRange&) const = default;
};

// Where a sequence would come from, for SlotSpace::admission_pages().
struct Admission {
  std::size_t tokens = 0;               // its length once admitted
  std::optional<std::uint32_t> source;  // the slot that has its first tokens
  std::size_t shared_tokens = 0;        // how many
  bool in_place = false;                // reopens `source` instead of forking it
  std::size_t anchor = 0;               // as of copy_in(), if it will be restored
  bool new_only = false;                // without pages of the source that nobody uses now
};

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

  // A free slot: the one asked for, or the one that keeps nothing and whose stale pages fit
  // `expected_tokens` best. If so many tokens cannot be had without taking pages that are kept, it
  // is the kept slot used longest ago, whose pages are then used where they are; unless fewer than
  // half of them are needed, since taking its end then loses less. Of slots that evict_first() has
  // named it is the first or none. No driver call. Throws OutOfSlots when none is free,
  // std::invalid_argument when it is taken.
  std::uint32_t open(std::optional<std::uint32_t> slot, std::size_t expected_tokens);
  // The slot keeps its mappings for its next user; with `keep` it also remembers its tokens.
  void release(std::uint32_t slot, Stream stream, bool keep = false);

  // Makes the first `tokens[i]` tokens of slot `slots[i]` and their cover mapped and writable from
  // the slot's present length on, and sets its length to at least that. All slots or none.
  void ensure(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
              Stream stream);
  // The same without moving the length: maps ahead of need. Kernels may use the sequences
  // meanwhile, so one whose next token goes to a page that it shares is left as it is, for ensure()
  // to do.
  void prepare(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
               Stream stream);
  // Whether prepare() would find nothing to do. False if somebody else has the device lock.
  bool prepared(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens);
  // Shortens a sequence. Its pages stay mapped until somebody needs them.
  void truncate(std::uint32_t slot, std::size_t tokens, Stream stream);

  // A new slot with the first `tokens` tokens of `source`, which is open or kept and stays so: full
  // pages are shared, the partial tail of each run is copied. Throws PagesGone when a kept slot no
  // longer has them.
  std::uint32_t fork(std::uint32_t source, std::size_t tokens, Stream stream);
  // Slot destinations[i] becomes what sources[i] was before the call, by sharing full pages and
  // copying partial tails. Only pages that differ are remapped.
  void assign(std::span<const std::int32_t> destinations, std::span<const std::int32_t> sources,
              Stream stream);

  // Kept slots. What they hold is stale and taken when it is needed: after all other stale pages,
  // from those that evict_first() names, then from the slot used longest ago, and from its end. No
  // function here calls the driver.
  KeptRange kept(std::uint32_t slot);
  // The shortest length at which the slot, open or kept, can be forked.
  std::size_t lowest(std::uint32_t slot);
  std::vector<KeptRange> kept_lengths();  // of all slots
  // Opens a kept slot with its first `tokens` tokens, where they are. The next ensure() of any
  // length orders its stream after the slot's last user and maps the cover, which was not kept: it
  // comes before the first kernel. Throws PagesGone.
  void reopen(std::uint32_t slot, std::size_t tokens);
  void forget(std::uint32_t slot);  // what it keeps is stale like anything else
  void touch(std::uint32_t slot);   // it is the one used last
  // These free slots lose content first, in this order, which replaces the one given before; the
  // others follow as they would without.
  void evict_first(std::span<const std::int32_t> slots);
  // Pages that come free if only this slot gives up what it keeps.
  std::size_t sole_pages(std::uint32_t slot);
  // Tokens lost from kept slots so far. Takes no lock.
  std::uint64_t evictions() const noexcept { return evicted_.load(std::memory_order_relaxed); }

  // Copies to host memory and back, for sequences that must give way. Saved are the pages of each
  // run that hold tokens which a query from the anchor on can reach: regions in order, their runs
  // in order, pages in order, each whole.
  std::size_t anchor(std::uint32_t slot);
  std::size_t saved_bytes(std::uint32_t slot);
  // `host` stays where it is until the stream is there.
  void copy_out(std::uint32_t slot, void* host, std::size_t bytes, Stream stream);
  // Makes the slot, whose first `first_token` tokens are right already, what the saved one was: of
  // `tokens` tokens, with that `anchor`. Maps what is missing; tokens before `first_token` are not
  // written. Throws OutOfPages.
  void copy_in(std::uint32_t slot, std::size_t tokens, std::size_t anchor, const void* host,
               std::size_t bytes, std::size_t first_token, Stream stream);

  // Unmaps every stale page, what slots keep included, and gives free pages back to the device.
  std::size_t trim();
  // Declares that the slot's pages may hold non-finite values: they are zeroed before reuse.
  void mark_dirty(std::uint32_t slot);

  std::size_t tokens(std::uint32_t slot);
  std::uint32_t generation(std::uint32_t slot);
  bool is_open(std::uint32_t slot);
  // Pages that ensure(slot, tokens) would have to find.
  std::size_t pages_needed(std::uint32_t slot, std::size_t tokens);
  // Pages out of PagePool::available() that ensure() of all of them would use up: those to find,
  // and stale ones that come into use where they are.
  std::size_t pages_needed_many(std::span<const std::int32_t> slots,
                                std::span<const std::int32_t> tokens);
  // The same for a sequence that is not open yet. With so many available, opening it and growing it
  // to its length succeeds.
  std::size_t admission_pages(const Admission& admission);
  // First token of `region` that the slot still holds.
  std::size_t first_token(std::uint32_t slot, std::uint32_t region);
  SpaceStats stats();
  // Of each of these open slots, in one pass over its pages.
  std::vector<SlotUsage> usage(std::span<const std::int32_t> slots);
  // State of each page of a slot's stretch, runs x pages_per_run.
  std::vector<PageState> page_states(std::uint32_t slot, std::uint32_t region);
  // For each of the same pages whether it is recycled; see Region.
  std::vector<std::uint8_t> recycled(std::uint32_t slot, std::uint32_t region);
  // Of all slots with anything mapped. Pre: cells > 0.
  std::vector<SlotCells> overview(std::uint32_t cells);
  std::vector<PageId> page_ids(std::uint32_t slot, std::uint32_t region);
  void check();

  std::size_t reclaim(std::size_t pages, Effort effort, DeviceLock& lock) override;

 private:
  struct Slot {
    // Of a free slot: lowest <= tokens and anchor <= tokens, or all 0.
    struct Kept {
      std::size_t lowest = 0, anchor = 0, tokens = 0;
    };
    // anchor <= tokens <= ready <= max_tokens. `anchor` is the first query of the latest step: no
    // window reaches further back than from there. [tokens, ready) is mapped and ours to write.
    // After reopen() `ready` is 0: pages that hold tokens are mapped, their cover may not be.
    std::size_t anchor = 0, tokens = 0, ready = 0;
    std::uint32_t generation = 0;
    bool open = false;
    std::uint64_t released_at = 0;
    std::uint64_t turn = 0;  // of a free slot, in the order of evict_first(); 0 if not named
    std::uint64_t step = 0;  // the latest ensure() that made it longer
    std::uint64_t copied_bytes = 0;  // as of SlotUsage; 0 when it is free
    std::shared_ptr<Fence> fence;    // after it, nobody uses the slot's stale pages
    Kept kept;
    bool dirty = false;  // may have mappings of pages with non-finite values, stale ones included
    bool was_kept = false;       // when it was released; it may have lost everything since
    std::size_t floor = 0;       // of kept tokens that an operation has plans with
    std::uint64_t searched = 0;  // state of the pool in which no page was kept here alone
  };
  struct Need {
    Region* region;
    std::uint32_t slot, index;
    std::size_t copy_bytes = 0;
    std::uint32_t copy_slot = 0;  // where to copy the first bytes from, at the same index
  };
  using Windows = std::vector<PageWindow>;
  struct Move {  // one part of assign(): `to` becomes what `from` was
    std::uint32_t to, from;
    std::size_t anchor, tokens;  // of `from`
    Windows before, after;       // of `to`
    bool dirty;                  // the partial tails of `from` may hold non-finite values
    Address staged;  // the partial tails of `to`, by region and run, if somebody wants them; or 0
  };

  DeviceLock enter();  // the device lock, if the cache is sound and the process the right one
  Slot& open_slot(std::int64_t slot);
  std::uint32_t checked_index(std::int64_t slot) const;
  void check_tokens(std::int64_t tokens) const;
  void check_batch(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens);

  std::size_t cover(std::size_t tokens) const noexcept;
  PageWindow window_of(const Region& region, std::size_t anchor, std::size_t tokens) const noexcept;
  std::size_t ready_of(std::uint32_t slot) const noexcept;
  std::optional<std::uint32_t> best_fit(std::size_t expected_tokens) const;
  bool goes_before(std::uint32_t a, std::uint32_t b) const noexcept;
  bool adoptable(std::uint32_t slot) const noexcept;
  std::optional<std::uint32_t> first_to_go(std::optional<std::uint32_t> except,
                                           bool to_adopt) const;
  std::uint32_t pick_free(std::size_t expected_tokens, const DeviceLock& lock) const;
  std::size_t fresh_pages(std::size_t anchor, std::size_t tokens) const noexcept;
  [[noreturn]] void throw_out_of_slots() const;
  PageWindow held(const Region& region, std::uint32_t slot) const noexcept {
    return slots_[slot].open ? region.window(slot) : region.kept(slot);
  }
  Windows windows(std::uint32_t slot) const;
  Windows windows_at(std::uint32_t source, std::size_t anchor, std::size_t tokens) const;
  void set_windows(std::uint32_t slot, const Windows& windows);

  void grow_all(std::span<const std::int32_t> slots, std::span<const std::int32_t> tokens,
                Stream stream, bool advance);
  void grow(std::uint32_t slot, std::size_t tokens, Stream stream, bool may_move, DeviceLock& lock);
  // Returns false if pages in use would move and may not.
  bool map_windows(std::uint32_t slot, const Windows& wanted, std::size_t written, Stream stream,
                   bool may_move, DeviceLock& lock, const std::function<void()>& fill);
  void drop_aliases(std::uint32_t slot, const Windows& wanted, std::size_t written);
  void map_needs(std::uint32_t slot, std::span<const Need> needs, bool moves, Stream stream,
                 DeviceLock& lock, const std::function<void()>& fill);
  void copy_needs(std::span<const Need> needs, Stream stream);
  bool moves_live(std::uint32_t slot, std::size_t written) const;
  std::vector<Need> find_needs(std::uint32_t slot, std::size_t write_from);
  static std::vector<Address> homes_of(std::span<const Need> needs);
  void count_adopted(std::uint32_t slot, const Windows& before, std::span<const Need> needs);
  std::uint32_t user_elsewhere(const Region& region, std::uint32_t slot, std::uint32_t index) const;
  void order_after_readers(const Region& region, std::uint32_t slot, std::size_t from,
                           Stream stream);
  std::vector<std::pair<Region*, std::uint32_t>> recyclable(std::uint32_t slot);
  bool leaves_pages(std::uint32_t slot, std::size_t anchor, std::size_t tokens) const;
  void leave_pages(std::uint32_t slot);

  std::size_t source_anchor(std::uint32_t source, std::size_t tokens) const;
  std::size_t lowest_length(std::uint32_t slot) const noexcept;
  const Slot& kept_slot(std::int64_t slot, std::size_t tokens) const;
  void keep_tokens(std::uint32_t slot, std::size_t tokens) noexcept;
  void lose(std::uint32_t slot, std::size_t tokens) noexcept;
  template <typename Counts>
  std::size_t shorter(std::uint32_t slot, std::size_t pages, Counts counts) const;
  std::size_t evict(std::size_t pages, bool wait);
  std::size_t drop_idle(std::size_t pages, bool wait);

  using Saved = std::function<void(const Region&, std::uint32_t run, PageWindow, std::size_t at)>;
  void check_saved(std::size_t bytes, std::size_t anchor, std::size_t tokens) const;
  std::size_t for_saved(std::size_t anchor, std::size_t tokens, const Saved& visit) const;
  void fill_in(std::uint32_t slot, std::size_t tokens, std::size_t anchor, const char* host,
               std::size_t first_token, Stream stream);

  std::size_t growth_pages(std::uint32_t slot, std::size_t tokens, bool adopted) const;
  std::uint32_t pick_for_prefix(std::uint32_t source, std::size_t tokens) const;
  void alias_prefix(Remap& remap, Region& region, std::uint32_t slot, std::uint32_t source,
                    std::size_t tokens);
  std::size_t full_pages(const Region& region, std::size_t tokens) const noexcept;
  std::size_t tail_bytes(const Region& region, std::size_t tokens) const noexcept;
  std::uint32_t held_pages(const Region& region, std::size_t tokens) const noexcept;
  void copy(Address dst, Address src, std::size_t bytes, Stream stream);
  PageState state_of(const Region& region, std::uint32_t slot, std::uint32_t index) const;
  SlotUsage usage_of(std::uint32_t slot) const;
  std::size_t tails_bytes(std::size_t tokens) const;
  void mark_shared(std::uint32_t slot);
  void mark_own(std::uint32_t slot, std::size_t tokens, bool tails);

  bool tails_dirty(std::uint32_t slot, std::size_t tokens) const;
  void mark_tails_dirty(std::uint32_t slot, std::size_t tokens);
  void fork_into(std::uint32_t slot, std::uint32_t source, std::size_t tokens,
                 const Windows& wanted, Stream stream, DeviceLock& lock);
  std::size_t reserved_for_fork(std::uint32_t source, std::size_t tokens,
                                const Windows& wanted) const;
  // Does it again after giving up stale mappings if the system allows no more of them: those that
  // keep nothing, then all.
  template <typename Work>
  void with_mappings(DeviceLock& lock, Work work) {
    for (const Effort effort : {Effort::kIdle, Effort::kWait}) {
      try {
        return work();
      } catch (const OutOfMappings&) {
        const std::size_t freed = pool_->reclaim(SIZE_MAX, lock, effort);
        if (effort == Effort::kWait && freed == 0) throw;
      }
    }
    work();
  }
  void reorder(std::vector<Move>& moves, Stream stream, DeviceLock& lock);
  std::vector<Move> plan_moves(std::span<const std::int32_t> destinations,
                               std::span<const std::int32_t> sources);
  void stage_tails(std::vector<Move>& moves, Stream stream, DeviceLock& lock);
  void share_sources(const std::vector<Move>& moves, PagePins& pins,
                     std::unordered_set<PageId>& aliased) const;
  std::vector<Need> find_move_needs(const Move& move, const std::unordered_set<PageId>& aliased);
  void remap_moves(const std::vector<Move>& moves, PagePins& pins, Stream stream, DeviceLock& lock);
  void copy_tails(const std::vector<Move>& moves, Stream stream);
  std::shared_ptr<Fence> fence_moves(Stream stream);
  template <typename Visit>
  void for_tails(std::size_t tokens, Visit visit) const;

  void fence(Slot& slot, Stream stream);
  void fence_off(Slot& slot, Stream stream) noexcept;
  void fence_or_wait(Slot& slot, Stream stream);
  void drop_dirty(std::uint32_t slot);
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
  void check_kept(std::uint32_t slot) const;

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
  std::atomic<std::uint64_t> evicted_ = 0;
  bool lost_ = false;
  SpaceStats totals_;  // the counters of stats(); the rest is derived
};

// Calls visit(region, index, bytes) for the partial tail of each run of `slot` at a length.
template <typename Visit>
void SlotSpace::for_tails(std::size_t tokens, Visit visit) const {
  for (const Region& region : regions_) {
    const std::size_t bytes = tail_bytes(region, tokens);
    if (bytes == 0) continue;
    const auto page = static_cast<std::uint32_t>(full_pages(region, tokens));
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      visit(region, run * region.pages_per_run() + page, bytes);
    }
  }
}

}  // namespace vattn
