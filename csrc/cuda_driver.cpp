#include "cuda_driver.h"

#include <array>

namespace vattn {
namespace {

// More events than steps and prefetches that are ever in flight; beyond it they are destroyed.
constexpr std::size_t kMaxFreeEvents = 256;

CallArg address_arg(const char* name, std::uint64_t value) { return {name, value, true}; }

CUstream to_stream(Stream stream) { return reinterpret_cast<CUstream>(stream); }
CUevent to_event(EventHandle event) { return reinterpret_cast<CUevent>(event); }

// Initializes CUDA and checks the index before anything is retained.
CUdevice open_device(const CudaApi& api, int index) {
  const CUresult code = api.cuInit(0);
  if (code == CUDA_ERROR_NO_DEVICE) {
    throw DriverError("cuInit", static_cast<int>(code),
                      api.describe(code) +
                          "; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU "
                          "(device=\"cpu\")");
  }
  api.check(code, "cuInit");
  int devices = 0;
  api.check(api.cuDeviceGetCount(&devices), "cuDeviceGetCount");
  if (index < 0 || index >= devices) {
    throw std::invalid_argument("there is no CUDA device " + std::to_string(index) +
                                ": this process sees " + std::to_string(devices) +
                                ", numbered from 0; check CUDA_VISIBLE_DEVICES");
  }
  CUdevice device = 0;
  api.check(api.cuDeviceGet(&device, index), "cuDeviceGet",
            {{"ordinal", static_cast<std::uint64_t>(index)}});
  int has_vmm = 0;
  api.check(api.cuDeviceGetAttribute(
                &has_vmm, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device),
            "cuDeviceGetAttribute", {{"device", static_cast<std::uint64_t>(index)}});
  if (has_vmm == 0) {
    std::array<char, 128> name{};
    api.cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, device);
    throw DriverError("cuDeviceGetAttribute", static_cast<int>(CUDA_ERROR_NOT_SUPPORTED),
                      "device " + std::to_string(index) + " (" + name.data() +
                          ") has no virtual memory management (cuMemMap), as under some "
                          "virtualization; use another device or the CPU (device=\"cpu\")");
  }
  return device;
}

}  // namespace

struct CudaDriver::Entry {
  explicit Entry(const CudaDriver& driver) : context(*driver.api_, driver.context_.get()) {}
  ContextScope context;
};

struct CudaDriver::RelaxedEntry {
  explicit RelaxedEntry(const CudaDriver& driver)
      : context(*driver.api_, driver.context_.get()), relaxed(*driver.api_) {}
  ContextScope context;
  RelaxedCapture relaxed;
};

CudaDriver::CudaDriver(const CudaOptions& options)
    : api_(CudaApi::load(options.libcuda)),
      device_(options.device),
      host_accessible_(options.host_accessible),
      context_(*api_, open_device(*api_, options.device)) {
  free_events_.reserve(kMaxFreeEvents);  // so that giving one back cannot fail
  const CUmemAllocationProp properties = page_properties();
  api_->check(api_->cuMemGetAllocationGranularity(&granularity_, &properties,
                                                  CU_MEM_ALLOC_GRANULARITY_MINIMUM),
              "cuMemGetAllocationGranularity", {{"device", static_cast<std::uint64_t>(device_)}});
}

CudaDriver::~CudaDriver() {
  if (!usable()) {
    context_.abandon();
    return;
  }
  try {
    const RelaxedEntry entry(*this);
    for (const CUevent event : free_events_) api_->cuEventDestroy(event);
  } catch (const DriverError&) {
    // The driver is shutting down or the context is lost: the events went with it.
  }
}

DlpackDevice CudaDriver::dlpack_device() const noexcept {
  constexpr int kDlCpu = 1, kDlCuda = 2;
  return host_accessible_ ? DlpackDevice{kDlCpu, 0} : DlpackDevice{kDlCuda, device_};
}

