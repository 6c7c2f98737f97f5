// Virtual memory of an NVIDIA GPU, by the CUDA driver API's virtual memory management (cuMem*).
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_api.h"
#include "cuda_driver_context.h"
#include "cuda_driver_ledger.h"
#include "driver.h"

namespace vattn {

struct CudaOptions {
  int device = 0;
  // The driver library; empty: VATTN_LIBCUDA, or libcuda.so.1.
  std::string libcuda;
  // Tests only: the CPU can read and write the memory (of the fake), so tensors over it are the
  // CPU's.
  bool host_accessible = false;
};

class CudaDriver final : public Driver {
 public:
  // Throws DriverError if there is no driver library, no device or no virtual memory management,
  // std::invalid_argument for a device index that does not exist.
  explicit CudaDriver(const CudaOptions& options);
  // The caller has released and destroyed all that it made here.
  ~CudaDriver() override;

  std::string name() const override { return "cuda:" + std::to_string(device_); }
  std::size_t granularity() const noexcept override { return granularity_; }
  std::size_t default_page_bytes() const noexcept override { return granularity_; }
  DlpackDevice dlpack_device() const noexcept override;
  // What was another program's, or this one's before, is what a fresh page may show.
  bool fresh_pages_are_zero() const noexcept override { return false; }
  MemoryInfo memory_info() const override;
  std::size_t physical_bytes() const override { return ledger_.page_bytes_total(); }

  Stream create_stream() override;
  void synchronize(Stream stream) override;
  void synchronize_all() override;
  void destroy_stream(Stream stream) override;

 private:
  // Around every call: the context, and where CUDA could object to a capture elsewhere that, too.
  struct Entry;
  struct RelaxedEntry;

  Address do_reserve(std::size_t bytes, std::size_t alignment) override;
  void do_release(Address base, std::size_t bytes) override;
  void do_create(std::span<PageHandle> out, std::size_t page_bytes, Address home) override;
  void do_destroy(std::span<const PageHandle> pages, std::size_t page_bytes,
                  std::size_t& destroyed) override;
  void do_map(Address base, std::span<const PageHandle> pages, std::size_t page_bytes) override;
  void do_set_access(Address base, std::size_t bytes) override;
  void do_unmap(Address base, std::size_t bytes) override;
  void do_copy(Address dst, Address src, std::size_t bytes, Stream stream) override;
  void do_fill(Address dst, std::uint8_t value, std::size_t bytes, Stream stream) override;
  void do_copy_to_host(void* host, Address src, std::size_t bytes, Stream stream) override;
  void do_copy_from_host(Address dst, const void* host, std::size_t bytes, Stream stream) override;
  EventHandle do_record(Stream stream) override;
  bool do_query(EventHandle event) override;
  void do_wait(EventHandle event) override;
  void do_stream_wait(Stream stream, EventHandle event) override;
  void do_destroy_event(EventHandle event) noexcept override;

  CUmemAllocationProp page_properties() const noexcept;
  void release_created(std::span<const PageHandle> pages) noexcept;
  CUevent take_event();
  void give_event(CUevent event) noexcept;

  const std::shared_ptr<const CudaApi> api_;
  const int device_;
  const bool host_accessible_;
  PrimaryContext context_;
  std::size_t granularity_ = 0;
  CudaLedger ledger_;

  // Events that nobody uses, for the next record(): the steady state creates none.
  std::mutex events_mutex_;
  std::vector<CUevent> free_events_;
};

std::shared_ptr<Driver> make_cuda_driver(const CudaOptions& options);

}  // namespace vattn
