#include "state.h"

#include <algorithm>

#include "text.h"

namespace fake {
namespace {

struct ThreadState {
  std::uint64_t generation = 0;
  int device = -1;
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
};

// A reset makes every thread forget its context without touching that thread.
ThreadState& thread_state(std::uint64_t generation) {
  // Static TLS: memory that the loader allocates at first use looks like a race to TSan.
  __attribute__((tls_model("initial-exec"))) thread_local ThreadState state;
  if (state.generation != generation) state = ThreadState{generation};
  return state;
}

std::size_t round_up(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}

constexpr std::size_t kMaxViolations = 1000;

}  // namespace

World& World::get() {
  static World* world = new World;
  return *world;
}

int World::current_device() { return thread_state(generation).device; }
void World::set_current_device(int device) { thread_state(generation).device = device; }
CUstreamCaptureMode& World::capture_mode() { return thread_state(generation).mode; }

CUresult World::create_handle(int device, std::size_t size, CUmemGenericAllocationHandle* out) {
  Device& owner = devices[static_cast<std::size_t>(device)];
  if (owner.used_bytes > config.device_bytes || size > config.device_bytes - owner.used_bytes) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  if (counters.bytes_created + size > oom_at) return CUDA_ERROR_OUT_OF_MEMORY;
  std::uint64_t offset = 0;
  if (!backing.allocate(size, config.poison, &offset)) {
    violate(text("the host has no memory for %zu bytes of fake device memory", size));
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  next_handle_ += 0x10;
  handles.emplace(next_handle_, Handle{size, device, offset});
  owner.used_bytes += size;
  counters.bytes_created += size;
  counters.bytes_peak = std::max<std::uint64_t>(counters.bytes_peak, bytes_live());
  counters.handles_peak = std::max<std::uint64_t>(counters.handles_peak, handles.size());
  *out = next_handle_;
  return CUDA_SUCCESS;
}

void World::collect(CUmemGenericAllocationHandle handle) {
  const auto found = handles.find(handle);
  if (found == handles.end()) return;
  const Handle& owner = found->second;
  if (owner.references > 0 || owner.mappings > 0) return;
  devices[static_cast<std::size_t>(owner.device)].used_bytes -= owner.size;
  backing.discard(owner.offset, owner.size);
  handles.erase(found);
}

CUresult World::reserve(std::size_t size, std::size_t alignment, CUdeviceptr hint, bool vmm,
                        CUdeviceptr* out) {
  if (hint != 0) {
    void* raw = Backing::reserve(size, hint);
    if (raw && reinterpret_cast<CUdeviceptr>(raw) == hint) {
      reservations[hint] = Reservation{size, vmm, raw, size};
      *out = hint;
      return CUDA_SUCCESS;
    }
    if (raw) Backing::release(raw, size);
  }
  // The slack that alignment leaves on both sides stays reserved: neighbours never touch, so an
  // overrun lands on nobody's memory.
  const std::size_t raw_size = size + 2 * alignment;
  if (raw_size < size) return CUDA_ERROR_OUT_OF_MEMORY;
  void* raw = Backing::reserve(raw_size, 0);
  if (!raw) return CUDA_ERROR_OUT_OF_MEMORY;
  const CUdeviceptr base = round_up(reinterpret_cast<CUdeviceptr>(raw) + 1, alignment);
  reservations[base] = Reservation{size, vmm, raw, raw_size};
  *out = base;
  return CUDA_SUCCESS;
}

void World::unreserve(CUdeviceptr base) {
  const Reservation& reservation = reservations.at(base);
  Backing::release(reservation.raw, reservation.raw_size);
  reservations.erase(base);
}

const Reservation* World::reservation_of(CUdeviceptr start, std::size_t size) const {
  auto after = reservations.upper_bound(start);
  if (after == reservations.begin()) return nullptr;
  const auto& [base, reservation] = *--after;
  const std::size_t offset = start - base;
  if (offset >= reservation.size || size > reservation.size - offset) return nullptr;
  return &reservation;
}

CUresult World::map(CUdeviceptr start, std::size_t size, CUmemGenericAllocationHandle handle) {
  Handle& owner = handles.at(handle);
  if (!backing.map(start, size, owner.offset)) {
    violate("the host refused a mapping: vm.max_map_count?");
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  mappings.emplace(start, Mapping{size, handle});
  ++owner.mappings;
  counters.mappings_peak = std::max<std::uint64_t>(counters.mappings_peak, mappings.size());
  return CUDA_SUCCESS;
}

CUresult World::unmap(Mappings::iterator first, Mappings::iterator last) {
  const CUdeviceptr start = first->first;
  const auto& [last_start, last_mapping] = *std::prev(last);
  if (!backing.unmap(start, last_start + last_mapping.size - start)) {
    violate("the host refused to unmap: vm.max_map_count?");
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  while (first != last) {
    const CUmemGenericAllocationHandle handle = first->second.handle;
    first = mappings.erase(first);
    --handles.at(handle).mappings;
    collect(handle);
  }
  return CUDA_SUCCESS;
}

CUresult World::set_access(Mappings::iterator first, Mappings::iterator last, int device,
                           CUmemAccess_flags flags) {
  const std::size_t index = static_cast<std::size_t>(device);
  for (auto it = first; it != last; ++it) {
    Mapping& mapping = it->second;
    if (mapping.access[index] != 0 && flags != 0) ++counters.access_regrants;
    mapping.access[index] = static_cast<unsigned char>(flags);
  }
  // The CPU may do what any device may. Neighbours that agree are one mprotect.
  for (auto it = first; it != last;) {
    const auto rights = [](const Mapping& m) {
      return *std::max_element(m.access.begin(), m.access.end());
    };
    const unsigned char right = rights(it->second);
    const CUdeviceptr start = it->first;
    CUdeviceptr end = start;
    for (; it != last && rights(it->second) == right; ++it) end = it->first + it->second.size;
    if (!backing.protect(start, end - start, right != 0, right == 3)) {
      violate("the host refused to set access: vm.max_map_count?");
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
  }
  return CUDA_SUCCESS;
}

World::Mappings::iterator World::mapping_at(CUdeviceptr address) {
  auto it = mappings.upper_bound(address);
  if (it != mappings.begin()) {
    const auto before = std::prev(it);
    if (before->first + before->second.size > address) return before;
  }
  return it;
}

std::pair<World::Mappings::iterator, World::Mappings::iterator> World::whole_mappings(
    CUdeviceptr start, std::size_t size) {
  const auto none = std::make_pair(mappings.end(), mappings.end());
  const auto first = mappings.find(start);
  CUdeviceptr at = start;
  auto last = first;
  while (last != mappings.end() && last->first == at && at < start + size) {
    at += last->second.size;
    ++last;
  }
  return at == start + size && first != last ? std::make_pair(first, last) : none;
}

std::string World::inaccessible(const Range& range, int device, bool write) {
  const CUdeviceptr end = range.start + range.size;
  auto it = mapping_at(range.start);
  for (CUdeviceptr at = range.start; at < end; ++it) {
    if (it == mappings.end() || it->first > at) {
      return text("0x%llx is not mapped", static_cast<unsigned long long>(at));
    }
    const auto& access = it->second.access;
    const unsigned char right = device < 0 ? *std::max_element(access.begin(), access.end())
                                           : access[static_cast<std::size_t>(device)];
    if (right == 0 || (write && right != 3)) {
      return text("0x%llx is mapped without access", static_cast<unsigned long long>(at));
    }
    at = it->first + it->second.size;
  }
  return {};
}

void World::violate(std::string what) {
  if (violations.size() < kMaxViolations) violations.push_back(std::move(what));
}

void World::check_unused(const char* call, CUdeviceptr start, std::size_t size) {
  if (const Work* user = streams.user_of(Range{start, size})) {
    violate(text("%s(0x%llx, %zu) while unfinished %s may use the range", call, start, size,
                 user->name.c_str()));
  }
}

std::vector<std::string> World::leaks() const {
  std::vector<std::string> lines;
  for (const auto& [base, r] : reservations) {
    lines.push_back(
        text("%s 0x%llx, %zu bytes", r.vmm ? "reservation" : "cuMemAlloc", base, r.size));
  }
  for (const auto& [start, m] : mappings) {
    const bool vmm = reservation_of(start, m.size)->vmm;
    if (vmm) lines.push_back(text("mapping 0x%llx, %zu bytes of 0x%llx", start, m.size, m.handle));
  }
  for (const auto& [handle, h] : handles) {
    if (h.references == 0) continue;  // its mappings are the leak
    lines.push_back(text("handle 0x%llx, %zu bytes, %llu references", handle, h.size,
                         static_cast<unsigned long long>(h.references)));
  }
  for (const auto& [base, size] : host_allocations) {
    lines.push_back(text("cuMemHostAlloc 0x%zx, %zu bytes", base, size));
  }
  for (const CUstream stream : streams.handles()) {
    lines.push_back(text("stream %p", static_cast<void*>(stream)));
  }
  if (streams.events() > 0) lines.push_back(text("%zu events", streams.events()));
  for (int device = 0; device < kMaxDevices; ++device) {
    const int retains = devices[static_cast<std::size_t>(device)].retains;
    if (retains > 0)
      lines.push_back(text("context of device %d, retained %d times", device, retains));
  }
  return lines;
}

bool World::objects_exist() const { return !leaks().empty() || !handles.empty(); }

std::size_t World::bytes_live() const {
  std::size_t bytes = 0;
  for (const Device& device : devices) bytes += device.used_bytes;
  return bytes;
}

void World::reset() {
  streams.clear();
  streams.default_mode = config.stream_mode;
  for (const auto& [base, reservation] : reservations) {
    Backing::release(reservation.raw, reservation.raw_size);
  }
  for (const auto& [base, size] : host_allocations) {
    Backing::release(reinterpret_cast<void*>(base), size);
  }
  reservations.clear();
  mappings.clear();
  handles.clear();
  host_allocations.clear();
  backing.clear();
  devices = {};
  violations.clear();
  counters = {};
  injector = {};
  initialized = false;
  oom_at = UINT64_MAX;
  ++generation;
}

}  // namespace fake
