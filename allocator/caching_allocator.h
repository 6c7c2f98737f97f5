// All of a program's device memory from one pool of pages, in the manner of PyTorch's caching
// allocator, whose rules for streams and graph captures it keeps.
//
//   small (to 2 KiB)   from slabs of 32 KiB
//   others             from ranges of virtual addresses, packed at 512 bytes, backed by pages
//
// A freed block stays mapped and serves the next request that fits, in the order of its stream.
// When none fits, any free pages serve any addresses: a window of free addresses is chosen that
// lacks the fewest pages, and it gets the pool's free ones, then those of free blocks elsewhere.
// Those are mapped at their new place and stay mapped at the old one, which is their shadow from
// then on. What runs in the order of their stream may use the new place at once, and nothing waits
// for an unmapping. When the program asks for the old place again and the page is idle, it serves
// there without any driver call: what a program does again and again makes none. (The idea of
// keeping several arrangements of the same pages mapped is GMLake's.)
//
// Locks: GIL, then the allocator's, then the pool's. No function here takes the GIL. Who waits for
// the pool's lock with the allocator's in hand has parked: the holder of the pool's lock may then
// take idle pages from this allocator (`reclaim`), whose state is at rest.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "figures.h"
#include "mapper.h"
#include "page_pool.h"
#include "recorder.h"
#include "scope.h"

namespace vattn {

struct CachingAllocatorOptions {
  std::size_t range_bytes = 0;  // 0: as much as the pool's budget, and an eighth more
};

inline constexpr std::size_t kUnknownBytes = ~std::size_t{0};

// The tag of the blocks that this thread allocates from now on, by its index in the table of names.
TagId tag_id(const std::string& name);  // makes an entry; throws std::invalid_argument when full
std::string tag_name(TagId tag);
TagId current_tag() noexcept;
TagId set_current_tag(TagId tag) noexcept;  // returns the one before

class CachingAllocator final : public Reclaimer {
 public:
  // `mapper` may be null: then shadows go only where their pages are needed.
  CachingAllocator(std::shared_ptr<PagePool> pool, std::shared_ptr<Mapper> mapper,
                   const CachingAllocatorOptions& options = {});
  // Nobody uses any block; those that are live go with it. The driver must still be there.
  ~CachingAllocator() override;

  // Memory for work of `stream`, aligned to 512 bytes; null for 0 bytes. Throws OutOfMemory,
  // std::invalid_argument (the thread's tag is paused), DriverError.
  void* allocate(std::size_t bytes, Stream stream);
  // `bytes` as asked for. Throws std::invalid_argument for what is not a live block, or another
  // size. Work of the block's stream, and of those it was recorded for, may still be using it.
  void free(void* address, std::size_t bytes = kUnknownBytes);
  // `stream` uses the block too: once freed it is not used again before what was submitted there
  // until then is done.
  void record_stream(void* address, Stream stream);
  // The block that an address lies in, and its size.
  void* base(void* address, std::size_t* bytes);

  // Whether an address is that of a live block.
  bool owns(const void* address);

  // Graph captures. Between begin and end, requests of streams that `filter` accepts come from the
  // pool's own memory, which nobody else gets before the last user has released it.
  void begin_graph_pool(GraphPoolId id, std::function<bool(Stream)> filter);
  void end_graph_pool(GraphPoolId id);
  void release_graph_pool(GraphPoolId id);

  // Tags. Pausing gives the pages of a tag's blocks back, addresses stay. With `backup` contents
  // are copied to the host (to `host`, which has room for `tag_live_bytes`, or if that is null to
  // memory of our own) and come back at resume; otherwise they are lost. pause waits for the
  // device, since a tag's blocks may be in use on any stream; not during a capture. resume throws
  // OutOfMemory and leaves the tag paused.
  std::size_t tag_live_bytes(TagId tag);
  void pause(TagId tag, bool backup, void* host = nullptr, std::size_t host_bytes = 0);
  void resume(TagId tag);
  bool is_paused(TagId tag);
  void set_tag_budget(TagId tag, std::size_t bytes);  // 0: none

  // Most memory that this allocator may have mapped; 0: as much as the pool gives.
  void set_limit(std::size_t bytes);
  // Gives idle pages beyond `keep_bytes` back to the device, waiting for their streams (for each
  // by its event); returns the bytes given. Frees blocks whose other streams are done.
  std::size_t trim(std::size_t keep_bytes = 0);

  Figures figures();
  void reset_peaks();
  void reset_accumulated();
  std::vector<SegmentInfo> segments();
  // The last operations, oldest first; `max_events` 0 stops recording.
  void record(std::size_t max_events);
  std::vector<Event> recorded(std::uint64_t* dropped = nullptr);
  const std::shared_ptr<PagePool>& pool() const noexcept { return pool_; }
  const std::shared_ptr<Mapper>& mapper() const noexcept { return mapper_; }

