#include "allocator_pressure.h"

#include <chrono>
#include <thread>

namespace stress {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kTags = 4;
constexpr int kOperatingSystem = 304;  // a CUresult that is neither memory nor fatal

// Those that only the allocator and the pool call come more often.
constexpr const char* kCalls[] = {
    "cuMemCreate",         "cuMemMap",          "cuMemSetAccess",    "cuMemUnmap",
    "cuMemCreate",         "cuMemMap",          "cuMemSetAccess",    "cuMemUnmap",
    "cuMemRelease",        "cuEventCreate",     "cuEventRecord",     "cuEventQuery",
    "cuEventSynchronize",  "cuStreamWaitEvent", "cuStreamCreate",    "cuMemsetD8Async",
    "cuMemAddressReserve", "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuStreamSynchronize"};

void inject(const FakeControl& fake, Random& random) {
  fake.clear_failures();
  if (random.below(16) == 0) return fake.out_of_memory_after(random.below(64 * kMiB));
  fake.fail(kCalls[random.below(std::size(kCalls))], 1 + random.below(3), kOperatingSystem);
}

}  // namespace

Pressure::Pressure(Shared& shared, vattn::PagePool& pool, vattn::Mapper* mapper,
                   std::size_t budget_bytes, bool faults)
    : shared_(shared),
      pool_(pool),
      mapper_(mapper),
      budget_bytes_(budget_bytes),
      faults_(faults),
      random_(99) {}

void Pressure::run(const std::atomic<bool>& stop) {
  while (!stop) {
    if (faults_) next_fault();
    try {
      if (random_.below(faults_ ? 8 : 1) == 0) step();
    } catch (const vattn::DriverError& error) {
      if (error.fatal()) throw;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(faults_ ? 100 : 500));
  }
  if (faults_) shared_.device.fake()->clear_failures();
  pool_.set_budget(budget_bytes_);
  shared_.allocator.set_limit(0);
}

// No operation meets two failures: what fails while it is being undone cannot be undone.
void Pressure::next_fault() {
  shared_.gate.closed([&] {
    if (mapper_ != nullptr) mapper_->drain();
    inject(*shared_.device.fake(), random_);
  });
}

void Pressure::step() {
  CachingAllocator& allocator = shared_.allocator;
  const TagId tag = vattn::tag_id("thread " + std::to_string(1 + random_.below(kTags)));
  switch (random_.below(12)) {
    case 0:
      return pool_.set_budget(budget_bytes_ / 3 + random_.below(budget_bytes_ * 2 / 3));
    case 1:
    case 2:
      return pool_.set_budget(budget_bytes_);
    case 3:
      return allocator.set_limit(budget_bytes_ / 3 + random_.below(budget_bytes_ / 2));
    case 4:
      return allocator.set_limit(0);
    case 5:
      return static_cast<void>(allocator.trim(random_.below(budget_bytes_ / 2)));
    case 6:
      return allocator.set_tag_budget(tag, 16 * kMiB + random_.below(budget_bytes_ / 2));
    case 7:
      return allocator.set_tag_budget(tag, 0);
    case 8:
      return static_cast<void>(allocator.segments());
    case 9:
      return static_cast<void>(allocator.figures());
    case 10:
      return allocator.settle();
    default:
      return allocator.check();
  }
}

}  // namespace stress
