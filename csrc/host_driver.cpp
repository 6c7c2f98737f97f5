#include "host_driver.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "host_driver_limits.h"

namespace vattn {
namespace {

// Mappings that the rest of the process may still want (threads, libraries, other allocators).
constexpr std::size_t kSpareMappings = 2048;

[[noreturn]] void throw_errno(const char* call, int error, const std::string& arguments) {
  throw DriverError(call, error, std::string(std::strerror(error)) + " (" + arguments + ")");
}

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

}  // namespace

HostDriver::HostDriver(const HostOptions& options) : options_(options) {
  fd_ = ::memfd_create("vattn", MFD_CLOEXEC);
  if (fd_ < 0) throw_errno("memfd_create", errno, "name=vattn");
  // Never written, so all of it is the kernel's one zero page.
  zeros_ = ::mmap(nullptr, kZeroBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (zeros_ == MAP_FAILED) {
    ::close(fd_);
    throw_errno("mmap", errno, "zeros");
  }
  const std::size_t limit = read_number("/proc/sys/vm/max_map_count", 65530);
  const std::size_t taken = count_lines("/proc/self/maps") + kSpareMappings;
  map_limit_ = limit > taken ? limit - taken : 0;
}

HostDriver::~HostDriver() {
  // Pages live in the memfd and die with its last mapping. In a forked child the ranges were never
  // inherited, so there the addresses may belong to somebody else by now.
  if (usable()) {
    process_mappings() -= mappings_around(0, SIZE_MAX);
    for (const auto& [base, it] : reservations_) ::munmap(pointer(base), it.bytes);
  }
  ::munmap(zeros_, kZeroBytes);
  ::close(fd_);
}

MemoryInfo HostDriver::memory_info() const { return host_memory(); }

std::size_t HostDriver::physical_bytes() const {
  struct stat status{};
  if (::fstat(fd_, &status) != 0) throw_errno("fstat", errno, "memfd");
  return static_cast<std::size_t>(status.st_blocks) * 512;
}

int HostDriver::unmapped_protection() const noexcept {
  return options_.strict ? PROT_NONE : PROT_READ;
}

// Reserve ----------------------------------------------------------------------------------------

Address HostDriver::do_reserve(std::size_t bytes, std::size_t alignment) {
  const std::size_t padded = bytes + (alignment > kGranularity ? alignment : 0);
  if (padded < bytes) throw std::invalid_argument("reserve size overflows the address space");
  void* raw = ::mmap(nullptr, padded, unmapped_protection(),
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  count(Op::kReserve, 1);
  if (raw == MAP_FAILED) {
    if (errno == ENOMEM) {
      throw OutOfPages("cannot reserve " + std::to_string(bytes) +
                       " bytes of virtual addresses; lower max_seqs or max_tokens, or raise the "
                       "address-space limit (ulimit -v)");
    }
    throw_errno("mmap", errno, "reserve " + std::to_string(bytes) + " bytes");
  }
  const Address start = reinterpret_cast<Address>(raw);
  const Address base = (start + alignment - 1) / alignment * alignment;
  if (base > start) ::munmap(raw, base - start);
  if (start + padded > base + bytes) {
    ::munmap(pointer(base + bytes), start + padded - base - bytes);
  }
  ::madvise(pointer(base), bytes, MADV_DONTFORK);
  // Core dumps of a terabyte of nothing help nobody.
  ::madvise(pointer(base), bytes, MADV_DONTDUMP);
  const std::lock_guard lock(mutex_);
  reservations_.emplace(base, Reservation{bytes, home_end_});
  home_end_ += bytes;
  return base;
}

void HostDriver::do_release(Address base, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto found = reservations_.find(base);
  if (found == reservations_.end() || found->second.bytes != bytes) {
    throw std::invalid_argument("release of " + range_text(base, bytes) +
                                ", which is not a reservation; pass what reserve() gave");
  }
  require_unmapped(base, bytes);
  count(Op::kRelease, 1);
  if (::munmap(pointer(base), bytes) != 0) throw_errno("munmap", errno, range_text(base, bytes));
  reservations_.erase(found);
}

// Pages ------------------------------------------------------------------------------------------

void HostDriver::insert_offsets(Offsets& set, std::uint64_t offset, std::size_t bytes) {
  auto next = set.lower_bound(offset);
  if (next != set.end() && next->first == offset + bytes) {
    bytes += next->second;
    next = set.erase(next);
  }
  if (next != set.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      return;
    }
  }
  set.emplace(offset, bytes);
}

// Pre: the stretch lies in one element of the set.
void HostDriver::erase_offsets(Offsets& set, std::uint64_t offset, std::size_t bytes) {
  const auto it = std::prev(set.upper_bound(offset));
  const std::uint64_t end = it->first + it->second;
  it->second = offset - it->first;
  if (it->second == 0) set.erase(it);
  if (end > offset + bytes) set.emplace(offset + bytes, end - offset - bytes);
}

// Bytes of [offset, offset + bytes) that are in the set.
std::size_t HostDriver::overlap(const Offsets& set, std::uint64_t offset, std::size_t bytes) {
  std::size_t common = 0;
  auto it = set.upper_bound(offset);
  if (it != set.begin()) --it;
  for (; it != set.end() && it->first < offset + bytes; ++it) {
    const std::uint64_t first = std::max(it->first, offset);
    const std::uint64_t last = std::min(it->first + it->second, offset + bytes);
    if (last > first) common += last - first;
  }
  return common;
}

// Where in the memfd the addresses are at home; kNoPageHandle outside of any reservation.
std::uint64_t HostDriver::home_offset(Address address, std::size_t bytes) const {
  auto it = reservations_.upper_bound(address);
  if (it == reservations_.begin()) return kNoPageHandle;
  --it;
  if (address + bytes > it->first + it->second.bytes) return kNoPageHandle;
  return it->second.home + (address - it->first);
}

PageHandle HostDriver::page_at_home(Address address) const {
  const std::lock_guard lock(mutex_);
  return home_offset(address, 1);
}

// At home if nothing is there yet; else first fit at the lowest offset, so that neighbours in time
// are neighbours in the file.
std::uint64_t HostDriver::take_offsets(std::size_t bytes, Address home) {
  std::uint64_t offset = home != 0 ? home_offset(home, bytes) : kNoPageHandle;
  if (offset == kNoPageHandle || overlap(created_, offset, bytes) > 0) {
    const auto fits = [&](const auto& hole) { return hole.second >= bytes; };
    const auto hole = std::find_if(free_.begin(), free_.end(), fits);
    if (hole != free_.end()) {
      offset = hole->first;
      erase_offsets(free_, offset, bytes);
    } else {
      offset = end_;
      end_ += bytes;
    }
  }
  insert_offsets(created_, offset, bytes);
  return offset;
}

void HostDriver::give_offsets(std::uint64_t offset, std::size_t bytes) {
  erase_offsets(created_, offset, bytes);
  if (offset < kFirstHome) insert_offsets(free_, offset, bytes);
}

// Takes memory and zeroes it in one pass; returns 0 or an errno. fallocate() would take it only,
// and leave the zeroing to whoever touches it first.
int HostDriver::write_zeros(std::uint64_t offset, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t written =
        ::pwrite(fd_, zeros_, std::min(bytes, kZeroBytes), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    if (written == 0) return ENOSPC;
    offset += static_cast<std::uint64_t>(written);
    bytes -= static_cast<std::size_t>(written);
  }
  return 0;
}

void HostDriver::do_create(std::span<PageHandle> out, std::size_t page_bytes, Address home) {
  const std::size_t bytes = out.size() * page_bytes;
  std::uint64_t offset = 0;
  {
    const std::lock_guard lock(mutex_);
    offset = take_offsets(bytes, home);
  }
  // Outside the lock: this is where memory is taken and zeroed.
  count(Op::kCreate, 1);
  const int error = write_zeros(offset, bytes);
  if (error != 0) {
    ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                static_cast<off_t>(bytes));
    const std::lock_guard lock(mutex_);
    give_offsets(offset, bytes);
    if (error == ENOSPC || error == ENOMEM) {
      throw OutOfPages("the machine has no memory for " + std::to_string(out.size()) +
                       " pages of " + std::to_string(page_bytes) +
                       " bytes; lower the budget or release sequences");
    }
    throw_errno("pwrite", error, std::to_string(bytes) + " bytes of zeros");
  }
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = offset + i * page_bytes;
}

void HostDriver::require_created(const char* call, PageHandle page, std::size_t bytes) const {
  if (page % kGranularity != 0 || overlap(created_, page, bytes) != bytes) {
    throw std::invalid_argument(std::string(call) + " of page " + std::to_string(page) +
                                ", which does not exist (destroyed already?)");
  }
}

void HostDriver::do_destroy(std::span<const PageHandle> pages, std::size_t page_bytes,
                            std::size_t& destroyed) {
  {
    const std::lock_guard lock(mutex_);
    for (const PageHandle page : pages) require_created("destroy", page, page_bytes);
  }
  for (std::size_t i = 0; i < pages.size();) {
    std::size_t n = 1;
    while (i + n < pages.size() && pages[i + n] == pages[i] + n * page_bytes) ++n;
    count(Op::kDestroy, 1);
    if (::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(pages[i]),
                    static_cast<off_t>(n * page_bytes)) != 0) {
      throw_errno("fallocate", errno, "punch hole of " + std::to_string(n * page_bytes) + " bytes");
    }
    const std::lock_guard lock(mutex_);
    give_offsets(pages[i], n * page_bytes);
    i += n;
    destroyed = i;
  }
}

