// Real PyTorch on vattn's entry points, without CUDA: CPU tensors get their memory from the
// functions that torch.cuda's pluggable allocator would call, as it would call them.
//
// Compiled by the tests against the headers of the torch that is installed; see __init__.py.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct CUstream_st;
using StreamHandle = CUstream_st*;
using PoolId = c10::MempoolId_t;

namespace {

// What PyTorch stores for each entry; the types are those of CUDAPluggableAllocator.h.
struct Entries {
  void* (*alloc)(size_t, int, StreamHandle);
  void (*free)(void*, size_t, int, StreamHandle);
  std::function<void(void*, StreamHandle)> record_stream;
  std::function<void(int, PoolId, std::function<bool(StreamHandle)>)> begin_pool;
  std::function<void(int, PoolId)> end_pool;
  std::function<void(int, PoolId)> release_pool;
  std::function<void(double, int)> memory_fraction;
  std::function<void*(void*, size_t*)> base_alloc;
  std::function<void()> reset;
  std::function<void(int)> init;
};
Entries entries;
thread_local int device = 0;
thread_local StreamHandle stream = nullptr;

// Like CUDAPluggableAllocator, it remembers what it was given, because a deleter has no size.
struct Given {
  size_t bytes;
  int device;
  StreamHandle stream;
};
std::mutex mutex;
std::unordered_map<void*, Given> given;

void give_back(void* address) {
  Given what;
  {
    const std::lock_guard guard(mutex);
    const auto found = given.find(address);
    if (found == given.end()) return;
    what = found->second;
    given.erase(found);
  }
  entries.free(address, what.bytes, what.device, what.stream);
}

struct BridgeAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* address = entries.alloc(bytes, device, stream);
    if (address != nullptr) {
      const std::lock_guard guard(mutex);
      given[address] = {bytes, device, stream};
    }
    return {address, address, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
BridgeAllocator bridge;
c10::Allocator* before = nullptr;

enum Outcome { kDone = 0, kOutOfMemory = 1, kTorchError = 2, kOtherError = 3 };

// Runs `work`; what it throws is told by type, and its message.
template <typename Work>
int outcome(Work work, char* message, size_t room) {
  const auto tell = [&](const char* text) {
    std::strncpy(message, text, room - 1);
    message[room - 1] = 0;
  };
  try {
    work();
    return kDone;
  } catch (const c10::OutOfMemoryError& error) {
    tell(error.what_without_backtrace());
    return kOutOfMemory;
  } catch (const c10::Error& error) {
    tell(error.what_without_backtrace());
    return kTorchError;
  } catch (const std::exception& error) {
    tell(error.what());
    return kOtherError;
  }
}

template <typename Function>
Function* entry(uint64_t address) {
  return reinterpret_cast<Function*>(address);
}

}  // namespace

extern "C" {

// Addresses in the order of the parameters' names.
void bridge_entries(uint64_t alloc, uint64_t free, uint64_t record_stream, uint64_t begin_pool,
                    uint64_t end_pool, uint64_t release_pool, uint64_t memory_fraction,
                    uint64_t base_alloc, uint64_t reset, uint64_t init) {
  entries.alloc = entry<void*(size_t, int, StreamHandle)>(alloc);
  entries.free = entry<void(void*, size_t, int, StreamHandle)>(free);
  entries.record_stream = entry<void(void*, StreamHandle)>(record_stream);
  entries.begin_pool = entry<void(int, PoolId, std::function<bool(StreamHandle)>)>(begin_pool);
  entries.end_pool = entry<void(int, PoolId)>(end_pool);
  entries.release_pool = entry<void(int, PoolId)>(release_pool);
  entries.memory_fraction = entry<void(double, int)>(memory_fraction);
  entries.base_alloc = entry<void*(void*, size_t*)>(base_alloc);
  entries.reset = entry<void()>(reset);
  entries.init = entry<void(int)>(init);
}

void bridge_install() {
  before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&bridge);
}
// Tensors that are alive keep their memory.
void bridge_remove() { c10::SetCPUAllocator(before); }

// Of this thread's requests from now on.
void bridge_use(int on_device, uint64_t on_stream) {
  device = on_device;
  stream = reinterpret_cast<StreamHandle>(on_stream);
}
uint64_t bridge_live() {
  const std::lock_guard guard(mutex);
  return given.size();
}

int bridge_record_stream(uint64_t address, uint64_t on, char* message, size_t room) {
  return outcome(
      [&] {
        entries.record_stream(reinterpret_cast<void*>(address), reinterpret_cast<StreamHandle>(on));
      },
      message, room);
}
// The pool takes the requests of `count` streams.
int bridge_begin_pool(int on, uint64_t first, uint64_t second, const uint64_t* streams,
                      size_t count, char* message, size_t room) {
  std::vector<StreamHandle> mine;
  for (size_t i = 0; i < count; ++i) mine.push_back(reinterpret_cast<StreamHandle>(streams[i]));
  return outcome(
      [&] {
        entries.begin_pool(on, PoolId(first, second), [mine](StreamHandle asked) {
          for (StreamHandle each : mine) {
            if (each == asked) return true;
          }
          return false;
        });
      },
      message, room);
}
int bridge_end_pool(int on, uint64_t first, uint64_t second, char* message, size_t room) {
  return outcome([&] { entries.end_pool(on, PoolId(first, second)); }, message, room);
}
int bridge_release_pool(int on, uint64_t first, uint64_t second, char* message, size_t room) {
  return outcome([&] { entries.release_pool(on, PoolId(first, second)); }, message, room);
}
int bridge_memory_fraction(double fraction, int on, char* message, size_t room) {
  return outcome([&] { entries.memory_fraction(fraction, on); }, message, room);
}
int bridge_base_alloc(uint64_t address, uint64_t* base, size_t* bytes, char* message, size_t room) {
  return outcome(
      [&] {
        *base =
            reinterpret_cast<uint64_t>(entries.base_alloc(reinterpret_cast<void*>(address), bytes));
      },
      message, room);
}
int bridge_alloc(size_t bytes, int on, uint64_t* address, char* message, size_t room) {
  return outcome([&] { *address = reinterpret_cast<uint64_t>(entries.alloc(bytes, on, stream)); },
                 message, room);
}
int bridge_reset(char* message, size_t room) {
  return outcome([&] { entries.reset(); }, message, room);
}
int bridge_init(int devices, char* message, size_t room) {
  return outcome([&] { entries.init(devices); }, message, room);
}

}  // extern "C"
