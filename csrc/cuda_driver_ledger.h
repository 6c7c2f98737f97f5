// What exists on a CUDA device by our own count: reservations, pages and mappings.
//
// CUDA answers every broken precondition with the same CUDA_ERROR_INVALID_VALUE, and some of them
// (a handle released twice) not reliably. The ledger finds them before the driver is called, names
// them, and keeps apart what the caller did wrong from what the driver refused.
//
// Neighbouring mappings of one page size are one extent, so a run of pages costs one map entry.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <span>
#include <unordered_map>

#include "driver.h"

namespace vattn {

// Every function that checks throws std::invalid_argument and then has changed nothing.
class CudaLedger {
 public:
  void add_reservation(Address base, std::size_t bytes);
  // Checks that it is one, with nothing mapped in it.
  void remove_reservation(Address base, std::size_t bytes);

  void add_pages(std::span<const PageHandle> pages, std::size_t page_bytes);
  void add_page(PageHandle page, std::size_t page_bytes);
  void require_pages(const char* call, std::span<const PageHandle> pages,
                     std::size_t page_bytes) const;
  // Checks that it exists. Done before the driver's release: after it the handle's number may
  // already belong to a new page of another thread.
  void remove_page(PageHandle page, std::size_t page_bytes);
  std::size_t page_bytes_total() const;

  // Checks that the range lies in one reservation, is not mapped, and that all pages exist.
  void add_mapping(Address base, std::span<const PageHandle> pages, std::size_t page_bytes);
  // Checks that every byte is mapped and that the ends are ends of pages.
  void require_mapping(const char* call, Address base, std::size_t bytes) const;
  void remove_mapping(Address base, std::size_t bytes);

 private:
  struct Extent {
    std::size_t bytes;
    std::size_t page_bytes;
  };
  using Extents = std::map<Address, Extent>;

  void require_reserved(const char* call, Address base, std::size_t bytes) const;
  void require_unmapped(const char* call, Address base, std::size_t bytes) const;
  void require_page(const char* call, PageHandle page, std::size_t page_bytes) const;
  void require_page_end(const char* call, Address address) const;
  Extents::const_iterator extent_at(Address address) const;
  void split_at(Address address);

  mutable std::mutex mutex_;
  std::map<Address, std::size_t> reservations_;
  std::unordered_map<PageHandle, std::size_t> pages_;
  std::size_t page_bytes_total_ = 0;
  Extents extents_;
};

}  // namespace vattn