  // Waits until the background is done with its jobs.
  void settle();
  // Throws InvariantError.
  void check();

  // Reclaimer.
  std::size_t reclaim(std::size_t pages, Effort effort, DeviceLock& lock) override;
  std::size_t idle_pages(const DeviceLock& lock) noexcept override;

 private:
  struct PendingFree {
    Address address;
    std::vector<Stream> users;
    std::vector<std::shared_ptr<Fence>> fences;
  };
  // Where a page belongs. It may be mapped at other places, too, where it served before: those are
  // shadows, and as long as they stay, it serves there again without a driver call.
  struct Place {
    Range* range = nullptr;
    std::size_t index = 0;
    Address address() const noexcept { return range->base() + index * range->page_bytes; }
  };
  class Resting;
  struct Growth;
  class IdleIndex;
  // Whose idle pages a request may have.
  enum class Reach {
    kDone,          // those whose work is done
    kOwnOrder,      // and those of its own stream, in whose order it runs
    kOtherStreams,  // and others, by making its stream wait for them
  };
  // While it lives, pages that we ask the pool for are not taken from ourselves.
  class Busy {
   public:
    explicit Busy(bool& busy) : busy_(busy) { busy_ = true; }
    ~Busy() { busy_ = false; }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

   private:
    bool& busy_;
  };
  struct Capture {
    GraphPoolId id;
    std::function<bool(Stream)> filter;
  };
  using Lock = std::unique_lock<std::mutex>;
  // While it lives, the state is at rest: whoever has the pool's lock may use it. It ends with the
  // pool's lock in hand, so that nobody does then.
  class Parked {
   public:
    explicit Parked(std::atomic<bool>& parked) : parked_(parked) {
      parked_.store(true, std::memory_order_release);
    }
    ~Parked() { parked_.store(false, std::memory_order_release); }
    Parked(const Parked&) = delete;
    Parked& operator=(const Parked&) = delete;

   private:
    std::atomic<bool>& parked_;
  };

  Lock lock();
  DeviceLock park_and_lock_pool();
  void require_usable() const { pool_->driver().ensure_usable(); }

  // caching_allocator.cpp: the fast paths
  Scope& scope_for(Stream stream);
  Scope& add_scope(TagId tag);
  Arena& arena_for(Scope& scope, Stream stream, SizeKind kind);
  void* allocate_piece(Scope& scope, Stream stream, std::size_t bytes);
  Block* take_hole(Scope& scope, Arena& arena, std::size_t bytes, std::size_t align);
  Block* allocate_block(Scope& scope, Arena& arena, std::size_t bytes);
  Slab* new_slab(Scope& scope, Arena& arena, std::size_t piece_bytes);
  void free_piece(Slab& slab, Address address, std::size_t bytes);
  void free_block(Block* block, std::size_t bytes);
  void give_piece(Slab& slab, std::uint32_t piece);
  void link(Slab& slab) noexcept;
  void drop_slab(Slab& slab);
  Slab* slab_at(Address address) noexcept;
  Block* block_at(Address address) noexcept;
  [[noreturn]] void throw_bad_free(Address address);
  [[noreturn]] void throw_unknown(const char* what, Address address);

  // streams.cpp: blocks that several streams use
  bool begin_pending(Address address);
  void finish_free(Address address);
  void poll_pending(bool all, bool wait);
  bool capturing(Stream stream);
  void drop_released();
  void mark_freed();
  Scope* graph_scope(GraphPoolId id) noexcept;
  void start_deferred();

  // grow.cpp: when nothing that is mapped fits
  Block* grow(Scope& scope, Arena& arena, std::size_t bytes, std::size_t align);
  Block* take_again(Arena& arena, std::size_t bytes, std::size_t align);
  std::size_t allowed_pages(const Scope& scope, bool from_outside) const noexcept;
  std::size_t room(const Growth& growth, bool from_outside) const noexcept;
  Window claim_window(Growth& growth, std::size_t align);
  Block* revive(Growth& growth, const IdleIndex& idle);
  void find_pages(Growth& growth, DeviceLock& pool_lock);
  void take_from_pool(Growth& growth, std::size_t pages, Effort effort, DeviceLock& pool_lock);
  void borrow(Growth& growth, Reach reach);
  bool may_use(Arena& arena, Block* block, Stream stream, Reach reach);
  std::vector<Block*> idle_blocks();
  void map_claimed(Growth& growth, DeviceLock& pool_lock);
  void map_unmapped(Growth& growth);
  void unmap_growth(Growth& growth) noexcept;
  void make_room(const Growth& growth);
  void set_owner(PageId page, Range& range, std::size_t index);
  void commit(Growth& growth);
  void abandon(Growth& growth) noexcept;
  std::string why_not(const Growth& growth) const;
  [[noreturn]] void throw_out_of_memory(const Scope& scope, std::size_t bytes, DeviceLock& lock,
                                        const std::string& why);