// Mappings ---------------------------------------------------------------------------------------

void HostDriver::require_reserved(const char* call, Address base, std::size_t bytes) const {
  auto it = reservations_.upper_bound(base);
  if (it != reservations_.begin()) {
    --it;
    if (base >= it->first && base + bytes <= it->first + it->second.bytes) return;
  }
  throw std::invalid_argument(std::string(call) + " of " + range_text(base, bytes) +
                              ", which is not inside one reservation; reserve it first");
}

void HostDriver::require_unmapped(Address base, std::size_t bytes) const {
  auto it = extents_.lower_bound(base);
  const bool next_overlaps = it != extents_.end() && it->first < base + bytes;
  const bool previous_overlaps = it != extents_.begin() && [&] {
    const auto previous = std::prev(it);
    return previous->first + previous->second.bytes > base;
  }();
  if (next_overlaps || previous_overlaps) {
    throw std::invalid_argument("the range " + range_text(base, bytes) +
                                " is already mapped in part; unmap it first");
  }
}

void HostDriver::require_mapped(const char* call, Address base, std::size_t bytes) const {
  auto it = extents_.upper_bound(base);
  Address reached = base;
  if (it != extents_.begin()) {
    --it;
    for (; it != extents_.end() && it->first <= reached && reached < base + bytes; ++it) {
      const Extent& extent = it->second;
      const Address end = std::min(base + bytes, it->first + extent.bytes);
      if (end <= reached) break;
      if ((reached - it->first) % extent.page_bytes != 0 ||
          (end - it->first) % extent.page_bytes != 0) {
        throw std::invalid_argument(std::string(call) + " of " + range_text(base, bytes) +
                                    " begins or ends inside a page of " +
                                    std::to_string(extent.page_bytes) + " bytes; use whole pages");
      }
      reached = end;
    }
  }
  if (reached < base + bytes) {
    throw std::invalid_argument(std::string(call) + " of " + range_text(base, bytes) +
                                ", which is not mapped from " + hex(reached) + "; map it first");
  }
}

