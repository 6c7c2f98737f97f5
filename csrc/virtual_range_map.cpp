// What a virtual range asks of the driver: mapping and unmapping as a whole, zeros, waiting.
#include <utility>

#include "virtual_range.h"

namespace vattn {
namespace {

// Calls visit(first, last) for each stretch of neighbouring pages.
template <typename Place, typename Visit>
void for_stretches(Place begin, Place end, Visit visit) {
  for (Place first = begin; first != end;) {
    Place last = first;
    std::size_t next = first->first;
    while (last != end && last->first == next) {
      ++last;
      ++next;
    }
    visit(first, last);
    first = last;
  }
}

}  // namespace

// Mappings ---------------------------------------------------------------------------------------

// In the handler of an error; after a fatal one nothing can be undone.
template <typename Undo>
void VirtualRange::roll_back(Undo undo) noexcept {
  try {
    throw;
  } catch (const DriverError& error) {
    lost_ = lost_ || error.fatal();
  } catch (...) {
    // Anything else is no more than a reason to undo.
  }
  if (lost_) return;
  try {
    undo();
  } catch (...) {
    lost_ = true;
  }
}

void VirtualRange::map_stretch(Place first, Place last) {
  std::vector<PageHandle> handles;
  for (Place it = first; it != last; ++it) handles.push_back(pool_->handle(it->second));
  pool_->driver().map(address(first->first), handles, page_bytes_);
  try {
    pool_->driver().set_access(address(first->first), handles.size() * page_bytes_);
  } catch (...) {
    roll_back([&] { unmap_stretch(first, last); });
    throw;
  }
}

void VirtualRange::unmap_stretch(Place first, Place last) {
  const std::size_t pages = std::prev(last)->first - first->first + 1;
  pool_->driver().unmap(address(first->first), pages * page_bytes_);
}

void VirtualRange::map(const Pages& pages) {
  Place reached = pages.cbegin();
  try {
    for_stretches(pages.cbegin(), pages.cend(), [&](Place first, Place last) {
      map_stretch(first, last);
      reached = last;
    });
  } catch (...) {
    roll_back([&] {
      for_stretches(pages.cbegin(), reached, [&](Place a, Place b) { unmap_stretch(a, b); });
    });
    throw;
  }
}

void VirtualRange::unmap(const Pages& pages) {
  Place reached = pages.cbegin();
  try {
    for_stretches(pages.cbegin(), pages.cend(), [&](Place first, Place last) {
      unmap_stretch(first, last);
      reached = last;
    });
  } catch (...) {
    roll_back([&] {
      for_stretches(pages.cbegin(), reached, [&](Place a, Place b) { map_stretch(a, b); });
    });
    throw;
  }
}

// Does it again after others gave up stale mappings if the system allows no more of them.
void VirtualRange::map_with_room(const Pages& pages, DeviceLock& lock) {
  for (const Effort effort : {Effort::kIdle, Effort::kWait}) {
    try {
      return map(pages);
    } catch (const OutOfMappings&) {
      const std::size_t freed = pool_->reclaim(SIZE_MAX, lock, effort);
      if (lost_ || (effort == Effort::kWait && freed == 0)) throw;
    }
  }
  map(pages);
}

// Nobody will use the pages again. After a change that could not be undone one may not be mapped,
// and a driver that refuses to unmap it three times is gone: the pool has its page back in any
// case.
void VirtualRange::abandon() noexcept {
  const auto unmapped = [&](Place first, Place last) {
    try {
      unmap_stretch(first, last);
      return true;
    } catch (const std::exception&) {
      return false;  // nobody to tell
    }
  };
  for_stretches(pages_.cbegin(), pages_.cend(), [&](Place first, Place last) {
    if (unmapped(first, last)) return;
    for (Place it = first; it != last; ++it) {
      if (!unmapped(it, std::next(it))) unmapped(it, std::next(it));
    }
  });
  const Pages all = std::exchange(pages_, {});
  drop(all);
  committed_ = {};
}

// Zeros -------------------------------------------------------------------------------------------

// Zeroes rows to commit; the new pages among theirs are unmapped if that fails.
void VirtualRange::clear(const std::vector<Rows>& fresh, const Pages& pages, Stream stream) {
  try {
    fill(fresh, pages, stream);
  } catch (...) {
    roll_back([&] {
      finish(stream);
      for_stretches(pages.cbegin(), pages.cend(), [&](Place a, Place b) { unmap_stretch(a, b); });
    });
    throw;
  }
}

// Zeroes the bytes of rows to commit, but for those in new pages that hold zeros anyway.
void VirtualRange::fill(const std::vector<Rows>& fresh, const Pages& pages, Stream stream) {
  const auto is_zero = [&](std::size_t place) {
    const auto found = pages.find(place);
    return found != pages.end() && pool_->content(found->second) == Content::kZero;
  };
  bool filled = false;
  for (const Rows& rows : fresh) {
    const Rows places = places_of(rows);
    for (std::size_t first = places.begin; first < places.end;) {
      std::size_t last = first;
      while (last < places.end && !is_zero(last)) ++last;
      if (last > first) {
        const std::size_t begin = std::max(rows.begin * row_bytes_, first * page_bytes_);
        const std::size_t end = std::min(rows.end * row_bytes_, last * page_bytes_);
        if (!filled && fence_) fence_->order_before(stream);
        filled = true;
        pool_->driver().fill(reservation_->base() + begin, 0, end - begin, stream);
      }
      first = std::max(last, first + 1);
    }
  }
  if (filled) fence(stream);
}

// Streams ----------------------------------------------------------------------------------------

// Moves the fence to what `stream` was given so far. It does not fail for want of an event: the
// thread waits in its place.
void VirtualRange::fence(Stream stream) {
  try {
    if (fence_) fence_->order_before(stream);  // the new fence implies the old one
    fence_ = std::make_unique<Fence>(pool_->driver_ptr(), stream);
  } catch (const DriverError& error) {
    if (error.fatal()) throw;
    pool_->driver().synchronize(stream);
    if (fence_) fence_->wait();
    fence_.reset();
  }
}

// The thread waits for `stream` and the fence. Others may use the device meanwhile: the event is
// this call's own.
void VirtualRange::wait_for(Stream stream, DeviceLock& lock) {
  if (fence_) fence_->order_before(stream);
  lock.unlock();
  finish(stream);
  lock.lock();
}

void VirtualRange::finish(Stream stream) {
  try {
    Fence(pool_->driver_ptr(), stream).wait();
  } catch (const DriverError& error) {
    if (error.fatal()) throw;
    pool_->driver().synchronize(stream);
  }
}

// For the end: what fails here is a lost context, and with it every kernel that could touch a page.
void VirtualRange::finish_all(Stream stream) noexcept {
  try {
    if (fence_) fence_->wait();
    finish(stream);
  } catch (const std::exception&) {
    // Nobody to tell.
  }
}

}  // namespace vattn
