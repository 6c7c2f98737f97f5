// What the stress test of the allocator runs on: a driver, streams, bytes written in stream order.
#pragma once

#include <array>
#include <memory>
#include <random>
#include <vector>

#include "driver.h"
#include "fake_control.h"

namespace stress {

using vattn::Address;
using vattn::Driver;
using vattn::Stream;

[[noreturn]] void fail(const std::string& what);

class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}
  std::size_t below(std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(engine_);
  }
  // Every order of magnitude from 1 to `most` alike.
  std::size_t log_uniform(std::size_t most);

 private:
  std::mt19937 engine_;
};

// Calls `act` until no injected failure hits it: the test's own calls are not what is tested.
template <typename F>
auto insist(F act) {
  constexpr int kTries = 1000;
  for (int i = 0;; ++i) {
    try {
      return act();
    } catch (const vattn::DriverError& error) {
      if (error.fatal() || i == kTries) throw;
    }
  }
}

class Device {
 public:
  static constexpr std::size_t kStreams = 8;

  // `fake` is null where there is none: then work is done when it is given.
  Device(std::shared_ptr<Driver> driver, const FakeControl* fake, bool held);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const std::shared_ptr<Driver>& driver() const noexcept { return driver_; }
  const FakeControl* fake() const noexcept { return fake_; }
  Stream stream(std::size_t i) const { return streams_[i]; }
  Stream any(Random& random) const { return streams_[random.below(kStreams)]; }
  // For captures only, by one thread at a time.
  Stream capture_stream() const { return streams_[kStreams]; }

  void fill(Address at, std::uint8_t value, std::size_t bytes, Stream stream) const;
  // What is given to `to` from now on runs after what `from` has now.
  void order(Stream from, Stream to) const;
  void synchronize(Stream stream) const;
  // Lets held streams do some of their work. For a thread that does nothing else.
  void proceed(Random& random) const;
  // Lets them do all of it from now on.
  void release() const;

 private:
  const std::shared_ptr<Driver> driver_;
  const FakeControl* const fake_;
  const bool held_;
  std::array<Stream, kStreams + 1> streams_{};
};

// The bytes of one owner at a few places of a block: its ends, and somewhere between.
class Marks {
 public:
  // Has new ones written by `stream`.
  void write(const Device& device, Address block, std::size_t bytes, Stream stream, Random& random);
  // Has none written yet.
  void choose(Address block, std::size_t bytes, Random& random);
  // Has the same ones written again.
  void repeat(const Device& device, Stream stream) const;
  // All streams that wrote have been waited for. Fails if somebody else's bytes are there.
  void verify() const;
  bool overlap(const Marks& other) const;

 private:
  struct Spot {
    Address at;
    std::size_t bytes;
    std::uint8_t value;
  };
  std::array<Spot, 3> spots_{};
  std::size_t count_ = 0;
};

}  // namespace stress
