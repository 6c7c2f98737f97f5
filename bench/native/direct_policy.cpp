// No caching: a cudaMalloc for every request and a cudaFree for every release, whatever the stream.
//
// The CUDA driver's own packing is not documented. The model: it rounds to 512 bytes (the alignment
// that cudaMalloc shows), packs what is at most 1 MiB into pages of 2 MiB, best fit, each given
// back as soon as it is empty, and rounds what is larger up to 2 MiB.
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

#include "counting_device.h"

namespace bench {
namespace {

constexpr std::size_t kPackedLimit = kMiB;

class DirectPolicy final : public Policy {
 public:
  explicit DirectPolicy(std::size_t device_bytes) : device_(device_bytes) {}

  const char* name() const noexcept override { return "direct"; }

  void* allocate(std::size_t requested, std::uint32_t) override {
    const std::size_t bytes = live_bytes(requested);
    const std::lock_guard lock(mutex_);
    device_.count(Call::kMalloc);
    const Address address = bytes <= kPackedLimit ? pack(bytes) : own(bytes);
    if (address == 0) {
      throw OutOfMemory(std::to_string(requested) + " bytes do not fit beside " +
                        std::to_string(device_.physical()) + " of " +
                        std::to_string(device_.bytes()));
    }
    used_.emplace(address, bytes);
    return reinterpret_cast<void*>(address);
  }

  void free(void* pointer, std::size_t, std::uint32_t) override {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(reinterpret_cast<Address>(pointer));
    if (found == used_.end()) throw std::logic_error("free of an address that is not in use");
    const auto [address, bytes] = *found;
    used_.erase(found);
    device_.count(Call::kFree);
    if (bytes <= kPackedLimit) {
      unpack(address, bytes);
    } else {
      device_.give(round_up(bytes, kDriverPageBytes));
    }
  }

  std::size_t physical_bytes() const override { return device_.physical(); }
  std::size_t peak_physical_bytes() const override { return device_.peak(); }
  CallCounts driver_calls() const override { return device_.calls(); }

  void check() const override {
    const std::lock_guard lock(mutex_);
    std::size_t held = 0;
    for (const auto& [address, bytes] : used_) {
      held += bytes <= kPackedLimit ? bytes : round_up(bytes, kDriverPageBytes);
    }
    for (const auto& [address, bytes] : holes_) held += bytes;
    if (held != device_.physical() || holes_.size() != by_bytes_.size()) {
      throw std::logic_error("blocks and holes of " + std::to_string(held) + " bytes on " +
                             std::to_string(device_.physical()) + " bytes of memory");
    }
  }

  void close() override {
    check();
    if (!used_.empty()) throw std::logic_error(std::to_string(used_.size()) + " blocks are in use");
    if (device_.physical() != 0) throw std::logic_error("pages are left without a block");
  }

 private:
  Address own(std::size_t bytes) {
    bytes = round_up(bytes, kDriverPageBytes);
    return device_.take(bytes) ? device_.addresses(bytes) : 0;
  }

  Address pack(std::size_t bytes) {
    auto found = by_bytes_.lower_bound({bytes, 0});
    if (found == by_bytes_.end()) {
      const Address page = own(kDriverPageBytes);
      if (page == 0) return 0;
      found = add_hole(page, kDriverPageBytes);
    }
    const auto [hole_bytes, address] = *found;
    holes_.erase(address);
    by_bytes_.erase(found);
    if (hole_bytes > bytes) add_hole(address + bytes, hole_bytes - bytes);
    return address;
  }

  // Holes merge; pages are never neighbours, so no hole is larger than one.
  void unpack(Address address, std::size_t bytes) {
    if (const auto next = holes_.find(address + bytes); next != holes_.end()) {
      bytes += next->second;
      remove_hole(next);
    }
    if (auto before = holes_.lower_bound(address); before != holes_.begin()) {
      --before;
      if (before->first + before->second == address) {
        address = before->first;
        bytes += before->second;
        remove_hole(before);
      }
    }
    if (bytes == kDriverPageBytes) {
      device_.give(bytes);
    } else {
      add_hole(address, bytes);
    }
  }

  using BySize = std::set<std::pair<std::size_t, Address>>;

  BySize::iterator add_hole(Address address, std::size_t bytes) {
    holes_.emplace(address, bytes);
    return by_bytes_.emplace(bytes, address).first;
  }

  void remove_hole(std::map<Address, std::size_t>::iterator hole) {
    by_bytes_.erase({hole->second, hole->first});
    holes_.erase(hole);
  }

  CountingDevice device_;
  mutable std::mutex mutex_;
  std::unordered_map<Address, std::size_t> used_;
  std::map<Address, std::size_t> holes_;  // of pages that hold blocks
  BySize by_bytes_;
};

}  // namespace

std::unique_ptr<Policy> make_direct_policy(const PolicyOptions& options) {
  return std::make_unique<DirectPolicy>(options.device_bytes);
}

}  // namespace bench
