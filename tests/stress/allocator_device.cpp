#include "allocator_device.h"

#include <algorithm>
#include <cmath>

namespace stress {
namespace {

constexpr std::size_t kSpotBytes = 48;

}  // namespace

std::size_t Random::log_uniform(std::size_t most) {
  const double exponent = std::uniform_real_distribution<double>(0, 1)(engine_);
  return static_cast<std::size_t>(std::pow(static_cast<double>(most), exponent));
}

Device::Device(std::shared_ptr<Driver> driver, const FakeControl* fake, bool held)
    : driver_(std::move(driver)), fake_(fake), held_(held) {
  for (std::size_t i = 0; i < streams_.size(); ++i) {
    // Without streams of its own the driver takes any number for one.
    streams_[i] = fake_ != nullptr ? driver_->create_stream() : i + 1;
    if (held_) fake_->hold(streams_[i]);
  }
}

Device::~Device() {
  if (fake_ == nullptr) return;
  for (const Stream stream : streams_) driver_->destroy_stream(stream);
}

void Device::fill(Address at, std::uint8_t value, std::size_t bytes, Stream stream) const {
  insist([&] { driver_->fill(at, value, bytes, stream); });
}

void Device::order(Stream from, Stream to) const {
  if (from == to) return;
  const vattn::EventHandle event = insist([&] { return driver_->record(from); });
  insist([&] { driver_->stream_wait(to, event); });
  driver_->destroy_event(event);
}

void Device::synchronize(Stream stream) const {
  insist([&] { driver_->synchronize(stream); });
}

void Device::proceed(Random& random) const {
  if (!held_) return;
  fake_->step(streams_[random.below(streams_.size())], static_cast<int>(1 + random.below(64)));
}

void Device::release() const {
  if (fake_ == nullptr) return;
  for (const Stream stream : streams_) fake_->release(stream);
}

void Marks::write(const Device& device, Address block, std::size_t bytes, Stream stream,
                  Random& random) {
  choose(block, bytes, random);
  repeat(device, stream);
}

void Marks::choose(Address block, std::size_t bytes, Random& random) {
  const std::size_t size = std::min(bytes, kSpotBytes);
  const auto value = [&] { return static_cast<std::uint8_t>(1 + random.below(255)); };
  count_ = 0;
  spots_[count_++] = {block, size, value()};
  if (bytes >= 3 * kSpotBytes) {
    const std::size_t between = kSpotBytes + random.below(bytes - 3 * kSpotBytes + 1);
    spots_[count_++] = {block + between, size, value()};
    spots_[count_++] = {block + bytes - size, size, value()};
  }
}

void Marks::repeat(const Device& device, Stream stream) const {
  for (std::size_t i = 0; i < count_; ++i) {
    device.fill(spots_[i].at, spots_[i].value, spots_[i].bytes, stream);
  }
}

void Marks::verify() const {
  for (std::size_t i = 0; i < count_; ++i) {
    const auto* bytes = reinterpret_cast<const volatile std::uint8_t*>(spots_[i].at);
    for (std::size_t j = 0; j < spots_[i].bytes; ++j) {
      if (bytes[j] == spots_[i].value) continue;
      fail("byte " + std::to_string(spots_[i].at + j) + " is " + std::to_string(bytes[j]) +
           ", its owner wrote " + std::to_string(spots_[i].value));
    }
  }
}

bool Marks::overlap(const Marks& other) const {
  for (std::size_t i = 0; i < count_; ++i) {
    for (std::size_t j = 0; j < other.count_; ++j) {
      const Spot &a = spots_[i], &b = other.spots_[j];
      if (a.at < b.at + b.bytes && b.at < a.at + a.bytes) return true;
    }
  }
  return false;
}

}  // namespace stress