// The kernel's mappings of the extents that touch a range and of the one before: an extent is one,
// and so is the hole behind it if there is one.
std::size_t HostDriver::mappings_around(Address base, std::size_t bytes) const {
  auto it = extents_.lower_bound(base);
  if (it != extents_.begin()) --it;
  std::size_t total = 0;
  for (; it != extents_.end() && it->first <= base + bytes; ++it) {
    const auto next = std::next(it);
    const bool hole = next == extents_.end() || next->first != it->first + it->second.bytes;
    total += hole ? 2 : 1;
  }
  return total;
}

void HostDriver::require_mappings_left(std::size_t more) const {
  const std::size_t taken = process_mappings().load(std::memory_order_relaxed);
  if (taken + 2 * more <= map_limit_) return;
  throw OutOfMappings(
      "this process is about to pass vm.max_map_count (" + std::to_string(taken) + " of " +
      std::to_string(map_limit_) +
      " mappings in use by caches); use larger pages (page_bytes), order=\"token\", "
      "fewer sequences, or raise the limit: sysctl -w vm.max_map_count=1048576");
}

// The limit is the process's, and so is the count, over all drivers.
std::atomic<std::size_t>& HostDriver::process_mappings() {
  static std::atomic<std::size_t> count{0};
  return count;
}

void HostDriver::map_extent(Address base, std::size_t bytes, std::uint64_t offset) {
  const int protection = options_.strict ? PROT_NONE : PROT_READ | PROT_WRITE;
  count(Op::kMap, 1);
  // Populate: taking every page-table entry now, in one call, costs a fifth of taking a fault each.
  if (::mmap(pointer(base), bytes, protection, MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd_,
             static_cast<off_t>(offset)) == MAP_FAILED) {
    if (errno == ENOMEM) {
      throw OutOfMappings(
          "the kernel refused to map " + std::to_string(bytes) +
          " bytes (vm.max_map_count or memory); use larger pages or fewer sequences");
    }
    throw_errno("mmap", errno, range_text(base, bytes));
  }
  if (::madvise(pointer(base), bytes, MADV_DONTFORK) != 0) {
    throw_errno("madvise", errno, range_text(base, bytes));
  }
}

