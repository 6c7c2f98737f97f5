#include "registry.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "cuda_driver.h"

namespace vattn {
namespace {

// Of the memory that is free at the start this much stays for what does not come from here: CUDA's
// own, the code of kernels, libraries' buffers.
constexpr std::size_t kReserveBytes = std::size_t{1} << 30;
constexpr std::size_t kReserveShare = 16;

std::size_t default_budget(const Driver& driver) {
  const std::size_t free_bytes = driver.memory_info().free_bytes;
  return free_bytes - std::min(kReserveBytes, free_bytes / kReserveShare);
}

void require_device(int device) {
  if (device >= 0 && device < Registry::kMaxDevices) return;
  throw std::invalid_argument(
      "device=" + std::to_string(device) +
      " is not one of cuda:0 to cuda:" + std::to_string(Registry::kMaxDevices - 1));
}

std::atomic<Registry*> made_here{nullptr};

}  // namespace

Registry::Registry() : pid_(::getpid()) {}

Registry& Registry::of_process() {
  Registry* current = made_here.load(std::memory_order_acquire);
  // A child that was forked before any allocator was made may use CUDA, as PyTorch has it; but its
  // copy of the lock may be held for good by a thread that it does not have. One that was forked
  // later keeps what it finds, which tells so itself when it is used.
  if (current != nullptr && (!current->empty() || current->pid_ == ::getpid())) return *current;
  auto* fresh = new Registry;
  if (current != nullptr) {
    fresh->options_ = current->options_;
    fresh->enabled_ = current->enabled();
  }
  if (made_here.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;  // another thread was first
  return *current;
}

bool Registry::empty() const noexcept {
  return std::none_of(slots_.begin(), slots_.end(),
                      [](const auto& slot) { return slot.load() != nullptr; });
}

// Its lock may be held for good by a thread of the parent.
void Registry::require_this_process() const {
  if (pid_ == ::getpid()) return;
  throw DriverError("allocate", 0,
                    "CUDA memory was in use before fork(), and a child cannot use CUDA then; start "
                    "workers with the spawn method",
                    true);
}

void Registry::configure(const TorchOptions& options, bool enabled) {
  require_this_process();
  const std::lock_guard guard(mutex_);
  if (!empty()) {
    throw std::invalid_argument(
        "device " + std::to_string(devices().front()) +
        " has its allocator already; set options before anything is allocated");
  }
  options_ = options;
  enabled_ = enabled;
}

CachingAllocator& Registry::make(int device) {
  require_device(device);
  require_this_process();
  const std::lock_guard guard(mutex_);
  if (CachingAllocator* found = peek(device)) return *found;
  const std::shared_ptr<Driver> driver =
      make_cuda_driver({device, options_.libcuda, options_.host_accessible});
  const std::size_t budget =
      options_.budget_bytes != 0 ? options_.budget_bytes : default_budget(*driver);
  auto pool = std::make_shared<PagePool>(
      driver,
      PoolOptions{options_.page_bytes, budget, options_.ahead_bytes / 2, options_.ahead_bytes});
  auto mapper = std::make_shared<Mapper>(pool);
  if (enabled_ && !empty()) {
    std::fprintf(stderr,
                 "vattn: memory of each GPU is accessible to that GPU only, and this process uses "
                 "several: copies between them may fail. One process per GPU is fine.\n");
  }
  put(device, std::make_shared<CachingAllocator>(pool, std::move(mapper)));
  return *peek(device);
}

void Registry::install(int device, std::shared_ptr<CachingAllocator> allocator) {
  require_device(device);
  require_this_process();
  if (allocator == nullptr) throw std::invalid_argument("allocator=None is not an allocator");
  const std::lock_guard guard(mutex_);
  if (peek(device) != nullptr) {
    throw std::invalid_argument("device " + std::to_string(device) +
                                " has an allocator already, which tensors may be using");
  }
  put(device, std::move(allocator));
}

void Registry::put(int device, std::shared_ptr<CachingAllocator> allocator) {
  CachingAllocator* raw = allocator.get();
  owners_.push_back(std::move(allocator));
  slots_[static_cast<std::size_t>(device)].store(raw, std::memory_order_release);
}

std::shared_ptr<CachingAllocator> Registry::shared(int device) {
  const CachingAllocator* found = peek(device);
  if (found == nullptr) return nullptr;
  require_this_process();
  const std::lock_guard guard(mutex_);
  return *std::find_if(owners_.begin(), owners_.end(),
                       [found](const auto& each) { return each.get() == found; });
}

std::vector<int> Registry::devices() const {
  std::vector<int> out;
  for (int device = 0; device < kMaxDevices; ++device) {
    if (peek(device) != nullptr) out.push_back(device);
  }
  return out;
}

CachingAllocator* Registry::owner(const void* address) const {
  for (const auto& slot : slots_) {
    CachingAllocator* allocator = slot.load(std::memory_order_acquire);
    if (allocator != nullptr && allocator->owns(address)) return allocator;
  }
  return nullptr;
}

}  // namespace vattn
