#include "call_trace.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace vattn {

std::int64_t CallTrace::now_ns() noexcept {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);  // what Python's perf_counter_ns reads, too
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

std::int32_t CallTrace::thread_id() noexcept {
  static thread_local const std::int32_t id = ::gettid();
  return id;
}

void CallTrace::start(std::size_t most) {
  if (most == 0) throw std::invalid_argument("a trace of 0 calls keeps nothing; give 1 or more");
  const std::lock_guard lock(mutex_);
  if (ring_ != nullptr) {
    throw std::invalid_argument(
        "the driver's calls are being traced already; stop that trace before the next");
  }
  // Not initialized: the system gives memory only for what is written.
  ring_ = std::unique_ptr<CallRecord[]>(new CallRecord[most]);
  most_ = most;
  added_ = 0;
  on_.store(true, std::memory_order_relaxed);
}

CallTraceResult CallTrace::stop() {
  const std::lock_guard lock(mutex_);
  if (ring_ == nullptr) throw std::invalid_argument("no trace of the driver's calls is running");
  on_.store(false, std::memory_order_relaxed);
  const std::unique_ptr<CallRecord[]> ring = std::move(ring_);
  const std::size_t kept = static_cast<std::size_t>(std::min<std::uint64_t>(added_, most_));
  CallTraceResult out;
  out.dropped = added_ - kept;
  out.calls.reserve(kept);
  for (std::uint64_t i = out.dropped; i < added_; ++i) out.calls.push_back(ring[i % most_]);
  return out;
}

void CallTrace::add(const CallRecord& record) noexcept {
  const std::lock_guard lock(mutex_);
  if (ring_ == nullptr) return;  // it ended while the call ran
  ring_[added_++ % most_] = record;
}

}  // namespace vattn
