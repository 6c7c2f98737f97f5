// What a driver was asked for and when, for event traces: the last calls, in memory set aside when
// a trace begins.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace vattn {

// One call of a driver. Times are nanoseconds of CLOCK_MONOTONIC.
struct CallRecord {
  std::int64_t begin_ns;
  std::int64_t end_ns;
  std::uint64_t bytes;  // of the range or the pages; 0 for events
  std::uint32_t pages;  // 0 where the call is given a range only
  std::uint32_t calls;  // of the underlying API, as the driver counts them
  std::int32_t thread;  // of the operating system
  std::uint8_t op;      // an Op
  bool failed;          // it threw
};

struct CallTraceResult {
  std::vector<CallRecord> calls;  // the last ones, in the order in which they ended
  std::uint64_t dropped = 0;      // how many before them there was no room for
};

// A ring of records. Off, it costs who asks `on()` one relaxed load. Thread-safe.
class CallTrace {
 public:
  bool on() const noexcept { return on_.load(std::memory_order_relaxed); }

  // Keeps the last `most` calls that end from now on. Throws std::invalid_argument if `most` is 0
  // or a trace is running, std::bad_alloc if there is no memory for them.
  void start(std::size_t most);
  // Ends the trace and gives what it has. Throws std::invalid_argument if none is running.
  CallTraceResult stop();

  void add(const CallRecord& record) noexcept;

  static std::int64_t now_ns() noexcept;
  static std::int32_t thread_id() noexcept;

 private:
  std::atomic<bool> on_{false};
  std::mutex mutex_;  // taken only while a trace runs
  std::unique_ptr<CallRecord[]> ring_;
  std::size_t most_ = 0;
  std::uint64_t added_ = 0;
};

}  // namespace vattn
