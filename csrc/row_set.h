// A set of row numbers as the ranges it consists of. Changes make a new set, so that an operation
// can prepare its outcome, fail on the way, and leave the set as it was.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace vattn {

// Rows [begin, end).
struct Rows {
  std::size_t begin = 0, end = 0;
  bool empty() const noexcept { return begin >= end; }
  std::size_t size() const noexcept { return empty() ? 0 : end - begin; }
  bool operator==(const Rows&) const = default;
};

class RowSet {
 public:
  // Ascending; between two of them there is at least one row that is not in the set.
  const std::vector<Rows>& ranges() const noexcept { return ranges_; }
  bool empty() const noexcept { return ranges_.empty(); }

  std::size_t size() const noexcept {
    std::size_t rows = 0;
    for (const Rows& range : ranges_) rows += range.size();
    return rows;
  }

  bool intersects(Rows rows) const noexcept {
    if (rows.empty()) return false;
    const auto it = after(rows.begin);
    return it != ranges_.end() && it->begin < rows.end;
  }

  // The parts of `rows` that are not in the set, ascending.
  std::vector<Rows> missing(Rows rows) const {
    std::vector<Rows> out;
    for (auto it = after(rows.begin); !rows.empty(); ++it) {
      const bool last = it == ranges_.end() || it->begin >= rows.end;
      const Rows gap{rows.begin, last ? rows.end : it->begin};
      if (!gap.empty()) out.push_back(gap);
      if (last) break;
      rows.begin = it->end;
    }
    return out;
  }

  RowSet with(Rows rows) const {
    if (rows.empty()) return *this;
    RowSet out;
    // Ranges that touch `rows` melt into it.
    auto it = ranges_.begin();
    for (; it != ranges_.end() && it->end < rows.begin; ++it) out.ranges_.push_back(*it);
    for (; it != ranges_.end() && it->begin <= rows.end; ++it) {
      rows = {std::min(rows.begin, it->begin), std::max(rows.end, it->end)};
    }
    out.ranges_.push_back(rows);
    out.ranges_.insert(out.ranges_.end(), it, ranges_.end());
    return out;
  }

  RowSet without(Rows rows) const {
    if (rows.empty()) return *this;
    RowSet out;
    for (const Rows& range : ranges_) {
      const Rows head{range.begin, std::min(range.end, rows.begin)};
      const Rows tail{std::max(range.begin, rows.end), range.end};
      if (!head.empty()) out.ranges_.push_back(head);
      if (!tail.empty()) out.ranges_.push_back(tail);
    }
    return out;
  }

 private:
  // The first range that ends after `row`.
  std::vector<Rows>::const_iterator after(std::size_t row) const noexcept {
    return std::partition_point(ranges_.begin(), ranges_.end(),
                                [&](const Rows& range) { return range.end <= row; });
  }

  std::vector<Rows> ranges_;
};

}  // namespace vattn
