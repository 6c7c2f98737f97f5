// Free blocks by their exact size, last freed first taken. A program asks for the same sizes again
// and again, and here a block goes back and forth without touching its neighbours or a tree.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "block.h"

namespace vattn {

class QuickLists {
 public:
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 20;

  Block* take(std::size_t bytes) noexcept {
    const std::size_t i = index(bytes);
    Block* block = heads_[i];
    if (block == nullptr) return nullptr;
    heads_[i] = block->chain;
    if (heads_[i] == nullptr) used_[i / 64] &= ~(std::uint64_t{1} << (i % 64));
    block->chain = nullptr;
    return block;
  }

  void give(Block* block) noexcept {
    const std::size_t i = index(block->bytes);
    block->chain = heads_[i];
    heads_[i] = block;
    used_[i / 64] |= std::uint64_t{1} << (i % 64);
  }

  // Hands every block to `take_it`, which may give none back.
  template <typename F>
  void drain(F take_it) {
    for (std::size_t word = 0; word < used_.size(); ++word) {
      while (used_[word] != 0) {
        const std::size_t i = word * 64 + static_cast<std::size_t>(std::countr_zero(used_[word]));
        take_it(take((i + 1) * kBlockBytes));
      }
    }
  }

 private:
  static constexpr std::size_t kSizes = kMaxBytes / kBlockBytes;
  static std::size_t index(std::size_t bytes) noexcept { return bytes / kBlockBytes - 1; }

  std::array<Block*, kSizes> heads_{};
  std::array<std::uint64_t, kSizes / 64> used_{};
};

}  // namespace vattn
