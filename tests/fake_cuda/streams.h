// Streams and events: queues of work, and marks that say which of it is done.
//
// Knows nothing of memory: a piece of work is a function, the ranges that it may touch, and the
// marks that must be done before it. Everything here runs under the world's mutex.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_api.h"

namespace fake {

enum class Mode { kImmediate, kHeld, kLazy };  // control.h's FAKE_IMMEDIATE, ...

struct Stream;

// Done when the piece of work that owns it is done. Events, waits and synchronizes hold marks, so
// they outlive streams and events that are destroyed early, as CUDA allows.
struct Mark {
  bool done = false;
  std::weak_ptr<Stream> stream;
};
using MarkPtr = std::shared_ptr<Mark>;

struct Range {
  CUdeviceptr start;
  std::size_t size;
  bool overlaps(const Range& other) const {
    return start < other.start + other.size && other.start < start + size;
  }
};

struct Work {
  std::string name;
  std::vector<Range> ranges;
  std::vector<MarkPtr> after;
  std::function<void()> run;  // may be empty
  MarkPtr done;
};

struct Stream {
  CUstream handle = nullptr;  // null for the implicit ones
  int device = 0;
  bool legacy = false;
  bool blocking = true;  // ordered against the legacy stream
  bool destroyed = false;
  bool capturing = false;
  Mode mode = Mode::kImmediate;
  std::deque<Work> queue;
  MarkPtr last;  // of the latest work; null: there was none

  bool idle() const { return queue.empty(); }
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  int device = 0;
  bool captured = false;  // last recorded in a capturing stream
  MarkPtr last;           // null: never recorded, which counts as done
  bool done() const { return !last || last->done; }
};

class Streams {
 public:
  // Handles are never reused, so that every use after destroy is found.
  CUstream create(int device, unsigned flags);
  // Work that is queued is still done; the handle is invalid from now on.
  bool destroy(CUstream handle);
  // Null if unknown. `device` is the one whose implicit streams 0, 1 and 2 stand for. A destroyed
  // stream with queued work is found only if `even_destroyed`.
  StreamPtr find(CUstream handle, int device, bool even_destroyed = false);
  std::vector<CUstream> handles() const;

  CUevent create_event(int device);
  bool destroy_event(CUevent handle) { return events_.erase(handle) > 0; }
  Event* find_event(CUevent handle);

  // Queues `work` behind all that is in its stream, and runs what can run.
  MarkPtr submit(const StreamPtr& stream, Work work);
  void set_mode(const StreamPtr& stream, Mode mode);
  int step(const StreamPtr& stream, int count);
  // What a synchronize on `stream` waits for.
  std::vector<MarkPtr> outstanding(const Stream& stream) const;
  // What a synchronize on `device` waits for.
  std::vector<MarkPtr> outstanding(int device) const;
  // Runs the lazy streams as far as `mark` needs. Held ones stay where they are.
  void force(const MarkPtr& mark);

  // The unfinished work that may touch `range`; null: none.
  const Work* user_of(const Range& range) const;
  std::size_t pending() const;
  bool any_capturing() const;
  std::size_t created() const;
  std::size_t events() const { return events_.size(); }

  // Forgets everything; marks of dropped work count as done, so that no waiter stays behind.
  void clear();

  Mode default_mode = Mode::kImmediate;
  std::condition_variable changed;  // some work is done

 private:
  using Key = std::pair<int, std::uint64_t>;  // device; 0 (legacy) or a thread

  StreamPtr implicit(int device, bool legacy);
  StreamPtr add(int device, bool legacy, bool blocking);
  void run_front(Stream& stream);
  void pump();

  std::vector<StreamPtr> all_;
  std::map<Key, StreamPtr> implicit_;
  std::map<CUevent, Event> events_;
  std::uintptr_t next_handle_ = 0x5eed0000;
};

}  // namespace fake
