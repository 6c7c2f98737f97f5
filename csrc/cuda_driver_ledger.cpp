#include "cuda_driver_ledger.h"

#include <cstdio>
#include <iterator>
#include <stdexcept>
#include <string>

namespace vattn {
namespace {

std::invalid_argument bad_range(const char* call, Address base, std::size_t bytes,
                                const std::string& what) {
  return std::invalid_argument(std::string(call) + " of " + range_text(base, bytes) + what);
}

}  // namespace

// Reservations -----------------------------------------------------------------------------------

void CudaLedger::add_reservation(Address base, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  reservations_.emplace(base, bytes);
}

void CudaLedger::remove_reservation(Address base, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto found = reservations_.find(base);
  if (found == reservations_.end() || found->second != bytes) {
    throw bad_range("release", base, bytes,
                    ", which is not a reservation; pass what reserve() gave");
  }
  require_unmapped("release", base, bytes);
  reservations_.erase(found);
}

void CudaLedger::require_reserved(const char* call, Address base, std::size_t bytes) const {
  auto it = reservations_.upper_bound(base);
  if (it != reservations_.begin()) {
    --it;
    const std::size_t offset = base - it->first;
    if (offset < it->second && bytes <= it->second - offset) return;
  }
  throw bad_range(call, base, bytes, ", which is not inside one reservation; reserve it first");
}

// Pages ------------------------------------------------------------------------------------------

void CudaLedger::add_page(PageHandle page, std::size_t page_bytes) {
  add_pages({&page, 1}, page_bytes);
}

void CudaLedger::add_pages(std::span<const PageHandle> pages, std::size_t page_bytes) {
  const std::lock_guard lock(mutex_);
  for (const PageHandle page : pages) {
    if (pages_.emplace(page, page_bytes).second) page_bytes_total_ += page_bytes;
  }
}

void CudaLedger::require_page(const char* call, PageHandle page, std::size_t page_bytes) const {
  const auto found = pages_.find(page);
  if (found != pages_.end() && found->second == page_bytes) return;
  const std::string what = std::string(call) + " of page " + hex(page);
  if (found == pages_.end()) {
    throw std::invalid_argument(what + ", which does not exist (destroyed already?)");
  }
  throw std::invalid_argument(what + " as one of " + std::to_string(page_bytes) +
                              " bytes; it was created with " + std::to_string(found->second));
}

void CudaLedger::require_pages(const char* call, std::span<const PageHandle> pages,
                               std::size_t page_bytes) const {
  const std::lock_guard lock(mutex_);
  for (const PageHandle page : pages) require_page(call, page, page_bytes);
}

void CudaLedger::remove_page(PageHandle page, std::size_t page_bytes) {
  const std::lock_guard lock(mutex_);
  require_page("destroy", page, page_bytes);
  pages_.erase(page);
  page_bytes_total_ -= page_bytes;
}

std::size_t CudaLedger::page_bytes_total() const {
  const std::lock_guard lock(mutex_);
  return page_bytes_total_;
}

// Mappings ---------------------------------------------------------------------------------------

// The extent that holds `address`, or the end.
CudaLedger::Extents::const_iterator CudaLedger::extent_at(Address address) const {
  auto it = extents_.upper_bound(address);
  if (it == extents_.begin()) return extents_.end();
  --it;
  return address - it->first < it->second.bytes ? it : extents_.end();
}

void CudaLedger::require_unmapped(const char* call, Address base, std::size_t bytes) const {
  const auto next = extents_.lower_bound(base);
  const bool overlaps =
      extent_at(base) != extents_.end() || (next != extents_.end() && next->first - base < bytes);
  if (overlaps) {
    throw bad_range(call, base, bytes, ", which is mapped already in part; unmap it first");
  }
}

void CudaLedger::require_page_end(const char* call, Address address) const {
  const auto it = extent_at(address);
  if (it == extents_.end() || (address - it->first) % it->second.page_bytes == 0) return;
  throw std::invalid_argument(std::string(call) + " that begins or ends at " + hex(address) +
                              ", inside a page of " + std::to_string(it->second.page_bytes) +
                              " bytes; take whole pages");
}

void CudaLedger::require_mapping(const char* call, Address base, std::size_t bytes) const {
  const std::lock_guard lock(mutex_);
  require_reserved(call, base, bytes);
  const Address end = base + bytes;
  for (Address reached = base; reached < end;) {
    const auto it = extent_at(reached);
    if (it == extents_.end()) {
      throw bad_range(call, base, bytes,
                      ", which is not mapped from " + hex(reached) + "; map it first");
    }
    reached = it->first + it->second.bytes;
  }
  require_page_end(call, base);
  require_page_end(call, end);
}

void CudaLedger::add_mapping(Address base, std::span<const PageHandle> pages,
                             std::size_t page_bytes) {
  const std::lock_guard lock(mutex_);
  Extent extent{pages.size() * page_bytes, page_bytes};
  require_reserved("map", base, extent.bytes);
  require_unmapped("map", base, extent.bytes);
  for (const PageHandle page : pages) require_page("map", page, page_bytes);

  auto next = extents_.lower_bound(base);
  if (next != extents_.end() && next->first == base + extent.bytes &&
      next->second.page_bytes == page_bytes) {
    extent.bytes += next->second.bytes;
    next = extents_.erase(next);
  }
  if (next != extents_.begin()) {
    Extent& before = std::prev(next)->second;
    if (std::prev(next)->first + before.bytes == base && before.page_bytes == page_bytes) {
      before.bytes += extent.bytes;
      return;
    }
  }
  extents_.emplace_hint(next, base, extent);
}

void CudaLedger::split_at(Address address) {
  const auto found = extent_at(address);
  if (found == extents_.end() || found->first == address) return;
  Extent& head = extents_.at(found->first);
  const std::size_t kept = address - found->first;
  extents_.emplace(address, Extent{head.bytes - kept, head.page_bytes});
  head.bytes = kept;
}

void CudaLedger::remove_mapping(Address base, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  split_at(base);
  split_at(base + bytes);
  extents_.erase(extents_.lower_bound(base), extents_.lower_bound(base + bytes));
}

}  // namespace vattn
