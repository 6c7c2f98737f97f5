// The contract between vattn and whatever provides virtual memory.
//
// Everything above this header is the same on every device. A driver implements the private
// `do_*` functions; the public ones check the preconditions that all drivers share, count the
// underlying calls and time them, so that an implementation holds nothing but its own device.
//
// Conventions
//   * Sizes are bytes. `page_bytes` is a multiple of `granularity()`, and every address and size
//     given to map, set_access and unmap is a multiple of the page size in use.
//   * A failed call leaves the state as it was: half-done runs are rolled back before the throw.
//   * Errors: std::invalid_argument (a precondition), OutOfPages (no memory: recoverable),
//     DriverError (anything else; `fatal()` when the context is lost).
//   * Thread-safe: any thread may call any function at any time. Two calls on overlapping ranges
//     at once are the caller's mistake.
//   * Whether map, set_access and unmap are synchronous with the device is not promised: never
//     call unmap on a range that an unfinished stream may use.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "call_trace.h"
#include "errors.h"

namespace vattn {

using Address = std::uintptr_t;
using PageHandle = std::uint64_t;  // one physical page, opaque to all but its driver
inline constexpr PageHandle kNoPageHandle = ~PageHandle{0};
using Stream = std::uintptr_t;      // a CUstream; 0 is the default stream; ignored on the host
using EventHandle = std::uint64_t;  // 0 is no event

// Addresses in error messages: ``0x1000``, and ``[0x1000, +4096)``.
std::string hex(Address address);
std::string range_text(Address base, std::size_t bytes);

struct MemoryInfo {
  std::size_t free_bytes;
  std::size_t total_bytes;
};

// Where tensors over this driver's memory live, in DLPack's numbering.
struct DlpackDevice {
  int type;  // kDLCPU = 1, kDLCUDA = 2
  int id;
};

enum class Op : std::uint8_t {
  kReserve,
  kRelease,
  kCreate,
  kDestroy,
  kMap,
  kSetAccess,
  kUnmap,
  kCopy,
  kFill,
  kEvent,
  kCount
};
inline constexpr std::size_t kOps = static_cast<std::size_t>(Op::kCount);
const char* op_name(Op op) noexcept;

struct OpCount {
  std::uint64_t calls = 0;  // calls of the underlying API (a run of 8 pages may be 8 calls, or 1)
  std::uint64_t ns = 0;     // wall time inside the driver
};
using DriverCounters = std::array<OpCount, kOps>;

class Driver {
 public:
  Driver();
  virtual ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // "host", "cuda:0": for messages and reports.
  virtual std::string name() const = 0;
  // Smallest page; every page size is a multiple of it.
  virtual std::size_t granularity() const noexcept = 0;
  // The page size to use when the user gives none.
  virtual std::size_t default_page_bytes() const noexcept = 0;
  virtual DlpackDevice dlpack_device() const noexcept = 0;
  // Physical memory of the device as the operating system or the driver sees it.
  virtual MemoryInfo memory_info() const = 0;
  // Bytes of all pages that exist now, as the system that holds them counts them.
  virtual std::size_t physical_bytes() const = 0;

  // Reserves `bytes` of virtual addresses, aligned to `alignment` (a power of two and a multiple
  // of the granularity). Nothing physical. Release takes exactly what reserve gave, with nothing
  // mapped in it.
  Address reserve(std::size_t bytes, std::size_t alignment);
  void release(Address base, std::size_t bytes);

  // Creates `out.size()` pages of `page_bytes` each, all or none. Their contents are what
  // `fresh_pages_are_zero()` says. Where handles have an order, neighbours in `out` are
  // neighbours in it, so that mapping them side by side is cheap. `home` says where they will be
  // mapped first, 0 if unknown: a driver for which neighbours matter then makes pages that are
  // neighbours of those already mapped around there.
  void create(std::span<PageHandle> out, std::size_t page_bytes, Address home = 0);
  // The page that is at home at this address, whether it exists or not; kNoPageHandle if the driver
  // has no such preference.
  virtual PageHandle page_at_home(Address) const { return kNoPageHandle; }
  // Destroys pages that are not mapped anywhere. Memory goes back to the device. Returns how many
  // are gone, from the front: fewer than asked means that the next one failed; its error is then
  // in `error`, and it and the rest still exist.
  std::size_t destroy(std::span<const PageHandle> pages, std::size_t page_bytes,
                      std::exception_ptr& error) noexcept;
  virtual bool fresh_pages_are_zero() const noexcept = 0;
  // Whether reserved memory that is not mapped may be read, and gives zeros.
  virtual bool holes_are_zero() const noexcept { return false; }

  // Maps `pages` side by side at `base`, all or none. Pre: the range lies in one reservation and
  // is not mapped. A page may be mapped at many addresses. Post: mapped but not accessible:
  // nobody may touch the range before `set_access`.
  void map(Address base, std::span<const PageHandle> pages, std::size_t page_bytes);
  // Makes a mapped range readable and writable. Called once per contiguous range, never per page,
  // and only over fresh mappings. Pre: every byte is mapped; the ends are ends of pages.
  void set_access(Address base, std::size_t bytes);
  // Pre: every byte is mapped; the ends are ends of pages; no unfinished work uses the range.
  void unmap(Address base, std::size_t bytes);