  // give_back.cpp: shadows, and pages that go to the pool
  Lock lock_from_pool();
  void flush_all();
  void drop_shadows(std::size_t keep_pages, bool wait, DeviceLock& pool_lock);
  void drop_shadows_in_background();
  void forget_pages(Block* block, const DeviceLock& pool_lock);
  std::size_t give_back(std::size_t pages, bool wait, DeviceLock& pool_lock);
  std::size_t give_pages_of(Block* block, std::size_t most, DeviceLock& pool_lock);
  std::size_t give_block(Block* block, DeviceLock& pool_lock);
  void leave_home(PageId page);
  bool settled(Scope& scope, bool wait);
  bool unmap_free(Scope& scope, DeviceLock& pool_lock);
  std::size_t give_idle(std::size_t pages, bool wait, DeviceLock& pool_lock);
  void drop_shadow(Block* block, DeviceLock& pool_lock);
  bool work_done(const Block& block, bool wait);
  void drop_released_scopes(bool wait, DeviceLock& pool_lock);
  void unmap_paused(DeviceLock& pool_lock);

  // pause.cpp
  Scope& tag_scope(TagId tag, const char* what);
  template <typename F>
  void for_each_live(Scope& scope, F visit);
  void save(Scope& scope, void* host, std::size_t bytes);
  void restore(Scope& scope);
  template <typename F>
  void copy_all(const std::vector<Block*>& live, F copy);
  std::vector<Block*> live_blocks(Scope& scope);
  std::vector<bool> shadow_pages(const Range& range) const;
  void unmap_all(Scope& scope, DeviceLock& lock);
  void map_live(Scope& scope, DeviceLock& pool_lock);
  PageRefs pages_for_resume(Scope& scope, std::span<const Address> homes, DeviceLock& pool_lock);
  template <typename F>
  static std::vector<std::pair<std::size_t, std::size_t>> stretches(const Range& range, bool mapped,
                                                                    F wanted);

  // report.cpp
  template <typename F>
  void for_each_group(F visit);
  void add_pieces(const Slab& slab, std::vector<BlockInfo>& out) const;
  void count_allocation(Scope& scope, SizeKind kind, std::size_t bytes, std::size_t asked);
  void count_free(Scope& scope, SizeKind kind, std::size_t bytes, std::size_t asked);
  void count_mapped(Range& range, std::ptrdiff_t pages);
  void check_slabs() const;
  void check_locked(const DeviceLock& pool_lock);

  const std::shared_ptr<PagePool> pool_;
  const std::shared_ptr<Mapper> mapper_;
  const std::size_t page_bytes_;
  const std::size_t range_bytes_;
  // What other processes see, and the place of what it counts there.
  const StatsEntry<AllocatorFigures> figures_;

  alignas(64) std::mutex mutex_;
  std::atomic<bool> parked_{false};  // the holder of mutex_ waits for the pool's lock
  bool busy_ = false;                // with the pool's lock: the pool is not to ask us for pages
  std::atomic<bool> job_queued_{false};
  bool lost_ = false;  // a failure could not be undone: mappings are unknown
  std::uint64_t clock_ = 0;
  std::uint32_t polls_ = 0;
  std::atomic<std::size_t> quick_bytes_{0};

  RequestBook requests_;
  BlockStore blocks_;
  std::unordered_map<Address, Block*> by_address_;
  std::unordered_map<Address, std::unique_ptr<Slab>> slabs_;
  std::unordered_map<Address, std::vector<Stream>> users_;
  std::deque<PendingFree> pending_;
  std::vector<Address> deferred_;  // freed during a capture on a stream that uses them
  std::vector<Place> owner_;       // by page
  std::size_t shadow_pages_ = 0;   // mapped where they do not belong
  std::vector<Capture> captures_;
  std::vector<std::unique_ptr<Scope>> scopes_;  // by tag, those of graph pools behind
  std::vector<Scope*> by_tag_;
  std::atomic<std::size_t>& idle_pages_;
  std::size_t owned_pages_ = 0;
  std::size_t limit_pages_ = 0;
  Figures book_;  // what is counted beside them; the rest is filled in on demand
  Recorder recorder_;
};

}  // namespace vattn
