// The last operations of an allocator, for traces and snapshots. Off, it costs one test.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "block.h"

namespace vattn {

enum class EventKind : std::uint8_t {
  kAlloc,
  kFreeRequested,  // the program gave it back
  kFreeCompleted,  // and no stream uses it any more
  kMap,
  kUnmap,
  kOutOfMemory,
  kPause,
  kResume,
};

struct Event {
  EventKind kind;
  std::uint32_t tag;
  Address address;
  std::size_t bytes;  // as asked for at kAlloc and kFree..., whole pages at kMap and kUnmap
  Stream stream;
  std::int64_t time_us;  // since 1970
};

class Recorder {
 public:
  // Keeps the last `max_events`; 0 stops and forgets.
  void start(std::size_t max_events) {
    events_.clear();
    events_.shrink_to_fit();
    max_events_ = max_events;
    next_ = 0;
    dropped_ = 0;
  }
  bool on() const noexcept { return max_events_ != 0; }

  void note(EventKind kind, std::uint32_t tag, Address address, std::size_t bytes, Stream stream) {
    if (max_events_ == 0) return;
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const Event event{kind,    tag,
                      address, bytes,
                      stream,  std::chrono::duration_cast<std::chrono::microseconds>(now).count()};
    if (events_.size() < max_events_) {
      events_.push_back(event);
      return;
    }
    events_[next_] = event;
    next_ = (next_ + 1) % max_events_;
    ++dropped_;
  }

  std::uint64_t dropped() const noexcept { return dropped_; }
  // Oldest first.
  std::vector<Event> events() const {
    std::vector<Event> out(events_.begin() + static_cast<std::ptrdiff_t>(next_), events_.end());
    out.insert(out.end(), events_.begin(), events_.begin() + static_cast<std::ptrdiff_t>(next_));
    return out;
  }

 private:
  std::vector<Event> events_;
  std::size_t max_events_ = 0;
  std::size_t next_ = 0;
  std::uint64_t dropped_ = 0;
};

}  // namespace vattn
