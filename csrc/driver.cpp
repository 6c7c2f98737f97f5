#include "driver.h"

#include <sys/mman.h>

#include <bit>
#include <cstdio>
#include <exception>
#include <new>
#include <optional>

namespace vattn {

std::string hex(Address address) {
  char text[2 + 2 * sizeof(Address) + 1];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<std::size_t>(address));
  return text;
}

std::string range_text(Address base, std::size_t bytes) {
  return "[" + hex(base) + ", +" + std::to_string(bytes) + ")";
}

const char* op_name(Op op) noexcept {
  static constexpr std::array<const char*, kOps> kNames = {
      "reserve",    "release", "create", "destroy", "map",
      "set_access", "unmap",   "copy",   "fill",    "event"};
  return kNames[static_cast<std::size_t>(op)];
}

// Adds the time between construction and destruction to the counters of one kind, and the call to
// the trace, if there is one.
class Driver::Timer {
 public:
  Timer(Driver& driver, Op op, std::size_t bytes = 0, std::size_t pages = 0)
      : driver_(driver), op_(op) {
    if (driver.trace_.on()) [[unlikely]] {
      traced_.emplace(Traced{bytes, pages, std::uncaught_exceptions(), current_, {}});
      current_ = this;
    }
    start_ns_ = CallTrace::now_ns();
  }
  ~Timer() {
    const std::int64_t end_ns = CallTrace::now_ns();
    driver_.counts_[static_cast<std::size_t>(op_)].ns.fetch_add(
        static_cast<std::uint64_t>(end_ns - start_ns_), std::memory_order_relaxed);
    if (traced_) [[unlikely]] {
      tell(end_ns);
    }
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  // The latest of this thread that is traced and belongs to `driver`; null if there is none.
  static Timer* of(const Driver& driver) noexcept {
    return current_ != nullptr && &current_->driver_ == &driver ? current_ : nullptr;
  }
  void count(Op op, std::uint64_t calls) noexcept {
    traced_->calls[static_cast<std::size_t>(op)] += calls;
  }

 private:
  struct Traced {
    std::size_t bytes, pages;
    int exceptions;
    Timer* outer;
    std::array<std::uint64_t, kOps> calls;  // by kind, while this one ran
  };

  // Calls of another kind, which undid a part of this one, have records of their own.
  void tell(std::int64_t end_ns) noexcept {
    current_ = traced_->outer;
    const bool failed = std::uncaught_exceptions() > traced_->exceptions;
    for (std::size_t i = 0; i < kOps; ++i) {
      const bool own = i == static_cast<std::size_t>(op_);
      if (!own && traced_->calls[i] == 0) continue;
      driver_.trace_.add({start_ns_, end_ns, own ? traced_->bytes : 0,
                          static_cast<std::uint32_t>(own ? traced_->pages : 0),
                          static_cast<std::uint32_t>(traced_->calls[i]), CallTrace::thread_id(),
                          static_cast<std::uint8_t>(i), own && failed});
    }
  }

  static thread_local Timer* current_;

  Driver& driver_;
  const Op op_;
  std::optional<Traced> traced_;
  std::int64_t start_ns_;
};

thread_local Driver::Timer* Driver::Timer::current_ = nullptr;

namespace {
constexpr std::size_t kAliveBytes = 4096;
}

Driver::Driver() {
  void* page =
      ::mmap(nullptr, kAliveBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) throw std::bad_alloc();
  ::madvise(page, kAliveBytes, MADV_WIPEONFORK);
  *static_cast<char*>(page) = 1;
  alive_ = static_cast<const char*>(page);
}

Driver::~Driver() { ::munmap(const_cast<char*>(alive_), kAliveBytes); }

void Driver::ensure_usable() const {
  if (usable()) return;
  throw DriverError(name(), 0,
                    "this object was made before fork() and its memory does not exist in the "
                    "child; create a new one here, or start workers with the spawn method",
                    true);
}

void Driver::count(Op op, std::uint64_t calls) noexcept {
  counts_[static_cast<std::size_t>(op)].calls.fetch_add(calls, std::memory_order_relaxed);
  if (!trace_.on()) [[likely]]
    return;
  if (Timer* timer = Timer::of(*this)) return timer->count(op, calls);
  const std::int64_t now_ns = CallTrace::now_ns();  // a call that nobody times
  trace_.add({now_ns, now_ns, 0, 0, static_cast<std::uint32_t>(calls), CallTrace::thread_id(),
              static_cast<std::uint8_t>(op), false});
}

DriverCounters Driver::counters() const noexcept {
  DriverCounters out;
  for (std::size_t i = 0; i < kOps; ++i) {
    out[i] = {counts_[i].calls.load(std::memory_order_relaxed),
              counts_[i].ns.load(std::memory_order_relaxed)};
  }
  return out;
}

void Driver::require_page_multiple(const char* what, std::size_t value,
                                   std::size_t page_bytes) const {
  if (page_bytes == 0 || value % page_bytes != 0) {
    throw std::invalid_argument(std::string(what) + " " + std::to_string(value) +
                                " is not a multiple of " + std::to_string(page_bytes) +
                                " bytes, as " + name() + " requires");
  }
}

void Driver::require_page_size(std::size_t page_bytes) const {
  if (page_bytes == 0) throw std::invalid_argument("page size 0; give a positive size");
  require_page_multiple("page size", page_bytes, granularity());
}

Address Driver::reserve(std::size_t bytes, std::size_t alignment) {
  ensure_usable();
  if (bytes == 0) throw std::invalid_argument("cannot reserve 0 bytes; give a positive size");
  require_page_multiple("reserve size", bytes, granularity());
  if (!std::has_single_bit(alignment) || alignment % granularity() != 0) {
    throw std::invalid_argument("alignment " + std::to_string(alignment) +
                                " must be a power of two and a multiple of " +
                                std::to_string(granularity()));
  }
  Timer timer(*this, Op::kReserve, bytes);
  return do_reserve(bytes, alignment);
}

void Driver::release(Address base, std::size_t bytes) {
  ensure_usable();
  Timer timer(*this, Op::kRelease, bytes);
  do_release(base, bytes);
}

void Driver::create(std::span<PageHandle> out, std::size_t page_bytes, Address home) {
  ensure_usable();
  require_page_size(page_bytes);
  if (out.empty()) return;
  Timer timer(*this, Op::kCreate, out.size() * page_bytes, out.size());
  do_create(out, page_bytes, home);
}

std::size_t Driver::destroy(std::span<const PageHandle> pages, std::size_t page_bytes,
                            std::exception_ptr& error) noexcept {
  std::size_t destroyed = 0;
  try {
    ensure_usable();
    require_page_size(page_bytes);
    Timer timer(*this, Op::kDestroy, pages.size() * page_bytes, pages.size());
    do_destroy(pages, page_bytes, destroyed);
  } catch (...) {
    error = std::current_exception();
  }
  return destroyed;
}

void Driver::map(Address base, std::span<const PageHandle> pages, std::size_t page_bytes) {
  ensure_usable();
  require_page_size(page_bytes);
  require_page_multiple("map address", base, granularity());
  if (pages.empty()) return;
  Timer timer(*this, Op::kMap, pages.size() * page_bytes, pages.size());
  do_map(base, pages, page_bytes);
}

void Driver::set_access(Address base, std::size_t bytes) {
  ensure_usable();
  require_page_multiple("set_access address", base, granularity());
  require_page_multiple("set_access size", bytes, granularity());
  if (bytes == 0) return;
  Timer timer(*this, Op::kSetAccess, bytes);
  do_set_access(base, bytes);
}

void Driver::unmap(Address base, std::size_t bytes) {
  ensure_usable();
  require_page_multiple("unmap address", base, granularity());
  require_page_multiple("unmap size", bytes, granularity());
  if (bytes == 0) return;
  Timer timer(*this, Op::kUnmap, bytes);
  do_unmap(base, bytes);
}

void Driver::copy(Address dst, Address src, std::size_t bytes, Stream stream) {
  ensure_usable();
  if (bytes == 0) return;
  if (dst < src + bytes && src < dst + bytes) {
    throw std::invalid_argument("copy of " + std::to_string(bytes) +
                                " bytes between overlapping ranges; use disjoint ranges");
  }
  Timer timer(*this, Op::kCopy, bytes);
  do_copy(dst, src, bytes, stream);
}

void Driver::fill(Address dst, std::uint8_t value, std::size_t bytes, Stream stream) {
  ensure_usable();
  if (bytes == 0) return;
  Timer timer(*this, Op::kFill, bytes);
  do_fill(dst, value, bytes, stream);
}

void Driver::require_host_memory(const void* host) {
  if (host == nullptr) throw std::invalid_argument("host memory at address 0; give a buffer");
}

void Driver::copy_to_host(void* host, Address src, std::size_t bytes, Stream stream) {
  ensure_usable();
  if (bytes == 0) return;
  require_host_memory(host);
  Timer timer(*this, Op::kCopy, bytes);
  do_copy_to_host(host, src, bytes, stream);
}

void Driver::copy_from_host(Address dst, const void* host, std::size_t bytes, Stream stream) {
  ensure_usable();
  if (bytes == 0) return;
  require_host_memory(host);
  Timer timer(*this, Op::kCopy, bytes);
  do_copy_from_host(dst, host, bytes, stream);
}

EventHandle Driver::record(Stream stream) {
  ensure_usable();
  Timer timer(*this, Op::kEvent);
  return do_record(stream);
}

bool Driver::query(EventHandle event) {
  ensure_usable();
  if (event == 0) return true;
  Timer timer(*this, Op::kEvent);
  return do_query(event);
}

void Driver::wait(EventHandle event) {
  ensure_usable();
  if (event == 0) return;
  Timer timer(*this, Op::kEvent);
  do_wait(event);
}

void Driver::stream_wait(Stream stream, EventHandle event) {
  ensure_usable();
  if (event == 0) return;
  Timer timer(*this, Op::kEvent);
  do_stream_wait(stream, event);
}

void Driver::destroy_event(EventHandle event) noexcept {
  if (event != 0 && usable()) do_destroy_event(event);
}

}  // namespace vattn
