#include "streams.h"

#include <algorithm>
#include <functional>
#include <thread>

namespace fake {
namespace {

bool ready(const Work& work) {
  return std::all_of(work.after.begin(), work.after.end(),
                     [](const MarkPtr& m) { return m->done; });
}

bool pending_mark(const MarkPtr& mark) { return mark && !mark->done; }

}  // namespace

StreamPtr Streams::add(int device, bool legacy, bool blocking) {
  auto stream = std::make_shared<Stream>();
  stream->device = device;
  stream->legacy = legacy;
  stream->blocking = blocking;
  stream->mode = default_mode;
  all_.push_back(stream);
  return stream;
}

CUstream Streams::create(int device, unsigned flags) {
  const StreamPtr stream = add(device, false, (flags & CU_STREAM_NON_BLOCKING) == 0);
  next_handle_ += 0x10;
  stream->handle = reinterpret_cast<CUstream>(next_handle_);
  return stream->handle;
}

bool Streams::destroy(CUstream handle) {
  const StreamPtr stream = find(handle, 0);
  if (!stream || !stream->handle) return false;
  stream->destroyed = true;
  pump();  // drops it if it is idle
  return true;
}

StreamPtr Streams::implicit(int device, bool legacy) {
  // Which thread is asking, as a number that std::map can order.
  const std::uint64_t thread = std::hash<std::thread::id>()(std::this_thread::get_id()) | 1;
  StreamPtr& stream = implicit_[Key{device, legacy ? 0 : thread}];
  if (!stream) stream = add(device, legacy, true);
  return stream;
}

StreamPtr Streams::find(CUstream handle, int device, bool even_destroyed) {
  if (!handle || handle == CU_STREAM_LEGACY) return implicit(device, true);
  if (handle == CU_STREAM_PER_THREAD) return implicit(device, false);
  for (const StreamPtr& stream : all_) {
    if (stream->handle == handle && (even_destroyed || !stream->destroyed)) return stream;
  }
  return nullptr;
}

std::vector<CUstream> Streams::handles() const {
  std::vector<CUstream> handles;
  for (const StreamPtr& stream : all_) {
    if (stream->handle && !stream->destroyed) handles.push_back(stream->handle);
  }
  return handles;
}

CUevent Streams::create_event(int device) {
  next_handle_ += 0x10;
  const auto handle = reinterpret_cast<CUevent>(next_handle_);
  events_[handle].device = device;
  return handle;
}

Event* Streams::find_event(CUevent handle) {
  const auto found = events_.find(handle);
  return found == events_.end() ? nullptr : &found->second;
}

MarkPtr Streams::submit(const StreamPtr& stream, Work work) {
  // The legacy stream waits for all blocking streams, and they wait for it.
  for (const StreamPtr& other : all_) {
    if (other == stream || other->device != stream->device || !pending_mark(other->last)) continue;
    const bool ordered = stream->legacy ? other->blocking : other->legacy && stream->blocking;
    if (ordered) work.after.push_back(other->last);
  }
  const auto mark = std::make_shared<Mark>();
  mark->stream = stream;
  work.done = mark;
  stream->last = mark;
  stream->queue.push_back(std::move(work));
  pump();
  return mark;
}

void Streams::set_mode(const StreamPtr& stream, Mode mode) {
  stream->mode = mode;
  pump();
  changed.notify_all();  // a blocked thread may now force what was held
}

int Streams::step(const StreamPtr& stream, int count) {
  int ran = 0;
  while (ran < count && !stream->idle() && ready(stream->queue.front())) {
    run_front(*stream);
    ++ran;
  }
  pump();
  return ran;
}

std::vector<MarkPtr> Streams::outstanding(const Stream& stream) const {
  std::vector<MarkPtr> marks;
  if (pending_mark(stream.last)) marks.push_back(stream.last);
  if (!stream.legacy) return marks;
  for (const StreamPtr& other : all_) {
    const bool ordered = other->blocking && other->device == stream.device;
    if (ordered && pending_mark(other->last)) marks.push_back(other->last);
  }
  return marks;
}

std::vector<MarkPtr> Streams::outstanding(int device) const {
  std::vector<MarkPtr> marks;
  for (const StreamPtr& stream : all_) {
    if (stream->device == device && pending_mark(stream->last)) marks.push_back(stream->last);
  }
  return marks;
}

void Streams::force(const MarkPtr& mark) {
  const StreamPtr stream = mark->stream.lock();
  if (mark->done || !stream) return;
  while (!mark->done && !stream->idle()) {
    // By value: an immediate stream may run, and drop, its front while others are forced.
    const std::vector<MarkPtr> after = stream->queue.front().after;
    for (const MarkPtr& needed : after) force(needed);
    if (mark->done || stream->idle()) break;  // an immediate stream ran by itself
    if (stream->mode != Mode::kLazy || !ready(stream->queue.front())) return;
    run_front(*stream);
  }
  pump();
}

void Streams::run_front(Stream& stream) {
  Work work = std::move(stream.queue.front());
  stream.queue.pop_front();
  if (work.run) work.run();
  work.done->done = true;
  changed.notify_all();
}

void Streams::pump() {
  for (bool progress = true; progress;) {
    progress = false;
    for (const StreamPtr& stream : all_) {
      while (stream->mode == Mode::kImmediate && !stream->idle() && ready(stream->queue.front())) {
        run_front(*stream);
        progress = true;
      }
    }
  }
  std::erase_if(all_, [](const StreamPtr& stream) { return stream->destroyed && stream->idle(); });
}

const Work* Streams::user_of(const Range& range) const {
  for (const StreamPtr& stream : all_) {
    for (const Work& work : stream->queue) {
      for (const Range& used : work.ranges) {
        if (used.overlaps(range)) return &work;
      }
    }
  }
  return nullptr;
}

std::size_t Streams::pending() const {
  std::size_t count = 0;
  for (const StreamPtr& stream : all_) count += stream->queue.size();
  return count;
}

bool Streams::any_capturing() const {
  return std::any_of(all_.begin(), all_.end(), [](const StreamPtr& s) { return s->capturing; });
}

std::size_t Streams::created() const { return handles().size(); }

void Streams::clear() {
  for (const StreamPtr& stream : all_) {
    for (const Work& work : stream->queue) work.done->done = true;
    stream->queue.clear();
  }
  all_.clear();
  implicit_.clear();
  events_.clear();
  changed.notify_all();
}

}  // namespace fake