MemoryInfo CudaDriver::memory_info() const {
  ensure_usable();
  const RelaxedEntry entry(*this);
  MemoryInfo info{};
  api_->check(api_->cuMemGetInfo(&info.free_bytes, &info.total_bytes), "cuMemGetInfo");
  return info;
}

CUmemAllocationProp CudaDriver::page_properties() const noexcept {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device_;
  return properties;
}

// Reserve ----------------------------------------------------------------------------------------

Address CudaDriver::do_reserve(std::size_t bytes, std::size_t alignment) {
  const RelaxedEntry entry(*this);
  CUdeviceptr base = 0;
  count(Op::kReserve, 1);
  api_->check_memory(api_->cuMemAddressReserve(&base, bytes, alignment, 0, 0),
                     "cuMemAddressReserve", {{"bytes", bytes}, {"alignment", alignment}});
  ledger_.add_reservation(base, bytes);
  return base;
}

void CudaDriver::do_release(Address base, std::size_t bytes) {
  const RelaxedEntry entry(*this);
  // Before the call: after it another thread may get the same addresses.
  ledger_.remove_reservation(base, bytes);
  count(Op::kRelease, 1);
  const CUresult code = api_->cuMemAddressFree(base, bytes);
  if (code == CUDA_SUCCESS) return;
  ledger_.add_reservation(base, bytes);
  throw api_->error(code, "cuMemAddressFree", {address_arg("base", base), {"bytes", bytes}});
}

// Pages ------------------------------------------------------------------------------------------

void CudaDriver::do_create(std::span<PageHandle> out, std::size_t page_bytes, Address) {
  const RelaxedEntry entry(*this);
  const CUmemAllocationProp properties = page_properties();
  for (std::size_t i = 0; i < out.size(); ++i) {
    CUmemGenericAllocationHandle handle = 0;
    count(Op::kCreate, 1);
    const CUresult code = api_->cuMemCreate(&handle, page_bytes, &properties, 0);
    if (code != CUDA_SUCCESS) {
      if (!is_fatal(code)) release_created(out.first(i));
      api_->check_memory(code, "cuMemCreate",
                         {{"page_bytes", page_bytes}, {"page", i}, {"of", out.size()}});
    }
    out[i] = handle;
  }
  ledger_.add_pages(out, page_bytes);
}

// Pages of a run that failed; the caller has not seen them. A failure here has nowhere to go: the
// error that led to it is the one to report.
void CudaDriver::release_created(std::span<const PageHandle> pages) noexcept {
  for (const PageHandle page : pages) {
    count(Op::kDestroy, 1);
    api_->cuMemRelease(page);
  }
}

void CudaDriver::do_destroy(std::span<const PageHandle> pages, std::size_t page_bytes,
                            std::size_t& destroyed) {
  const RelaxedEntry entry(*this);
  ledger_.require_pages("destroy", pages, page_bytes);
  for (const PageHandle page : pages) {
    ledger_.remove_page(page, page_bytes);
    count(Op::kDestroy, 1);
    const CUresult code = api_->cuMemRelease(page);
    if (code != CUDA_SUCCESS) {
      ledger_.add_page(page, page_bytes);
      throw api_->error(code, "cuMemRelease",
                        {address_arg("page", page), {"page_bytes", page_bytes}});
    }
    ++destroyed;
  }
}

// Mappings ---------------------------------------------------------------------------------------

