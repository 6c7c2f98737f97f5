// The background thread of one device: maps what the next step will need while the device computes
// this one, and creates pages ahead of need.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "page_pool.h"

namespace vattn {

// The outcome of one job. An error of the job is thrown to whoever waits, each time.
class Ticket {
 public:
  bool done() const;
  void wait();
  // False when the time is up first.
  bool wait_for(std::chrono::microseconds timeout);

  // One of a job that had nothing to do.
  static std::shared_ptr<Ticket> finished();

 private:
  friend class Mapper;
  void finish(std::exception_ptr error);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::exception_ptr error_;
};

class Mapper {
 public:
  explicit Mapper(std::shared_ptr<PagePool> pool);
  ~Mapper();
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  // Runs `job` on the thread, after those submitted before.
  std::shared_ptr<Ticket> submit(std::function<void()> job);
  // Waits until nothing is queued or running.
  void drain();
  // Finishes what is queued and ends the thread. submit() is an error from then on.
  void stop();

  const std::shared_ptr<PagePool>& pool() const noexcept { return pool_; }

 private:
  struct Job {
    std::function<void()> run;
    std::shared_ptr<Ticket> ticket;
  };
  // On the heap, because a forked child must leave it alone: destroying a condition variable waits
  // for its waiters, and in the child there is no thread to stop waiting.
  struct State {
    std::mutex mutex;
    std::condition_variable work, idle;
    std::deque<Job> queue;
    bool refill = false;
    bool busy = false;
    bool stopping = false;
    std::thread thread;
  };

  void loop();
  void run_one(std::unique_lock<std::mutex>& lock);
  void request_refill();

  const std::shared_ptr<PagePool> pool_;
  std::unique_ptr<State> state_ = std::make_unique<State>();
};

}  // namespace vattn
