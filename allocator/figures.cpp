#include "figures.h"

namespace vattn {

void RequestBook::reset_peaks() noexcept {
  peaks_ = {};
  for (std::size_t i = 0; i < counts_.size(); ++i) raise(peaks_[i], counts_[i]);
  raise(peaks_[2], all());
}

void RequestBook::reset_accumulated() noexcept { base_ = counts_; }

void RequestBook::fill(StatGroup& group, const Counts& now, const Counts& base,
                       const Peaks& peaks) {
  const auto stat = [](std::int64_t current, std::int64_t peak, std::int64_t total,
                       std::int64_t base_current, std::int64_t base_total) {
    const std::int64_t freed = (total - current) - (base_total - base_current);
    return Stat{current, peak, total - base_total, freed};
  };
  group.allocation =
      stat(now.blocks, peaks.blocks, now.blocks_total, base.blocks, base.blocks_total);
  group.allocated_bytes =
      stat(now.bytes, peaks.bytes, now.bytes_total, base.bytes, base.bytes_total);
  group.requested_bytes =
      stat(now.asked, peaks.asked, now.asked_total, base.asked, base.asked_total);
  group.active = stat(now.blocks + now.pending_blocks, peaks.active_blocks, now.blocks_total,
                      base.blocks + base.pending_blocks, base.blocks_total);
  group.active_bytes = stat(now.bytes + now.pending_bytes, peaks.active_bytes, now.bytes_total,
                            base.bytes + base.pending_bytes, base.bytes_total);
}

void RequestBook::fill(Figures& figures) const {
  for (std::size_t i = 0; i < 2; ++i) fill(figures.kinds[i], counts_[i], base_[i], peaks_[i]);
  RequestBook base;
  base.counts_ = base_;
  fill(figures.all, all(), base.all(), peaks_[2]);
}

}  // namespace vattn
