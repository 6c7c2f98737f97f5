#include "torch_entry.h"

#include <atomic>
#include <cstdio>
#include <stdexcept>

#include "registry.h"
#include "torch_error.h"

namespace vattn {
namespace {

std::array<std::atomic<std::uint64_t>, kBadFrees> refused;

// CUDA_ERROR_DEINITIALIZED: the driver is shut down, and its memory is gone.
constexpr int kShutDown = 4;

void report(BadFree kind, const char* what) noexcept {
  if (refused[static_cast<std::size_t>(kind)].fetch_add(1, std::memory_order_relaxed) != 0) return;
  std::fprintf(stderr, "vattn: %s (%s; more of this kind are counted, not shown)\n", what,
               bad_free_name(kind));
}

// What is wrong with an address that an allocator has refused.
BadFree bad_free_kind(const void* address, const CachingAllocator* asked) {
  const CachingAllocator* owner = Registry::of_process().owner(address);
  if (owner == nullptr) return BadFree::kUnknown;
  return owner == asked ? BadFree::kWrongSize : BadFree::kWrongDevice;
}

// Runs `work`; what it throws of ours comes out as PyTorch's. What PyTorch throws itself, in a
// filter of streams, passes.
template <typename Work>
auto with_torch_errors(Work work) {
  std::string message;
  bool out_of_memory = false;
  try {
    return work();
  } catch (const OutOfPages& error) {
    out_of_memory = true;
    message = error.what();
  } catch (const std::runtime_error& error) {
    message = error.what();
  } catch (const std::logic_error& error) {
    message = error.what();
  } catch (const std::bad_alloc&) {
    message = "the host has no memory left";
  }
  if (out_of_memory) throw_torch_out_of_memory(message);
  throw_torch_error(message);
}

thread_local std::array<TagId, Registry::kMaxDevices> segment_tags{};

// What this thread allocates while it lives has a tag.
class UnderTag {
 public:
  explicit UnderTag(TagId tag) : before_(set_current_tag(tag)) {}
  ~UnderTag() { set_current_tag(before_); }
  UnderTag(const UnderTag&) = delete;
  UnderTag& operator=(const UnderTag&) = delete;

 private:
  const TagId before_;
};

// CUDA has two handles that stand for streams: of the legacy default stream, which is 0 here, and
// of one that is another in each thread, whose memory would be reused too early.
Stream number(TorchStream stream) {
  constexpr Stream kLegacy = 1, kPerThread = 2;
  const auto handle = reinterpret_cast<Stream>(stream);
  if (handle == kPerThread) {
    throw std::invalid_argument(
        "the stream is cudaStreamPerThread, which is another one in each thread; use a stream of "
        "its own");
  }
  return handle == kLegacy ? 0 : handle;
}

void set_fraction(double fraction, int device) {
  CachingAllocator& allocator = Registry::of_process().get(device);
  const double total = static_cast<double>(allocator.pool()->driver().memory_info().total_bytes);
  const auto page = static_cast<double>(allocator.pool()->page_bytes());
  if (!(fraction >= 0 && fraction <= 1) || fraction * total < page) {
    throw std::invalid_argument("fraction=" + std::to_string(fraction) +
                                " of the memory of cuda:" + std::to_string(device) +
                                " must be at most 1 and at least a page of " +
                                std::to_string(allocator.pool()->page_bytes()) + " bytes");
  }
  allocator.set_limit(static_cast<std::size_t>(fraction * total));
}

void* base_of(void* address, std::size_t* bytes) {
  Registry& registry = Registry::of_process();
  const std::vector<int> devices = registry.devices();
  for (std::size_t i = 0; i < devices.size(); ++i) {
    try {
      return registry.get(devices[i]).base(address, bytes);
    } catch (const std::invalid_argument&) {
      if (i + 1 == devices.size()) throw;
    }
  }
  throw std::invalid_argument("no memory was allocated here yet, so nothing has a base");
}

void free_quietly(void* address, std::size_t bytes, int device) {
  Registry& registry = Registry::of_process();
  CachingAllocator* allocator = registry.peek(device);
  if (allocator == nullptr) {
    const std::string text = "free of memory of cuda:" + std::to_string(device) +
                             ", where nothing was allocated, is left undone";
    return report(bad_free_kind(address, nullptr), text.c_str());
  }
  if (!allocator->pool()->driver().usable()) return;  // a forked child's copy
  try {
    allocator->free(address, bytes);
  } catch (const std::invalid_argument& error) {
    report(bad_free_kind(address, allocator), error.what());
  } catch (const DriverError& error) {
    if (error.code() != kShutDown) report(BadFree::kFailed, error.what());
  }
}

}  // namespace

TagId set_segment_tag(int device, TagId tag) {
  if (device < 0 || device >= Registry::kMaxDevices) {
    throw std::invalid_argument("device=" + std::to_string(device) + " is not a device");
  }
  return std::exchange(segment_tags[static_cast<std::size_t>(device)], tag);
}

const char* bad_free_name(BadFree kind) noexcept {
  static constexpr const char* kNames[kBadFrees] = {"unknown", "wrong_size", "wrong_device",
                                                    "failed"};
  return kNames[static_cast<std::size_t>(kind)];
}

std::array<std::uint64_t, kBadFrees> bad_frees() noexcept {
  std::array<std::uint64_t, kBadFrees> out{};
  for (std::size_t i = 0; i < kBadFrees; ++i) out[i] = refused[i].load(std::memory_order_relaxed);
  return out;
}

}  // namespace vattn

