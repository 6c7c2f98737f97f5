// The fake machine: devices, reservations, handles, mappings, and the log of broken rules.
//
// One instance for the process, never destroyed (callers may come from static destructors), all of
// it guarded by `mutex`. Members are open to the files that implement the API; what must hold
// between them is kept by the few functions here.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backing.h"
#include "cuda_api.h"
#include "injector.h"
#include "streams.h"

namespace fake {

inline constexpr int kMaxDevices = 8;
inline constexpr std::size_t kHostPage = 4096;

using Lock = std::unique_lock<std::mutex>;

struct Config {
  std::size_t device_bytes = std::size_t{1} << 30;
  std::size_t granularity = std::size_t{2} << 20;
  int devices = 2;
  bool poison = true;
  bool elide = false;
  unsigned watchdog_ms = 20000;
  Mode stream_mode = Mode::kImmediate;
};

struct Device {
  int retains = 0;  // of its primary context
  std::size_t used_bytes = 0;
};

struct Reservation {
  std::size_t size;
  bool vmm;  // false: made by cuMemAlloc, out of bounds for the cuMem* mapping calls
  void* raw;
  std::size_t raw_size;
};

struct Handle {
  std::size_t size;
  int device;
  std::uint64_t offset;  // of its extent in the backing
  std::uint64_t references = 1;
  std::uint64_t mappings = 0;
};

struct Mapping {
  std::size_t size;
  CUmemGenericAllocationHandle handle;
  std::array<unsigned char, kMaxDevices> access = {};  // CUmemAccess_flags by device
};

struct Counters {
  std::uint64_t bytes_peak = 0, bytes_created = 0, handles_peak = 0, mappings_peak = 0;
  std::uint64_t launches = 0, copies = 0, copied_bytes = 0, memsets = 0, memset_bytes = 0;
  std::uint64_t access_regrants = 0;
};

class World {
 public:
  using Mappings = std::map<CUdeviceptr, Mapping>;

  static World& get();

  std::mutex mutex;
  Config config;
  bool initialized = false;
  std::uint64_t generation = 1;  // counts resets
  std::array<Device, kMaxDevices> devices;
  std::map<CUdeviceptr, Reservation> reservations;
  std::unordered_map<CUmemGenericAllocationHandle, Handle> handles;
  Mappings mappings;
  std::map<std::uintptr_t, std::size_t> host_allocations;
  std::vector<std::string> violations;
  Counters counters;
  Backing backing;
  Injector injector;
  Streams streams;
  // cuMemCreate fails once bytes_created passes this.
  std::uint64_t oom_at = UINT64_MAX;

  // The device whose context is current on this thread; -1: none.
  int current_device();
  void set_current_device(int device);
  CUstreamCaptureMode& capture_mode();
  bool valid_device(int device) const { return device >= 0 && device < config.devices; }

  // Creates a handle with one reference, or returns CUDA_ERROR_OUT_OF_MEMORY.
  CUresult create_handle(int device, std::size_t size, CUmemGenericAllocationHandle* out);
  // Destroys the handle if neither a reference nor a mapping is left.
  void collect(CUmemGenericAllocationHandle handle);

  CUresult reserve(std::size_t size, std::size_t alignment, CUdeviceptr hint, bool vmm,
                   CUdeviceptr* out);
  void unreserve(CUdeviceptr base);
  // The reservation that holds all of the range; null: none.
  const Reservation* reservation_of(CUdeviceptr start, std::size_t size) const;

  CUresult map(CUdeviceptr start, std::size_t size, CUmemGenericAllocationHandle handle);
  // Removes whole mappings [first, last), which lie side by side.
  CUresult unmap(Mappings::iterator first, Mappings::iterator last);
  CUresult set_access(Mappings::iterator first, Mappings::iterator last, int device,
                      CUmemAccess_flags flags);
  // The first mapping that ends after `address`.
  Mappings::iterator mapping_at(CUdeviceptr address);
  // The mappings that make up the range exactly, without holes and cut at neither end; an empty
  // pair of equal iterators where there are none such.
  std::pair<Mappings::iterator, Mappings::iterator> whole_mappings(CUdeviceptr start,
                                                                   std::size_t size);
  // Empty if every byte is mapped with access for `device` (-1: for any device), else what is
  // wrong, for a message.
  std::string inaccessible(const Range& range, int device, bool write = true);

  void violate(std::string what);
  // The project's rule, not CUDA's: nothing changes under work that is not finished.
  void check_unused(const char* call, CUdeviceptr start, std::size_t size);
  std::vector<std::string> leaks() const;
  bool objects_exist() const;
  std::size_t bytes_live() const;
  void reset();

 private:
  World() = default;
  std::uint64_t next_handle_ = 0xface0000;
};

}  // namespace fake
