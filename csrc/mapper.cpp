#include "mapper.h"

#include <pthread.h>

namespace vattn {

bool Ticket::done() const {
  const std::lock_guard lock(mutex_);
  return done_;
}

void Ticket::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_; });
  if (error_) std::rethrow_exception(error_);
}

bool Ticket::wait_for(std::chrono::microseconds timeout) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, timeout, [&] { return done_; })) return false;
  if (error_) std::rethrow_exception(error_);
  return true;
}

void Ticket::finish(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    error_ = std::move(error);
    done_ = true;
  }
  changed_.notify_all();
}

std::shared_ptr<Ticket> Ticket::finished() {
  auto ticket = std::make_shared<Ticket>();
  ticket->finish(nullptr);
  return ticket;
}

Mapper::Mapper(std::shared_ptr<PagePool> pool) : pool_(std::move(pool)) {
  state_->thread = std::thread([this] { loop(); });
  // Lock order: device, then queue. The pool calls this with the device lock held.
  pool_->on_low([this] { request_refill(); });
}

Mapper::~Mapper() {
  if (pool_->driver().usable()) {
    stop();
  } else {
    static_cast<void>(state_.release());  // see State
  }
}

void Mapper::stop() {
  pool_->on_low(nullptr);
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work.notify_all();
  if (state_->thread.joinable()) state_->thread.join();
}

std::shared_ptr<Ticket> Mapper::submit(std::function<void()> job) {
  pool_->driver().ensure_usable();
  auto ticket = std::make_shared<Ticket>();
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->stopping) {
      throw std::invalid_argument("the mapper has been stopped; make a new pool");
    }
    state_->queue.push_back({std::move(job), ticket});
  }
  state_->work.notify_one();
  return ticket;
}

void Mapper::request_refill() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->refill = true;
  }
  state_->work.notify_one();
}

void Mapper::drain() {
  pool_->driver().ensure_usable();
  std::unique_lock lock(state_->mutex);
  state_->idle.wait(lock,
                    [&] { return state_->queue.empty() && !state_->refill && !state_->busy; });
}

void Mapper::loop() {
  ::pthread_setname_np(::pthread_self(), "vattn-mapper");  // for debuggers, profilers and traces
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  for (;;) {
    s.work.wait(lock, [&] { return s.stopping || s.refill || !s.queue.empty(); });
    if (s.queue.empty() && s.stopping) {
      s.refill = false;  // a drain() must not wait for what will never be done
      s.idle.notify_all();
      return;
    }
    s.busy = true;
    run_one(lock);
    s.busy = false;
    if (s.queue.empty() && !s.refill) s.idle.notify_all();
  }
}

// Runs one job, or the refill when there is none, with the queue unlocked meanwhile.
void Mapper::run_one(std::unique_lock<std::mutex>& lock) {
  State& s = *state_;
  if (s.queue.empty()) {
    s.refill = false;
    lock.unlock();
    bool more = false;
    try {
      more = pool_->refill_some();  // a job that has come meanwhile goes first
    } catch (const std::exception&) {
      // Whoever needs a page will meet the error, with a caller to tell.
    }
    lock.lock();
    s.refill = s.refill || more;
    return;
  }
  {
    Job job = std::move(s.queue.front());
    s.queue.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      job.run();
    } catch (...) {
      error = std::current_exception();
    }
    job.run = nullptr;  // what it holds is given up before anybody hears that it is done
    job.ticket->finish(std::move(error));
  }
  lock.lock();
}

}  // namespace vattn
