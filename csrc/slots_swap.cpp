// Sequences that go to host memory and come back.
#include <algorithm>
#include <string>

#include "slots.h"

namespace vattn {
namespace {

// Joins copies whose two sides continue, so that the driver is called once for them.
template <typename Copy>
class Joined {
 public:
  explicit Joined(Copy copy) : copy_(copy) {}

  void add(Address device, std::size_t host, std::size_t bytes) {
    if (bytes == 0) return;
    if (device != device_ + bytes_ || host != host_ + bytes_) {
      flush();
      device_ = device;
      host_ = host;
    }
    bytes_ += bytes;
  }
  void flush() {
    if (bytes_ > 0) copy_(device_, host_, bytes_);
    bytes_ = 0;
  }

 private:
  Copy copy_;
  Address device_ = 0;
  std::size_t host_ = 0, bytes_ = 0;
};

}  // namespace

std::size_t SlotSpace::anchor(std::uint32_t slot) {
  const DeviceLock lock = enter();
  return open_slot(slot).anchor;
}

// Calls visit(region, run, pages, offset in the host memory) for everything that is saved of a
// sequence; returns how many bytes that is.
std::size_t SlotSpace::for_saved(std::size_t anchor, std::size_t tokens, const Saved& visit) const {
  std::size_t bytes = 0;
  for (const Region& region : regions_) {
    PageWindow pages = window_of(region, anchor, tokens);
    pages.end = held_pages(region, tokens);
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      if (visit) visit(region, run, pages, bytes);
      bytes += pages.size() * pool_->page_bytes();
    }
  }
  return bytes;
}

std::size_t SlotSpace::saved_bytes(std::uint32_t slot) {
  const DeviceLock lock = enter();
  const Slot& s = open_slot(slot);
  return for_saved(s.anchor, s.tokens, nullptr);
}

void SlotSpace::check_saved(std::size_t bytes, std::size_t anchor, std::size_t tokens) const {
  const std::size_t wanted = for_saved(anchor, tokens, nullptr);
  if (bytes == wanted) return;
  throw std::invalid_argument("a sequence of " + std::to_string(tokens) +
                              " tokens with its anchor at " + std::to_string(anchor) +
                              " is saved in " + std::to_string(wanted) + " bytes, not in " +
                              std::to_string(bytes) + "; see saved_bytes()");
}

void SlotSpace::copy_out(std::uint32_t slot, void* host, std::size_t bytes, Stream stream) {
  const DeviceLock lock = enter();
  Slot& s = open_slot(slot);
  check_saved(bytes, s.anchor, s.tokens);
  if (s.fence) s.fence->order_before(stream);
  Joined copies([&](Address device, std::size_t at, std::size_t n) {
    pool_->driver().copy_to_host(static_cast<char*>(host) + at, device, n, stream);
    totals_.copied_bytes += n;
  });
  for_saved(s.anchor, s.tokens,
            [&](const Region& region, std::uint32_t run, PageWindow pages, std::size_t at) {
              copies.add(region.address(slot, run * region.pages_per_run() + pages.begin), at,
                         pages.size() * pool_->page_bytes());
            });
  copies.flush();
}

// Copies what the slot's windows want of it, from token `first_token` on.
void SlotSpace::fill_in(std::uint32_t slot, std::size_t tokens, std::size_t anchor,
                        const char* host, std::size_t first_token, Stream stream) {
  const std::size_t page = pool_->page_bytes();
  Joined copies([&](Address device, std::size_t at, std::size_t n) {
    pool_->driver().copy_from_host(device, host + at, n, stream);
    totals_.copied_bytes += n;
  });
  for_saved(anchor, tokens,
            [&](const Region& region, std::uint32_t run, PageWindow pages, std::size_t at) {
              const std::size_t base = pages.begin * page;
              const std::size_t begin = std::max({base, region.window(slot).begin * page,
                                                  first_token * region.spec().token_bytes});
              const std::size_t end = tokens * region.spec().token_bytes;
              if (begin >= end) return;
              copies.add(region.address(slot, run * region.pages_per_run()) + begin,
                         at + begin - base, end - begin);
            });
  copies.flush();
}

void SlotSpace::copy_in(std::uint32_t slot, std::size_t tokens, std::size_t anchor,
                        const void* host, std::size_t bytes, std::size_t first_token,
                        Stream stream) {
  DeviceLock lock = enter();
  Slot& s = open_slot(slot);
  check_tokens(static_cast<std::int64_t>(tokens));
  if (anchor > tokens || s.tokens > tokens || first_token > s.tokens) {
    throw std::invalid_argument("slot " + std::to_string(slot) + " holds " +
                                std::to_string(s.tokens) + " tokens and cannot be given tokens " +
                                std::to_string(first_token) + " to " + std::to_string(tokens) +
                                " of a sequence whose anchor is " + std::to_string(anchor));
  }
  check_saved(bytes, anchor, tokens);
  // A window layer needs nothing between what the slot has and what a query from the anchor on can
  // reach; what it has is left behind, and stays where it is until nothing can fail any more.
  Windows wanted = windows(slot);
  PagePins pins(*pool_);
  bool jumps = false;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    const Region& region = regions_[r];
    const PageWindow now = wanted[r], saved = window_of(region, anchor, tokens);
    const bool jump = now.size() > 0 && saved.begin >= now.end;
    jumps = jumps || jump;
    wanted[r] = {now.size() == 0 || jump ? saved.begin : now.begin, std::max(now.end, saved.end)};
    for (std::uint32_t run = 0; jump && run < region.spec().runs; ++run) {
      for (std::uint32_t p = now.begin; p < now.end; ++p) {
        pins.add(region.at(slot, run * region.pages_per_run() + p));
      }
    }
  }
  if (jumps) fence(s, stream);
  const std::size_t later = std::max(s.anchor, anchor);
  std::shared_ptr<Fence> left;
  const auto fill = [&] {
    fill_in(slot, tokens, anchor, static_cast<const char*>(host), first_token, stream);
    if (leaves_pages(slot, later, tokens)) {
      left = std::make_shared<Fence>(pool_->driver_ptr(), stream);
    }
  };
  with_mappings(lock, [&] { map_windows(slot, wanted, first_token, stream, true, lock, fill); });
  s.anchor = later;
  s.tokens = tokens;
  s.ready = std::max(tokens, ready_of(slot));
  if (!left) return;
  leave_pages(slot);
  s.fence = left;
}

}  // namespace vattn
