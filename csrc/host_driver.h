// Virtual memory of the CPU: one memfd holds every physical page, and a page is an offset in it, so
// that any number of virtual addresses can show the same page, as on CUDA.
#pragma once

#include <map>
#include <mutex>

#include "driver.h"

namespace vattn {

struct HostOptions {
  // Memory that is reserved but not mapped, or mapped without access, faults on any touch. Without
  // it a read there gives zeros, which forgives kernels that look past the last token.
  bool strict = false;
};

class HostDriver final : public Driver {
 public:
  explicit HostDriver(const HostOptions& options);
  ~HostDriver() override;

  std::string name() const override { return "host"; }
  std::size_t granularity() const noexcept override { return kGranularity; }
  std::size_t default_page_bytes() const noexcept override { return kDefaultPageBytes; }
  DlpackDevice dlpack_device() const noexcept override { return {1, 0}; }
  bool fresh_pages_are_zero() const noexcept override { return true; }
  bool holes_are_zero() const noexcept override { return !options_.strict; }

  // Free memory is the least of what the machine has available and what the control group allows.
  MemoryInfo memory_info() const override;
  // Physical bytes in the memfd now. The process's RSS counts a page once per alias; this does not.
  std::size_t physical_bytes() const override;
  // Every reservation has a stretch of the memfd of its own, which is sparse. Pages at home lie in
  // it as their addresses do, so that however late and in whatever order the pages of a run come,
  // the kernel holds the run as one mapping. vm.max_map_count allows few.
  PageHandle page_at_home(Address address) const override;

 private:
  static constexpr std::size_t kGranularity = 4096;
  static constexpr std::size_t kDefaultPageBytes = 16384;

  // Where a stretch of addresses leads in the memfd. Neighbours that the kernel can hold in one
  // mapping are one extent.
  struct Extent {
    std::size_t bytes;
    std::uint64_t offset;
    std::size_t page_bytes;
  };
  using Extents = std::map<Address, Extent>;
  // Disjoint stretches of the memfd: offset to bytes. Neighbours are merged.
  using Offsets = std::map<std::uint64_t, std::size_t>;
  // Pages without a home lie below, homes above. The file is sparse: only pages take memory.
  static constexpr std::uint64_t kFirstHome = std::uint64_t{1} << 46;

  static void insert_offsets(Offsets& set, std::uint64_t offset, std::size_t bytes);
  static void erase_offsets(Offsets& set, std::uint64_t offset, std::size_t bytes);
  static std::size_t overlap(const Offsets& set, std::uint64_t offset, std::size_t bytes);

  Address do_reserve(std::size_t bytes, std::size_t alignment) override;
  void do_release(Address base, std::size_t bytes) override;
  void do_create(std::span<PageHandle> out, std::size_t page_bytes, Address home) override;
  void do_destroy(std::span<const PageHandle> pages, std::size_t page_bytes,
                  std::size_t& destroyed) override;
  void do_map(Address base, std::span<const PageHandle> pages, std::size_t page_bytes) override;
  void do_set_access(Address base, std::size_t bytes) override;
  void do_unmap(Address base, std::size_t bytes) override;
  void do_copy(Address dst, Address src, std::size_t bytes, Stream stream) override;
  void do_fill(Address dst, std::uint8_t value, std::size_t bytes, Stream stream) override;
  void do_copy_to_host(void* host, Address src, std::size_t bytes, Stream stream) override;
  void do_copy_from_host(Address dst, const void* host, std::size_t bytes, Stream stream) override;
  // Work on the CPU is complete when the call that does it returns.
  EventHandle do_record(Stream) override { return 0; }
  bool do_query(EventHandle) override { return true; }
  void do_wait(EventHandle) override {}
  void do_stream_wait(Stream, EventHandle) override {}
  void do_destroy_event(EventHandle) noexcept override {}

  int unmapped_protection() const noexcept;
  void require_reserved(const char* call, Address base, std::size_t bytes) const;
  void require_mapped(const char* call, Address base, std::size_t bytes) const;
  void require_unmapped(Address base, std::size_t bytes) const;
  void require_created(const char* call, PageHandle page, std::size_t bytes) const;
  void require_mappings_left(std::size_t more) const;
  std::size_t mappings_around(Address base, std::size_t bytes) const;
  static std::atomic<std::size_t>& process_mappings();

  int write_zeros(std::uint64_t offset, std::size_t bytes);
  std::uint64_t take_offsets(std::size_t bytes, Address home);
  void give_offsets(std::uint64_t offset, std::size_t bytes);
  std::uint64_t home_offset(Address address, std::size_t bytes) const;
  void map_extent(Address base, std::size_t bytes, std::uint64_t offset);
  void clear_range(Address base, std::size_t bytes);
  void insert_extent(Address base, Extent extent);
  void erase_extents(Address base, std::size_t bytes);
  void split_extent_at(Address address);

  const HostOptions options_;
  static constexpr std::size_t kZeroBytes = std::size_t{1} << 20;
  int fd_ = -1;
  void* zeros_ = nullptr;
  std::size_t map_limit_ = 0;  // vm.max_map_count, less what the process had when we started

  mutable std::mutex mutex_;
  struct Reservation {
    std::size_t bytes;
    std::uint64_t home;  // its stretch of the memfd
  };
  std::map<Address, Reservation> reservations_;
  Extents extents_;
  Offsets created_;  // where the memfd has pages
  Offsets free_;     // holes among the pages without a home, below end_
  std::uint64_t end_ = 0;
  std::uint64_t home_end_ = kFirstHome;
};

std::shared_ptr<Driver> make_host_driver(const HostOptions& options);

}  // namespace vattn