void CudaDriver::do_map(Address base, std::span<const PageHandle> pages, std::size_t page_bytes) {
  const RelaxedEntry entry(*this);
  ledger_.add_mapping(base, pages, page_bytes);
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const Address at = base + i * page_bytes;
    count(Op::kMap, 1);
    const CUresult code = api_->cuMemMap(at, page_bytes, 0, pages[i], 0);
    if (code == CUDA_SUCCESS) continue;

    CUresult undone = CUDA_SUCCESS;
    const std::size_t done_bytes = i * page_bytes;
    if (i > 0 && !is_fatal(code)) {
      count(Op::kUnmap, 1);
      undone = api_->cuMemUnmap(base, done_bytes);
    }
    if (undone == CUDA_SUCCESS) {
      ledger_.remove_mapping(base, pages.size() * page_bytes);
    } else {
      // The ledger keeps what is still mapped, so that it can be unmapped later.
      ledger_.remove_mapping(at, (pages.size() - i) * page_bytes);
      throw api_->error(undone, "cuMemUnmap",
                        {address_arg("roll_back_of_map_at", base),
                         {"bytes", done_bytes},
                         {"map_failed_with", static_cast<std::uint64_t>(code)}});
    }
    api_->check_memory(code, "cuMemMap",
                       {address_arg("address", at),
                        {"page_bytes", page_bytes},
                        address_arg("handle", pages[i]),
                        {"page", i},
                        {"of", pages.size()}});
  }
}

void CudaDriver::do_set_access(Address base, std::size_t bytes) {
  const RelaxedEntry entry(*this);
  ledger_.require_mapping("set_access", base, bytes);
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device_;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  count(Op::kSetAccess, 1);
  api_->check_memory(api_->cuMemSetAccess(base, bytes, &access, 1), "cuMemSetAccess",
                     {address_arg("base", base), {"bytes", bytes}});
}

void CudaDriver::do_unmap(Address base, std::size_t bytes) {
  const RelaxedEntry entry(*this);
  ledger_.require_mapping("unmap", base, bytes);
  count(Op::kUnmap, 1);
  api_->check(api_->cuMemUnmap(base, bytes), "cuMemUnmap",
              {address_arg("base", base), {"bytes", bytes}});
  ledger_.remove_mapping(base, bytes);
}

// Streams and events -----------------------------------------------------------------------------
// Work given to a stream is a part of whatever is captured there: no relaxed mode for it.

void CudaDriver::do_copy(Address dst, Address src, std::size_t bytes, Stream stream) {
  const Entry entry(*this);
  count(Op::kCopy, 1);
  api_->check_memory(api_->cuMemcpyDtoDAsync(dst, src, bytes, to_stream(stream)),
                     "cuMemcpyDtoDAsync",
                     {address_arg("dst", dst),
                      address_arg("src", src),
                      {"bytes", bytes},
                      address_arg("stream", stream)});
}

void CudaDriver::do_fill(Address dst, std::uint8_t value, std::size_t bytes, Stream stream) {
  const Entry entry(*this);
  count(Op::kFill, 1);
  api_->check_memory(
      api_->cuMemsetD8Async(dst, value, bytes, to_stream(stream)), "cuMemsetD8Async",
      {address_arg("dst", dst), {"value", value}, {"bytes", bytes}, address_arg("stream", stream)});
}

void CudaDriver::do_copy_to_host(void* host, Address src, std::size_t bytes, Stream stream) {
  const Entry entry(*this);
  count(Op::kCopy, 1);
  api_->check_memory(api_->cuMemcpyDtoHAsync(host, src, bytes, to_stream(stream)),
                     "cuMemcpyDtoHAsync",
                     {address_arg("host", reinterpret_cast<Address>(host)),
                      address_arg("src", src),
                      {"bytes", bytes},
                      address_arg("stream", stream)});
}

void CudaDriver::do_copy_from_host(Address dst, const void* host, std::size_t bytes,
                                   Stream stream) {
  const Entry entry(*this);
  count(Op::kCopy, 1);
  api_->check_memory(api_->cuMemcpyHtoDAsync(dst, host, bytes, to_stream(stream)),
                     "cuMemcpyHtoDAsync",
                     {address_arg("dst", dst),
                      address_arg("host", reinterpret_cast<Address>(host)),
                      {"bytes", bytes},
                      address_arg("stream", stream)});
}