  // Device-side copy and fill, in stream order. Ranges must not overlap.
  void copy(Address dst, Address src, std::size_t bytes, Stream stream);
  void fill(Address dst, std::uint8_t value, std::size_t bytes, Stream stream);
  // The same to and from memory of this process that is not the driver's. It must stay where it is
  // until the copy is done; unless it is page-locked the call may wait for the stream.
  void copy_to_host(void* host, Address src, std::size_t bytes, Stream stream);
  void copy_from_host(Address dst, const void* host, std::size_t bytes, Stream stream);

  // Events mark "everything submitted to `stream` so far". A driver whose work is always complete
  // when a call returns (the host) gives the event 0, which is done.
  EventHandle record(Stream stream);
  bool query(EventHandle event);                       // true: done
  void wait(EventHandle event);                        // blocks the calling thread
  void stream_wait(Stream stream, EventHandle event);  // blocks the stream, not the thread
  void destroy_event(EventHandle event) noexcept;

  // Streams of the driver's own, for callers without a framework. On the host: stream 0.
  virtual Stream create_stream() { return 0; }
  virtual void destroy_stream(Stream) {}
  virtual void synchronize(Stream) {}
  // Waits for all work on the device, whatever stream it is in. Not while a graph is captured.
  virtual void synchronize_all() {}

  DriverCounters counters() const noexcept;
  // Every call between its start and its stop, with what it was given; off until then.
  CallTrace& trace() noexcept { return trace_; }

  // Throws DriverError in a child process after fork(): the ranges do not exist there.
  void ensure_usable() const;
  bool usable() const noexcept { return *alive_ != 0; }

 protected:
  // Adds `calls` underlying calls of kind `op` to the counters.
  void count(Op op, std::uint64_t calls) noexcept;

 private:
  virtual Address do_reserve(std::size_t bytes, std::size_t alignment) = 0;
  virtual void do_release(Address base, std::size_t bytes) = 0;
  virtual void do_create(std::span<PageHandle> out, std::size_t page_bytes, Address home) = 0;
  // Adds to `destroyed` as it goes, so that the caller knows what is left after a throw.
  virtual void do_destroy(std::span<const PageHandle> pages, std::size_t page_bytes,
                          std::size_t& destroyed) = 0;
  virtual void do_map(Address base, std::span<const PageHandle> pages, std::size_t page_bytes) = 0;
  virtual void do_set_access(Address base, std::size_t bytes) = 0;
  virtual void do_unmap(Address base, std::size_t bytes) = 0;
  virtual void do_copy(Address dst, Address src, std::size_t bytes, Stream stream) = 0;
  virtual void do_fill(Address dst, std::uint8_t value, std::size_t bytes, Stream stream) = 0;
  virtual void do_copy_to_host(void* host, Address src, std::size_t bytes, Stream stream) = 0;
  virtual void do_copy_from_host(Address dst, const void* host, std::size_t bytes,
                                 Stream stream) = 0;
  virtual EventHandle do_record(Stream stream) = 0;
  virtual bool do_query(EventHandle event) = 0;
  virtual void do_wait(EventHandle event) = 0;
  virtual void do_stream_wait(Stream stream, EventHandle event) = 0;
  virtual void do_destroy_event(EventHandle event) noexcept = 0;

  void require_page_size(std::size_t page_bytes) const;
  void require_page_multiple(const char* what, std::size_t value, std::size_t page_bytes) const;
  static void require_host_memory(const void* host);

  struct AtomicCount {
    std::atomic<std::uint64_t> calls{0};
    std::atomic<std::uint64_t> ns{0};
  };
  class Timer;
  std::array<AtomicCount, kOps> counts_;
  CallTrace trace_;
  // One page that the kernel wipes in a forked child, which makes usable() a plain load.
  volatile const char* alive_ = nullptr;
};

// An event shared by everything that must wait for the same point of a stream. Not thread-safe.
class Fence {
 public:
  Fence(std::shared_ptr<Driver> driver, Stream stream)
      : driver_(std::move(driver)), stream_(stream), event_(driver_->record(stream)) {}
  ~Fence() { driver_->destroy_event(event_); }
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;

  Stream stream() const noexcept { return stream_; }
  bool done() {
    if (event_ != 0 && driver_->query(event_)) forget();
    return event_ == 0;
  }
  void wait() {
    if (event_ == 0) return;
    driver_->wait(event_);
    forget();
  }
  // Orders later work of `stream` after this fence without blocking the thread.
  void order_before(Stream stream) {
    if (event_ != 0 && stream != stream_) driver_->stream_wait(stream, event_);
  }

 private:
  // What is done stays done: nobody asks the driver twice.
  void forget() noexcept { driver_->destroy_event(std::exchange(event_, 0)); }

  std::shared_ptr<Driver> driver_;
  Stream stream_;
  EventHandle event_;
};

}  // namespace vattn
