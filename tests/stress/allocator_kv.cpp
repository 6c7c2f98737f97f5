#include "allocator_kv.h"

namespace stress {
namespace {

constexpr std::uint32_t kSlots = 6;
constexpr std::size_t kMaxTokens = 40;
constexpr std::size_t kPlaceBytes = 32;

// Two runs of up to 20 MiB each for a sequence.
vattn::SpaceOptions options() {
  vattn::RegionSpec region;
  region.runs = 2;
  region.token_bytes = std::size_t{512} << 10;
  region.capacity_tokens = kMaxTokens;
  return {kSlots, kMaxTokens, {region}, {1}, true};
}

}  // namespace

KvUser::KvUser(std::shared_ptr<vattn::PagePool> pool, const Device& device, std::uint32_t seed)
    : device_(device),
      space_(std::make_shared<SlotSpace>(std::move(pool), options())),
      random_(seed),
      stream_(device.any(random_)) {}

void KvUser::step() {
  ++steps_;
  try {
    if (sequences_.empty() || (sequences_.size() < kSlots && random_.below(4) == 0)) open();
    Sequence& sequence = sequences_[random_.below(sequences_.size())];
    switch (random_.below(10)) {
      case 0:
      case 1:
        return release(random_.below(sequences_.size()));
      case 2:
        return verify(sequence);
      case 3:
        return space_->check();
      default:
        return grow(sequence);
    }
  } catch (const vattn::OutOfPages&) {
    ++out_of_pages_;
    release(random_.below(sequences_.size()));
  } catch (const vattn::DriverError& error) {
    if (error.fatal()) throw;
  }
}

void KvUser::open() {
  sequences_.push_back({space_->open(std::nullopt, random_.below(kMaxTokens)), {}});
}

void KvUser::grow(Sequence& sequence) {
  const auto slot = static_cast<std::int32_t>(sequence.slot);
  const std::size_t tokens =
      std::min(kMaxTokens, sequence.values.size() + 1 + random_.below(kMaxTokens / 2));
  const auto length = static_cast<std::int32_t>(tokens);
  space_->ensure(std::span(&slot, 1), std::span(&length, 1), stream_);
  for (std::size_t token = sequence.values.size(); token < tokens; ++token) {
    const auto value = static_cast<std::uint8_t>(1 + random_.below(255));
    sequence.values.push_back(value);
    for_places(sequence, token, [&](Address at) { device_.fill(at, value, kPlaceBytes, stream_); });
  }
}

template <typename F>
void KvUser::for_places(const Sequence& sequence, std::size_t token, F visit) const {
  const vattn::Region& region = space_->regions()[0];
  for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
    const Address at = region.address(sequence.slot, run * region.pages_per_run()) +
                       token * region.spec().token_bytes;
    visit(at);
    visit(at + region.spec().token_bytes - kPlaceBytes);
  }
}

void KvUser::verify(const Sequence& sequence) const {
  device_.synchronize(stream_);
  for (std::size_t token = 0; token < sequence.values.size(); ++token) {
    for_places(sequence, token, [&](Address at) {
      const auto* bytes = reinterpret_cast<const volatile std::uint8_t*>(at);
      if (bytes[0] != sequence.values[token] || bytes[kPlaceBytes - 1] != sequence.values[token]) {
        fail("a sequence of the KV cache has somebody else's bytes");
      }
    });
  }
}

void KvUser::release(std::size_t i) {
  const Sequence sequence = std::move(sequences_[i]);
  sequences_.erase(sequences_.begin() + static_cast<std::ptrdiff_t>(i));
  if (random_.below(4) == 0) verify(sequence);
  insist([&] { space_->release(sequence.slot, stream_, true); });
}

void KvUser::finish() {
  while (!sequences_.empty()) release(sequences_.size() - 1);
  insist([&] { space_->trim(); });
  space_->check();
}

}  // namespace stress