using vattn::Registry;
using vattn::with_torch_errors;

void* vattn_torch_alloc(std::size_t bytes, int device, vattn::TorchStream stream) {
  return with_torch_errors(
      [&] { return Registry::of_process().get(device).allocate(bytes, vattn::number(stream)); });
}

void* vattn_torch_try_alloc(std::size_t bytes, int device, vattn::TorchStream stream) {
  return with_torch_errors([&]() -> void* {
    vattn::CachingAllocator& allocator = Registry::of_process().get(device);
    const vattn::UnderTag tag(vattn::segment_tags[static_cast<std::size_t>(device)]);
    try {
      return allocator.allocate(bytes, vattn::number(stream));
    } catch (const vattn::OutOfPages&) {
      return nullptr;
    }
  });
}

void vattn_torch_free(void* address, std::size_t bytes, int device, vattn::TorchStream) noexcept {
  if (address == nullptr) return;
  try {
    vattn::free_quietly(address, bytes, device);
  } catch (const std::exception& error) {
    vattn::report(vattn::BadFree::kFailed, error.what());
  }
}

void vattn_torch_init(int device_count) {
  if (device_count <= Registry::kMaxDevices) return;
  vattn::throw_torch_error("PyTorch sees " + std::to_string(device_count) +
                           " devices, and vattn's allocator can serve " +
                           std::to_string(Registry::kMaxDevices) + "; set CUDA_VISIBLE_DEVICES");
}

void vattn_torch_reset() {
  with_torch_errors([] {
    Registry& registry = Registry::of_process();
    for (const int device : registry.devices()) registry.get(device).trim();
  });
}

void vattn_torch_memory_fraction(double fraction, int device) {
  with_torch_errors([&] { vattn::set_fraction(fraction, device); });
}

void* vattn_torch_base_alloc(void* address, std::size_t* bytes) {
  return with_torch_errors([&] { return vattn::base_of(address, bytes); });
}

void vattn_torch_record_stream(void* address, vattn::TorchStream stream) {
  with_torch_errors([&] {
    vattn::CachingAllocator* owner = Registry::of_process().owner(address);
    if (owner != nullptr) owner->record_stream(address, vattn::number(stream));
  });
}

void vattn_torch_begin_pool(int device, vattn::GraphPoolId id,
                            std::function<bool(vattn::TorchStream)> filter) {
  with_torch_errors([&] {
    Registry::of_process().get(device).begin_graph_pool(
        id, [filter = std::move(filter)](vattn::Stream stream) {
          return filter(reinterpret_cast<vattn::TorchStream>(stream));
        });
  });
}

void vattn_torch_end_pool(int device, vattn::GraphPoolId id) {
  with_torch_errors([&] { Registry::of_process().get(device).end_graph_pool(id); });
}

void vattn_torch_release_pool(int device, vattn::GraphPoolId id) noexcept {
  try {
    vattn::CachingAllocator* allocator = Registry::of_process().peek(device);
    if (allocator == nullptr || !allocator->pool()->driver().usable()) return;
    allocator->release_graph_pool(id);
  } catch (const std::exception& error) {
    vattn::report(vattn::BadFree::kFailed, error.what());
  }
}
