// The allocator of each device of this process: what PyTorch's calls, which name a device by its
// index, are forwarded to.
//
// Nothing here is ever destroyed. Tensors outlive static destructors, in an order that nobody
// controls, and by then the CUDA driver may be shut down; the process's end frees the memory.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "caching_allocator.h"

namespace vattn {

// How allocators are made, one for each device at its first use.
struct TorchOptions {
  std::size_t budget_bytes = 0;  // of each device; 0: what is free there, but for a reserve
  std::size_t page_bytes = 0;    // 0: the driver's default
  std::size_t ahead_bytes = 0;   // pages made in the background ahead of need
  std::string libcuda;           // empty: VATTN_LIBCUDA, or libcuda.so.1
  bool host_accessible = false;  // of the fake driver's devices, in tests
};

class Registry {
 public:
  static constexpr int kMaxDevices = 64;

  // This process's. In a forked child whose parent had made no allocator yet: one of its own.
  static Registry& of_process();

  // Sets how allocators are made. `enabled`: all of PyTorch's memory comes from here, so caches
  // without a pool of their own are to share it. Throws std::invalid_argument once one was made.
  void configure(const TorchOptions& options, bool enabled);
  bool enabled() const noexcept { return enabled_.load(std::memory_order_acquire); }

  // Null if the device has none, or does not exist.
  CachingAllocator* peek(int device) const noexcept {
    if (device < 0 || device >= kMaxDevices) return nullptr;
    return slots_[static_cast<std::size_t>(device)].load(std::memory_order_acquire);
  }
  // Makes it if need be. Throws std::invalid_argument for a bad device, DriverError, OutOfPages.
  CachingAllocator& get(int device) {
    CachingAllocator* found = peek(device);
    return found != nullptr ? *found : make(device);
  }
  std::shared_ptr<CachingAllocator> shared(int device);
  // Takes one that was made elsewhere. Throws std::invalid_argument if the device has one.
  void install(int device, std::shared_ptr<CachingAllocator> allocator);
  // Devices that have one, in order.
  std::vector<int> devices() const;
  // The one that a live block starts in, if any.
  CachingAllocator* owner(const void* address) const;

 private:
  Registry();
  CachingAllocator& make(int device);
  void require_this_process() const;
  bool empty() const noexcept;
  void put(int device, std::shared_ptr<CachingAllocator> allocator);

  const int pid_;
  std::atomic<bool> enabled_{false};
  std::mutex mutex_;
  TorchOptions options_;
  std::array<std::atomic<CachingAllocator*>, kMaxDevices> slots_{};
  std::vector<std::shared_ptr<CachingAllocator>> owners_;
};

}  // namespace vattn
