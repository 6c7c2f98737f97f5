// Small requests: a slab is a block of 32 KiB cut into equal pieces, with a bit for each that is
// free. A slab's address is a multiple of its size, so a piece finds its slab by its own address.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "block.h"

namespace vattn {

inline constexpr std::size_t kSlabBytes = std::size_t{32} << 10;
inline constexpr std::size_t kSlabMaxPiece = 2048;
inline constexpr std::size_t kSlabClasses = kSlabMaxPiece / kBlockBytes;

struct Slab {
  Block* block = nullptr;
  Arena* home = nullptr;  // on whose list it is; its block may be another arena's
  std::size_t piece_bytes = 0;
  std::uint64_t free_mask = 0;     // pieces that can be given out
  std::uint64_t pending_mask = 0;  // freed, with streams that have yet to finish
  std::uint64_t users_mask = 0;    // pieces that other streams use
  std::array<std::uint16_t, kSlabBytes / kBlockBytes> asked_bytes{};
  Slab* next = nullptr;  // among those of its class with free pieces
  Slab* prev = nullptr;

  std::uint32_t pieces() const noexcept {
    return static_cast<std::uint32_t>(kSlabBytes / piece_bytes);
  }
  std::uint64_t all_mask() const noexcept {
    const std::uint32_t n = pieces();
    return n == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1;
  }
  bool is_live(std::uint32_t piece) const noexcept {
    if (piece >= pieces()) return false;
    return ((free_mask | pending_mask) & (std::uint64_t{1} << piece)) == 0;
  }
  bool empty() const noexcept { return free_mask == all_mask(); }
  Address at(std::uint32_t piece) const noexcept { return block->address + piece * piece_bytes; }
  std::uint32_t piece_of(Address address) const noexcept {
    return static_cast<std::uint32_t>((address - block->address) / piece_bytes);
  }
};

inline std::size_t slab_class(std::size_t bytes) noexcept { return (bytes - 1) / kBlockBytes; }
inline Address slab_base(Address address) noexcept { return address & ~Address{kSlabBytes - 1}; }

}  // namespace vattn