CUevent CudaDriver::take_event() {
  {
    const std::lock_guard lock(events_mutex_);
    if (!free_events_.empty()) {
      const CUevent event = free_events_.back();
      free_events_.pop_back();
      return event;
    }
  }
  // Without time stamps a record costs less. A wait sleeps: it is for threads that have nothing
  // else to do, on machines whose cores are busy.
  CUevent event = nullptr;
  count(Op::kEvent, 1);
  api_->check_memory(api_->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC),
                     "cuEventCreate");
  return event;
}

// An event may be given back before it is done: recording it again is allowed, and what waits for
// the earlier record still does.
void CudaDriver::give_event(CUevent event) noexcept {
  {
    const std::lock_guard lock(events_mutex_);
    if (free_events_.size() < kMaxFreeEvents) {
      free_events_.push_back(event);  // within the reserved capacity
      return;
    }
  }
  try {
    const Entry entry(*this);
    count(Op::kEvent, 1);
    api_->cuEventDestroy(event);
  } catch (const DriverError&) {
    // Without a context there is no event either.
  }
}

EventHandle CudaDriver::do_record(Stream stream) {
  const Entry entry(*this);
  const CUevent event = take_event();
  count(Op::kEvent, 1);
  const CUresult code = api_->cuEventRecord(event, to_stream(stream));
  if (code != CUDA_SUCCESS) {
    give_event(event);
    throw api_->error(code, "cuEventRecord", {address_arg("stream", stream)});
  }
  return reinterpret_cast<EventHandle>(event);
}

bool CudaDriver::do_query(EventHandle event) {
  const RelaxedEntry entry(*this);
  count(Op::kEvent, 1);
  const CUresult code = api_->cuEventQuery(to_event(event));
  if (code == CUDA_ERROR_NOT_READY) return false;
  api_->check(code, "cuEventQuery", {address_arg("event", event)});
  return true;
}

void CudaDriver::do_wait(EventHandle event) {
  const RelaxedEntry entry(*this);
  count(Op::kEvent, 1);
  api_->check(api_->cuEventSynchronize(to_event(event)), "cuEventSynchronize",
              {address_arg("event", event)});
}

void CudaDriver::do_stream_wait(Stream stream, EventHandle event) {
  const Entry entry(*this);
  count(Op::kEvent, 1);
  api_->check(api_->cuStreamWaitEvent(to_stream(stream), to_event(event), 0), "cuStreamWaitEvent",
              {address_arg("stream", stream), address_arg("event", event)});
}

void CudaDriver::do_destroy_event(EventHandle event) noexcept { give_event(to_event(event)); }

Stream CudaDriver::create_stream() {
  ensure_usable();
  const RelaxedEntry entry(*this);
  CUstream stream = nullptr;
  count(Op::kEvent, 1);
  api_->check_memory(api_->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  return reinterpret_cast<Stream>(stream);
}

void CudaDriver::synchronize(Stream stream) {
  ensure_usable();
  const RelaxedEntry entry(*this);
  count(Op::kEvent, 1);
  api_->check(api_->cuStreamSynchronize(to_stream(stream)), "cuStreamSynchronize",
              {address_arg("stream", stream)});
}

void CudaDriver::synchronize_all() {
  ensure_usable();
  const RelaxedEntry entry(*this);
  count(Op::kEvent, 1);
  api_->check(api_->cuCtxSynchronize(), "cuCtxSynchronize");
}

void CudaDriver::destroy_stream(Stream stream) {
  ensure_usable();
  if (stream == 0) return;
  const RelaxedEntry entry(*this);
  count(Op::kEvent, 1);
  api_->check(api_->cuStreamDestroy(to_stream(stream)), "cuStreamDestroy",
              {address_arg("stream", stream)});
}

std::shared_ptr<Driver> make_cuda_driver(const CudaOptions& options) {
  return std::make_shared<CudaDriver>(options);
}

}  // namespace vattn
