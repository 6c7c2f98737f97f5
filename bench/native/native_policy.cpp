// PyTorch's default policy: cudaMalloc segments of 2 MiB for small blocks, of 20 MiB for blocks
// below 10 MiB, and of their own size rounded up to 2 MiB for the rest. A segment goes back to the
// device only whole, and only when the device is out of memory.
#include "torch_policy.h"

namespace bench {
namespace {

constexpr std::size_t kSmallSegment = 2 * kMiB;
constexpr std::size_t kLargeSegment = 20 * kMiB;
constexpr std::size_t kOwnSegmentFrom = 10 * kMiB;
constexpr std::size_t kLeastLargeRest = kMiB;

std::size_t segment_bytes(const Pool& pool, std::size_t bytes) {
  if (pool.small) return kSmallSegment;
  return bytes < kOwnSegmentFrom ? kLargeSegment : round_up(bytes, kDriverPageBytes);
}

class NativePolicy final : public TorchPolicy {
 public:
  using TorchPolicy::TorchPolicy;

  const char* name() const noexcept override { return "native"; }

 private:
  Block* choose(Pool& pool, std::uint32_t stream, std::size_t bytes) override {
    const auto found = smallest(pool, stream, bytes);
    if (found == pool.free.end()) return nullptr;
    Block* const block = *found;
    pool.free.erase(found);
    return block;
  }

  Block* grow(Pool& pool, std::uint32_t stream, std::size_t bytes) override {
    const std::size_t segment = segment_bytes(pool, bytes);
    Address address = 0;
    if (!device_.malloc(segment, address)) return nullptr;
    return new Block{.address = address, .bytes = segment, .stream = stream, .pool = &pool};
  }

  bool worth_cutting(const Pool& pool, std::size_t rest) const override {
    return pool.small ? rest >= kAlignment : rest > kLeastLargeRest;
  }

  void release_cached(Pool& pool) override {
    for (auto it = pool.free.begin(); it != pool.free.end();) {
      const Block* const block = *it;
      if (!block->alone()) {
        ++it;
        continue;
      }
      it = pool.free.erase(it);
      device_.free(block->bytes);
      delete block;
    }
  }
};

}  // namespace

std::unique_ptr<Policy> make_native_policy(const PolicyOptions& options) {
  return std::make_unique<NativePolicy>(options.device_bytes);
}

}  // namespace bench