void HostDriver::clear_range(Address base, std::size_t bytes) {
  if (::mmap(pointer(base), bytes, unmapped_protection(),
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
    throw_errno("mmap", errno, "unmap " + range_text(base, bytes));
  }
  ::madvise(pointer(base), bytes, MADV_DONTFORK);
  ::madvise(pointer(base), bytes, MADV_DONTDUMP);
}

void HostDriver::insert_extent(Address base, Extent extent) {
  const std::size_t inserted_bytes = extent.bytes;
  const Address at = base;
  const std::size_t before = mappings_around(at, inserted_bytes);
  auto next = extents_.lower_bound(base);
  if (next != extents_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second.bytes == base &&
        previous->second.offset + previous->second.bytes == extent.offset &&
        previous->second.page_bytes == extent.page_bytes) {
      base = previous->first;
      extent.bytes += previous->second.bytes;
      extent.offset = previous->second.offset;
      extents_.erase(previous);
    }
  }
  if (next != extents_.end() && next->first == base + extent.bytes &&
      next->second.offset == extent.offset + extent.bytes &&
      next->second.page_bytes == extent.page_bytes) {
    extent.bytes += next->second.bytes;
    extents_.erase(next);
  }
  extents_.emplace(base, extent);
  process_mappings() += mappings_around(at, inserted_bytes) - before;
}

void HostDriver::split_extent_at(Address address) {
  auto it = extents_.upper_bound(address);
  if (it == extents_.begin()) return;
  --it;
  const std::size_t head = address - it->first;
  if (head == 0 || head >= it->second.bytes) return;
  const Extent tail{it->second.bytes - head, it->second.offset + head, it->second.page_bytes};
  it->second.bytes = head;
  extents_.emplace(address, tail);
}

void HostDriver::erase_extents(Address base, std::size_t bytes) {
  const std::size_t before = mappings_around(base, bytes);
  split_extent_at(base);
  split_extent_at(base + bytes);
  extents_.erase(extents_.lower_bound(base), extents_.lower_bound(base + bytes));
  process_mappings() += mappings_around(base, bytes) - before;
}

void HostDriver::do_map(Address base, std::span<const PageHandle> pages, std::size_t page_bytes) {
  const std::lock_guard lock(mutex_);
  const std::size_t total = pages.size() * page_bytes;
  require_reserved("map", base, total);
  require_unmapped(base, total);
  for (const PageHandle page : pages) require_created("map", page, page_bytes);
  std::size_t pieces = 1;
  for (std::size_t i = 1; i < pages.size(); ++i) pieces += pages[i] != pages[i - 1] + page_bytes;
  require_mappings_left(pieces);
  for (std::size_t i = 0; i < pages.size();) {
    std::size_t n = 1;
    while (i + n < pages.size() && pages[i + n] == pages[i] + n * page_bytes) ++n;
    const Address at = base + i * page_bytes;
    try {
      map_extent(at, n * page_bytes, pages[i]);
    } catch (...) {
      erase_extents(base, i * page_bytes);
      try {
        clear_range(base, (i + n) * page_bytes);
      } catch (const DriverError&) {
        // What stays mapped there, the next map replaces: the extents say what counts.
      }
      throw;
    }
    insert_extent(at, {n * page_bytes, pages[i], page_bytes});
    i += n;
  }
}

void HostDriver::do_set_access(Address base, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  require_mapped("set_access", base, bytes);
  if (!options_.strict) return;  // map gave it: mmap takes the protection, a second call costs
  count(Op::kSetAccess, 1);
  if (::mprotect(pointer(base), bytes, PROT_READ | PROT_WRITE) != 0) {
    throw_errno("mprotect", errno, range_text(base, bytes));
  }
}

void HostDriver::do_unmap(Address base, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  require_mapped("unmap", base, bytes);
  count(Op::kUnmap, 1);
  clear_range(base, bytes);
  erase_extents(base, bytes);
}

void HostDriver::do_copy(Address dst, Address src, std::size_t bytes, Stream) {
  count(Op::kCopy, 1);
  std::memcpy(pointer(dst), pointer(src), bytes);
}

void HostDriver::do_fill(Address dst, std::uint8_t value, std::size_t bytes, Stream) {
  count(Op::kFill, 1);
  std::memset(pointer(dst), value, bytes);
}

void HostDriver::do_copy_to_host(void* host, Address src, std::size_t bytes, Stream) {
  count(Op::kCopy, 1);
  std::memcpy(host, pointer(src), bytes);
}

void HostDriver::do_copy_from_host(Address dst, const void* host, std::size_t bytes, Stream) {
  count(Op::kCopy, 1);
  std::memcpy(pointer(dst), host, bytes);
}

std::shared_ptr<Driver> make_host_driver(const HostOptions& options) {
  return std::make_shared<HostDriver>(options);
}

}  // namespace vattn
