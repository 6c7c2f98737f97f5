#include "counting_device.h"

#include <algorithm>

namespace bench {

bool CountingDevice::take(std::size_t bytes) {
  if (bytes > bytes_ - physical_) return false;
  physical_ += bytes;
  peak_ = std::max(peak_, physical_);
  return true;
}

Address CountingDevice::addresses(std::size_t bytes) {
  const Address base = next_;
  next_ += round_up(bytes, kDriverPageBytes) + kDriverPageBytes;
  return base;
}

bool CountingDevice::malloc(std::size_t bytes, Address& address) {
  count(Call::kMalloc);
  if (!take(bytes)) return false;
  address = addresses(bytes);
  return true;
}

void CountingDevice::free(std::size_t bytes) {
  count(Call::kFree);
  give(bytes);
}

Address CountingDevice::reserve(std::size_t bytes) {
  count(Call::kReserve);
  return addresses(bytes);
}

bool CountingDevice::create(std::size_t pages, std::size_t page_bytes) {
  const std::size_t room = std::min(pages, (bytes_ - physical_) / page_bytes);
  if (room == pages) {
    count(Call::kCreate, pages);
    return take(pages * page_bytes);
  }
  // Those that came before the one that failed existed for a moment.
  count(Call::kCreate, room + 1);
  count(Call::kRelease, room);
  peak_ = std::max(peak_, physical_ + room * page_bytes);
  return false;
}

void CountingDevice::map(std::size_t pages) {
  count(Call::kMap, pages);
  count(Call::kSetAccess);
}

void CountingDevice::unmap(std::size_t pages, std::size_t page_bytes) {
  count(Call::kSynchronize);
  count(Call::kUnmap, pages);
  count(Call::kRelease, pages);
  give(pages * page_bytes);
}

}  // namespace bench
