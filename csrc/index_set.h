// A set of small integers that gives out its smallest members first: a bitmap with a summary level,
// so that taking an ascending run touches few cache lines however large the set is.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace vattn {

class IndexSet {
 public:
  std::size_t size() const noexcept { return size_; }

  bool contains(std::uint32_t i) const noexcept {
    return i / 64 < words_.size() && (words_[i / 64] >> (i % 64) & 1) != 0;
  }

  // Makes room for members below `limit`; the members stay.
  void reserve(std::size_t limit) {
    if (words_.size() * 64 >= limit) return;
    words_.resize((limit + 63) / 64, 0);
    summary_.resize((words_.size() + 63) / 64, 0);
  }

  void insert(std::uint32_t i) {
    reserve(std::size_t{i} + 1);
    words_[i / 64] |= std::uint64_t{1} << (i % 64);
    summary_[i / 4096] |= std::uint64_t{1} << (i / 64 % 64);
    ++size_;
  }

  void erase(std::uint32_t i) noexcept {
    words_[i / 64] &= ~(std::uint64_t{1} << (i % 64));
    if (words_[i / 64] == 0) summary_[i / 4096] &= ~(std::uint64_t{1} << (i / 64 % 64));
    --size_;
  }

  // Removes and returns the smallest member. Pre: not empty.
  std::uint32_t take_lowest() noexcept {
    std::size_t top = 0;
    while (summary_[top] == 0) ++top;
    const std::size_t word = top * 64 + static_cast<std::size_t>(std::countr_zero(summary_[top]));
    const auto i = static_cast<std::uint32_t>(
        word * 64 + static_cast<std::size_t>(std::countr_zero(words_[word])));
    erase(i);
    return i;
  }

 private:
  std::vector<std::uint64_t> words_;
  std::vector<std::uint64_t> summary_;
  std::size_t size_ = 0;
};

}  // namespace vattn
