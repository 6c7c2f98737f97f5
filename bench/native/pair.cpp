#include "pair.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <exception>
#include <thread>
#include <vector>

#include "median.h"

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPairs = 4000;  // per sample
constexpr int kSamples = 101;
constexpr int kWarmUp = 2000;

void run_pairs(Policy& policy, std::size_t bytes, std::uint32_t stream, int pairs) {
  for (int i = 0; i < pairs; ++i) policy.free(policy.allocate(bytes, stream), bytes, stream);
}

double sample_ns(Policy& policy, std::size_t bytes, std::uint32_t stream) {
  const auto start = Clock::now();
  run_pairs(policy, bytes, stream, kPairs);
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count() / kPairs;
}

// Threads that each take a sample at once, whenever they are asked to.
class Crew {
 public:
  Crew(Policy& policy, std::size_t bytes, std::uint32_t threads)
      : ns_(threads), errors_(threads), gate_(threads + 1) {
    for (std::uint32_t i = 0; i < threads; ++i) {
      threads_.emplace_back([this, &policy, bytes, i] { work(policy, bytes, i); });
    }
  }
  ~Crew() {
    stop_ = true;
    gate_.arrive_and_wait();
    for (std::thread& thread : threads_) thread.join();
  }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  // Mean over the threads. Rethrows what a thread threw.
  double sample() {
    gate_.arrive_and_wait();
    gate_.arrive_and_wait();
    double sum = 0;
    for (std::size_t i = 0; i < ns_.size(); ++i) {
      if (errors_[i]) std::rethrow_exception(errors_[i]);
      sum += ns_[i];
    }
    return sum / static_cast<double>(ns_.size());
  }

 private:
  void work(Policy& policy, std::size_t bytes, std::uint32_t i) {
    while (true) {
      gate_.arrive_and_wait();
      if (stop_) return;
      try {
        ns_[i] = sample_ns(policy, bytes, i);
      } catch (...) {
        errors_[i] = std::current_exception();
      }
      gate_.arrive_and_wait();
    }
  }

  std::vector<double> ns_;
  std::vector<std::exception_ptr> errors_;
  std::barrier<> gate_;
  bool stop_ = false;  // ordered by the gate
  std::vector<std::thread> threads_;
};

}  // namespace

PairTimes measure_pair(Policy& policy, std::size_t bytes, std::uint32_t threads) {
  for (std::uint32_t stream = 0; stream < threads; ++stream) {
    run_pairs(policy, bytes, stream, kWarmUp);
  }
  std::vector<double> single, together, ratios;
  Crew crew(policy, bytes, threads);
  crew.sample();
  const CallCounts before = policy.driver_calls();
  for (int i = 0; i < kSamples; ++i) {
    single.push_back(sample_ns(policy, bytes, 0));
    together.push_back(crew.sample());
    ratios.push_back(together.back() / single.back());
  }
  return {median(single), median(together), median(ratios),
          difference(policy.driver_calls(), before)};
}

}  // namespace bench
