// A device of so many bytes that counts the calls on it: nothing is behind its addresses.
#pragma once

#include "policy.h"

namespace bench {

class CountingDevice {
 public:
  explicit CountingDevice(std::size_t bytes) : bytes_(bytes) {}

  // Each counts as a call, a failed one too.
  bool malloc(std::size_t bytes, Address& address);  // false: no memory
  void free(std::size_t bytes);
  Address reserve(std::size_t bytes);
  void address_free() { count(Call::kAddressFree); }
  // All of `pages` pages or none, as torch does it: it gives those back that it got.
  bool create(std::size_t pages, std::size_t page_bytes);
  // A range of pages: each is mapped by a call, access is set once.
  void map(std::size_t pages);
  // The stream is waited for once, then each page is unmapped and released.
  void unmap(std::size_t pages, std::size_t page_bytes);

  // Memory that comes and goes without a call of its own.
  bool take(std::size_t bytes);
  void give(std::size_t bytes) { physical_ -= bytes; }
  Address addresses(std::size_t bytes);
  void count(Call call, std::uint64_t calls = 1) {
    calls_[static_cast<std::size_t>(call)] += calls;
  }

  std::size_t bytes() const noexcept { return bytes_; }
  std::size_t physical() const noexcept { return physical_; }
  std::size_t peak() const noexcept { return peak_; }
  const CallCounts& calls() const noexcept { return calls_; }

 private:
  const std::size_t bytes_;
  std::size_t physical_ = 0, peak_ = 0;
  // Addresses are never used twice; a page between ranges keeps them apart.
  Address next_ = Address{1} << 40;
  CallCounts calls_{};
};

}  // namespace bench
