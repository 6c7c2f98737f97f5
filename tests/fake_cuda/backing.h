// The fake device's physical memory: one memfd, in which every handle owns an extent, so that two
// mappings of one handle are true aliases. Knows addresses and offsets, nothing of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fake {

class Backing {
 public:
  // With `elide` set there is no memory behind handles: mapped ranges stay PROT_NONE. May change
  // only while nothing is allocated.
  void set_elide(bool elide) { elide_ = elide; }
  bool elide() const { return elide_; }

  // Inaccessible addresses; null when the host has none left. `hint` may be 0.
  static void* reserve(std::size_t bytes, std::uintptr_t hint);
  // Pinned host memory: ordinary, readable and writable; null when there is none.
  static void* allocate_host(std::size_t bytes);
  static void release(void* base, std::size_t bytes);

  // A fresh extent, filled with 0xFF if `poison`, else with zeroes. False: the host is out of
  // memory or descriptors. Offsets are never reused, so a stale mapping can never see new data.
  bool allocate(std::size_t bytes, bool poison, std::uint64_t* offset);
  void discard(std::uint64_t offset, std::size_t bytes);

  // All three return false when the host refuses (vm.max_map_count, usually).
  bool map(std::uintptr_t address, std::size_t bytes, std::uint64_t offset);
  bool unmap(std::uintptr_t address, std::size_t bytes);
  bool protect(std::uintptr_t address, std::size_t bytes, bool read, bool write);

  // Bytes of host memory in use by the memfd.
  std::uint64_t physical_bytes() const;
  // Drops all extents. Nothing may be mapped.
  void clear();

 private:
  int file_ = -1;
  std::uint64_t end_ = 0;
  bool elide_ = false;
};

}  // namespace fake
