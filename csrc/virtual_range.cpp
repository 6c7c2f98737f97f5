#include "virtual_range.h"

#include <bit>
#include <string>
#include <utility>

namespace vattn {
namespace {

std::size_t checked_row_bytes(std::size_t rows, std::size_t row_bytes) {
  if (rows == 0 || row_bytes == 0) {
    throw std::invalid_argument(std::to_string(rows) + " rows of " + std::to_string(row_bytes) +
                                " bytes; each must be positive");
  }
  // Half of all addresses: more than any device has, and sums of two sizes do not overflow.
  if (rows > SIZE_MAX / 2 / row_bytes) {
    throw std::invalid_argument(std::to_string(rows) + " rows of " + std::to_string(row_bytes) +
                                " bytes are beyond the address space; reserve fewer");
  }
  return row_bytes;
}

std::shared_ptr<Reservation> make_reservation(const PagePool& pool, std::size_t bytes) {
  const std::size_t page = pool.page_bytes();
  const std::size_t alignment = std::bit_ceil(std::max(page, pool.driver().granularity()));
  return std::make_shared<Reservation>(pool.driver_ptr(), (bytes + page - 1) / page * page,
                                       alignment);
}

}  // namespace

VirtualRange::VirtualRange(std::shared_ptr<PagePool> pool, std::size_t rows, std::size_t row_bytes)
    : pool_(std::move(pool)),
      rows_(rows),
      row_bytes_(checked_row_bytes(rows, row_bytes)),
      page_bytes_(pool_->page_bytes()),
      reservation_(make_reservation(*pool_, rows * row_bytes)) {}

VirtualRange::~VirtualRange() {
  // In a forked child nothing is mapped, and another thread may have held the lock for good.
  if (pages_.empty() || !pool_->driver().usable()) return;
  finish_all(stream_);
  const DeviceLock lock = pool_->lock();
  abandon();
}

DeviceLock VirtualRange::enter() {
  DeviceLock lock = pool_->lock();
  require_open();
  return lock;
}

void VirtualRange::require_open() const {
  if (closed_) throw std::invalid_argument("this virtual tensor is closed; reserve a new one");
  if (lost_) {
    throw DriverError("virtual tensor", 0,
                      "an earlier driver call failed and could not be undone, so the mappings are "
                      "unknown; close this virtual tensor and reserve a new one",
                      true);
  }
}

void VirtualRange::check_rows(Rows rows) const {
  if (rows.begin <= rows.end && rows.end <= rows_) return;
  throw std::invalid_argument("rows [" + std::to_string(rows.begin) + ", " +
                              std::to_string(rows.end) + ") are not a range of the " +
                              std::to_string(rows_) + " reserved rows");
}

// Pages with a byte of these rows.
Rows VirtualRange::places_of(Rows rows) const noexcept {
  return {rows.begin * row_bytes_ / page_bytes_,
          (rows.end * row_bytes_ + page_bytes_ - 1) / page_bytes_};
}

// Rows with a byte in this page.
Rows VirtualRange::rows_of(std::size_t place) const noexcept {
  return {place * page_bytes_ / row_bytes_,
          ((place + 1) * page_bytes_ + row_bytes_ - 1) / row_bytes_};
}

// Commit -----------------------------------------------------------------------------------------

void VirtualRange::commit(Rows rows, Stream stream) {
  DeviceLock lock = enter();
  check_rows(rows);
  const std::vector<Rows> fresh = committed_.missing(rows);
  if (fresh.empty()) return;
  RowSet after = committed_.with(rows);
  PageRefs refs(*pool_);
  Pages pages = acquire(fresh, refs, lock);
  try {
    map_with_room(pages, lock);
    clear(fresh, pages, stream);
  } catch (...) {
    // Mapped or not: they are nobody else's before a try to unmap them.
    if (lost_) keep(pages);
    throw;
  }
  keep(pages);
  committed_ = std::move(after);
  stream_ = stream;
}

void VirtualRange::keep(Pages& pages) noexcept {
  for (const auto& [place, id] : pages) {
    pool_->add_ref(id);
    pool_->add_live(id);
    pool_->set_content(id, Content::kDirty);  // the caller writes what it likes
  }
  pages_.merge(pages);
}

// A page for each place that rows to commit need and that has none.
VirtualRange::Pages VirtualRange::acquire(const std::vector<Rows>& fresh, PageRefs& refs,
                                          DeviceLock& lock) {
  std::vector<Address> homes;
  Pages out;
  for (const Rows& rows : fresh) {
    const Rows places = places_of(rows);
    auto here = pages_.lower_bound(places.begin);
    for (std::size_t place = places.begin; place < places.end; ++place) {
      if (here != pages_.end() && here->first == place) {
        ++here;
      } else if (out.empty() || out.rbegin()->first < place) {
        out.emplace_hint(out.end(), place, kNoPage);
        homes.push_back(address(place));
      }
    }
  }
  refs = pool_->acquire(homes, lock);
  std::size_t i = 0;
  for (auto& [place, id] : out) id = refs[i++];
  return out;
}

// Decommit ---------------------------------------------------------------------------------------

void VirtualRange::decommit(Rows rows, Stream stream) {
  DeviceLock lock = enter();
  check_rows(rows);
  if (committed_.intersects(rows)) give_up(rows, stream, lock);
}

void VirtualRange::close(Stream stream) {
  DeviceLock lock = pool_->lock();
  if (closed_) return;
  if (lost_) {
    finish_all(stream);
    abandon();
  } else {
    give_up({0, rows_}, stream, lock);
  }
  closed_ = true;
}

// Mapped pages at places of `rows` that no row of `needed` has a byte in.
VirtualRange::Pages VirtualRange::spare(const RowSet& needed, Rows rows) const {
  Pages out;
  const Rows places = places_of(rows);
  for (auto it = pages_.lower_bound(places.begin); it != pages_.end() && it->first < places.end;
       ++it) {
    if (!needed.intersects(rows_of(it->first))) out.emplace_hint(out.end(), *it);
  }
  return out;
}

void VirtualRange::give_up(Rows rows, Stream stream, DeviceLock& lock) {
  if (spare(committed_.without(rows), rows).empty()) {
    fence(stream);  // the pages stay, and whoever commits the rows anew comes after it
  } else {
    wait_for(stream, lock);
    require_open();  // the lock was free meanwhile
    if (fence_ && !fence_->done()) fence_->wait();
  }
  RowSet after = committed_.without(rows);
  const Pages pages = spare(after, rows);
  unmap(pages);
  drop(pages);
  committed_ = std::move(after);
  stream_ = stream;
  try {
    if (pool_->over_budget(lock)) pool_->settle(lock);
  } catch (const DriverError& error) {
    if (error.fatal()) throw;  // else it is tried again by whoever needs memory
  }
}

void VirtualRange::drop(const Pages& pages) noexcept {
  for (const auto& [place, id] : pages) {
    pages_.erase(place);
    pool_->drop_live(id);
    pool_->drop_ref(id);
  }
}

// Reports ----------------------------------------------------------------------------------------

bool VirtualRange::closed() {
  const DeviceLock lock = pool_->lock();
  return closed_;
}

std::vector<Rows> VirtualRange::committed() {
  const DeviceLock lock = pool_->lock();
  return committed_.ranges();
}

std::size_t VirtualRange::committed_bytes() {
  const DeviceLock lock = pool_->lock();
  return pages_.size() * page_bytes_;
}

void VirtualRange::check() {
  const DeviceLock lock = pool_->lock();
  if (!closed_) require_open();
  pool_->check(lock);
  const auto require = [](bool holds, const char* what, std::size_t where) {
    if (!holds) throw InvariantError(std::string(what) + " at " + std::to_string(where));
  };
  std::size_t end = 0, needed = 0, counted = 0;  // `counted`: pages below it are in `needed`
  for (const Rows& rows : committed_.ranges()) {
    require(!rows.empty() && rows.end <= rows_, "a range of rows is wrong", rows.begin);
    require(end == 0 || rows.begin > end, "ranges of rows touch", rows.begin);
    end = rows.end;
    const Rows places = places_of(rows);
    needed += places.end - std::max(places.begin, counted);
    counted = places.end;
  }
  require(needed == pages_.size(), "the number of pages is wrong", pages_.size());
  for (const auto& [place, id] : pages_) {
    require(committed_.intersects(rows_of(place)), "a page without a committed row", place);
    require(pool_->refs(id) == 1 && pool_->live(id) == 1, "a page with another user", place);
  }
  require(!closed_ || pages_.empty(), "a closed virtual tensor has pages", pages_.size());
}

}  // namespace vattn
