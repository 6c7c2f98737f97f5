// vattn's own allocator, on the real CUDA driver code loaded on the fake libcuda.
//
// One at a time: the fake is one device for the whole process.
#include <vector>

#include "caching_allocator.h"
#include "cuda_driver.h"
#include "fake_library.h"
#include "policy.h"

namespace bench {
namespace {

struct Counted {
  vattn::Op op;
  Call call;
};

// Each call of the driver API that vattn makes is one; those of kEvent are creations, records,
// queries, waits and destructions alike.
constexpr Counted kCounted[] = {
    {vattn::Op::kReserve, Call::kReserve}, {vattn::Op::kRelease, Call::kAddressFree},
    {vattn::Op::kCreate, Call::kCreate},   {vattn::Op::kDestroy, Call::kRelease},
    {vattn::Op::kMap, Call::kMap},         {vattn::Op::kSetAccess, Call::kSetAccess},
    {vattn::Op::kUnmap, Call::kUnmap},     {vattn::Op::kCopy, Call::kCopy},
    {vattn::Op::kFill, Call::kFill},       {vattn::Op::kEvent, Call::kEvent},
};
static_assert(std::size(kCounted) == vattn::kOps);

class VattnPolicy final : public Policy {
 public:
  explicit VattnPolicy(const PolicyOptions& options) : fake_(options.libcuda) {
    const std::size_t device_bytes = options.device_bytes / kDriverPageBytes * kDriverPageBytes;
    fake_.start(device_bytes, kDriverPageBytes);
    driver_ = vattn::make_cuda_driver({0, options.libcuda, false});
    for (std::uint32_t i = 0; i < options.streams; ++i) {
      streams_.push_back(i == 0 ? 0 : driver_->create_stream());
    }
    pool_ = std::make_shared<vattn::PagePool>(
        driver_, vattn::PoolOptions{kDriverPageBytes, device_bytes, 0, 0});
    mapper_ = std::make_shared<vattn::Mapper>(pool_);
    allocator_ = std::make_unique<vattn::CachingAllocator>(pool_, mapper_);
  }

  const char* name() const noexcept override { return "vattn"; }

  void* allocate(std::size_t bytes, std::uint32_t stream) override {
    try {
      return allocator_->allocate(bytes, streams_[stream]);
    } catch (const vattn::OutOfMemory& error) {
      throw OutOfMemory(error.what());
    }
  }

  void free(void* address, std::size_t bytes, std::uint32_t) override {
    allocator_->free(address, bytes);
  }

  std::size_t physical_bytes() const override { return driver_->physical_bytes(); }
  std::size_t peak_physical_bytes() const override { return fake_.peak_bytes(); }

  // What the operations so far have caused, the background's part included.
  CallCounts driver_calls() const override {
    allocator_->settle();
    const vattn::DriverCounters counters = driver_->counters();
    CallCounts calls{};
    for (const Counted& counted : kCounted) {
      calls[static_cast<std::size_t>(counted.call)] =
          counters[static_cast<std::size_t>(counted.op)].calls;
    }
    return calls;
  }

  void check() const override { allocator_->check(); }

  void close() override {
    allocator_->check();
    allocator_.reset();
    mapper_->stop();
    mapper_.reset();
    pool_.reset();
    for (const vattn::Stream stream : streams_) {
      if (stream != 0) driver_->destroy_stream(stream);
    }
    driver_.reset();
    if (const std::string found = fake_.complaints(); !found.empty()) {
      throw std::logic_error("left or broken: " + found);
    }
  }

 private:
  FakeLibrary fake_;
  std::shared_ptr<vattn::Driver> driver_;
  std::vector<vattn::Stream> streams_;
  std::shared_ptr<vattn::PagePool> pool_;
  std::shared_ptr<vattn::Mapper> mapper_;
  std::unique_ptr<vattn::CachingAllocator> allocator_;
};

}  // namespace

std::unique_ptr<Policy> make_vattn_policy(const PolicyOptions& options) {
  return std::make_unique<VattnPolicy>(options);
}

}  // namespace bench
