// A KV cache on the allocator's pool: sequences that grow, are kept for others, and end.
#pragma once

#include "allocator_device.h"
#include "slots.h"

namespace stress {

using vattn::SlotSpace;

class KvUser {
 public:
  KvUser(std::shared_ptr<vattn::PagePool> pool, const Device& device, std::uint32_t seed);

  void step();
  void finish();
  std::uint64_t steps() const noexcept { return steps_; }
  std::uint64_t out_of_pages() const noexcept { return out_of_pages_; }
  std::uint64_t evicted_tokens() const { return space_->evictions(); }

 private:
  struct Sequence {
    std::uint32_t slot;
    std::vector<std::uint8_t> values;  // of each token
  };

  void open();
  void grow(Sequence& sequence);
  void verify(const Sequence& sequence) const;
  void release(std::size_t i);
  template <typename F>
  void for_places(const Sequence& sequence, std::size_t token, F visit) const;

  const Device& device_;
  const std::shared_ptr<SlotSpace> space_;
  Random random_;
  const Stream stream_;
  std::uint64_t steps_ = 0, out_of_pages_ = 0;
  std::vector<Sequence> sequences_;
};

}  // namespace stress
