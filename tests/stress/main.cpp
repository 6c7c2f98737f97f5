// Threads on one pool: caches that they share and caches of their own, the mapper, pages created
// ahead, a budget that moves. Over the host driver and over the cuda driver on the fake libcuda.
//
//   vattn_stress [path of libfake_cuda.so]
//
// Seeds are fixed; what the scheduler of the operating system makes of them is not. Ends by proving
// that no page, address or event is left.
#include <chrono>
#include <cstdio>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "cuda_driver.h"
#include "fake_control.h"
#include "host_driver.h"
#include "worker.h"

namespace stress {
namespace {

using vattn::Driver;
using vattn::PagePool;

constexpr std::size_t kPage = 4096;
constexpr std::uint32_t kThreads = 4;
constexpr int kOperations = 3000;
constexpr std::size_t kMaxTokens = 96;
constexpr std::size_t kFullBudget = 420;  // pages: all sequences of all workers hardly fit

struct Scenario {
  const char* name;
  std::uint32_t caches;  // the workers share them evenly
  bool keep_stale;
  bool ahead;  // pages are created ahead of need
};

constexpr Scenario kScenarios[] = {
    {"one cache", 1, true, false},
    {"two caches, pages ahead", 2, true, true},
    {"a cache each", kThreads, true, false},
    {"one cache, no reuse, pages ahead", 1, false, true},
};

// A region of one run whose tokens do not divide pages, one of four runs, one with a window.
vattn::SpaceOptions space_options(const Scenario& scenario) {
  vattn::RegionSpec plain, heads, window;
  plain.token_bytes = 320;
  plain.capacity_tokens = 256;
  heads.runs = 4;
  heads.token_bytes = 96;
  heads.capacity_tokens = 128;
  window.token_bytes = 256;
  window.capacity_tokens = 128;
  window.window_tokens = 20;
  const std::uint32_t slots = 24 / scenario.caches;
  return {slots, kMaxTokens, {plain, heads, window}, {1, 16}, scenario.keep_stale};
}

// Begins a trace of the driver's calls, or ends it and looks at what it has.
void toggle_trace(Driver& driver) {
  constexpr std::size_t kMost = 64;
  if (!driver.trace().on()) {
    driver.trace().start(kMost);
    return;
  }
  const vattn::CallTraceResult found = driver.trace().stop();
  if (found.calls.size() > kMost) fail("a trace of more calls than it may keep");
  if (found.dropped > 0 && found.calls.size() < kMost) fail("a trace dropped calls for nothing");
  for (const vattn::CallRecord& call : found.calls) {
    if (call.end_ns < call.begin_ns || call.op >= vattn::kOps) fail("a call that makes no sense");
  }
}

// Moves the budget, trims, creates ahead, traces and verifies, for as long as the workers run.
void press(PagePool& pool, const std::vector<std::shared_ptr<SlotSpace>>& spaces,
           const std::atomic<bool>& stop, std::uint32_t seed) {
  std::mt19937 rng(seed);
  const auto below = [&](std::size_t n) { return rng() % n; };
  while (!stop) {
    SlotSpace& space = *spaces[below(spaces.size())];
    switch (below(9)) {
      case 0:
        pool.set_budget((kFullBudget / 3 + below(kFullBudget * 2 / 3)) * kPage);
        break;
      case 1:
        pool.set_budget(kFullBudget * kPage);
        break;
      case 2:
        space.trim();
        break;
      case 3:
        pool.refill();
        break;
      case 4:
        static_cast<void>(pool.stats());
        break;
      case 5:
        toggle_trace(pool.driver());
        break;
      default:
        space.check();
        break;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  if (pool.driver().trace().on()) toggle_trace(pool.driver());
}

// A sequence that all workers of a cache fork, made before they start.
void share_prefix(std::vector<Worker>& workers, std::uint32_t caches) {
  for (std::uint32_t c = 0; c < caches; ++c) {
    const std::uint32_t slot = workers[c].make(50);
    const std::vector<std::uint32_t> writers = workers[c].writers_of(slot);
    workers[c].abandon(slot);
    for (std::uint32_t w = c; w < kThreads; w += caches) workers[w].share(slot, writers);
  }
}

void run_threads(const Scenario& scenario, const std::shared_ptr<PagePool>& pool,
                 std::span<const Stream> streams, std::uint32_t seed) {
  Mapper mapper(pool);
  std::vector<std::shared_ptr<SlotSpace>> spaces;
  for (std::uint32_t i = 0; i < scenario.caches; ++i) {
    spaces.push_back(std::make_shared<SlotSpace>(pool, space_options(scenario)));
  }
  std::vector<Worker> workers;
  std::vector<std::shared_ptr<std::mutex>> admissions;
  for (std::uint32_t i = 0; i < scenario.caches; ++i) {
    admissions.push_back(std::make_shared<std::mutex>());
  }
  for (std::uint32_t i = 0; i < kThreads; ++i) {
    const std::uint32_t cache = i % scenario.caches;
    workers.emplace_back(spaces[cache], mapper, streams[i], 10 * seed + i + 1, admissions[cache],
                         scenario.keep_stale);
  }
  share_prefix(workers, scenario.caches);

  std::atomic<bool> stop = false;
  std::vector<std::exception_ptr> errors(kThreads + 1);
  const auto guarded = [&](std::size_t i, const std::function<void()>& act) {
    return std::thread([&errors, i, act] {
      try {
        act();
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  };
  std::thread pressure = guarded(kThreads, [&] { press(*pool, spaces, stop, seed); });
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < kThreads; ++i) {
    threads.push_back(guarded(i, [&, i] {
      workers[i].run(kOperations);
      workers[i].finish();
    }));
  }
  for (std::thread& thread : threads) thread.join();
  stop = true;
  pressure.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }

  mapper.drain();
  for (const std::shared_ptr<SlotSpace>& space : spaces) {
    space->check();
    const std::size_t left = space->stats().open_slots;
    if (left != 1) fail(std::to_string(left) + " sequences are open, not the shared one only");
  }
  mapper.stop();
}

void run(const Scenario& scenario, const std::shared_ptr<Driver>& driver, std::uint32_t seed) {
  std::vector<Stream> streams;
  for (std::uint32_t i = 0; i < kThreads; ++i) streams.push_back(driver->create_stream());
  const std::size_t ahead = scenario.ahead ? 32 * kPage : 0;
  auto pool = std::make_shared<PagePool>(
      driver, vattn::PoolOptions{kPage, kFullBudget * kPage, ahead / 2, ahead});
  run_threads(scenario, pool, streams, seed);
  {
    vattn::DeviceLock lock = pool->lock();
    pool->trim(0, lock);
    pool->check(lock);
  }
  if (const std::size_t left = driver->physical_bytes(); left != 0) {
    fail(std::to_string(left) + " bytes are left");
  }
  for (const Stream stream : streams) {
    driver->synchronize(stream);
    driver->destroy_stream(stream);
  }
}

class Report {
 public:
  void attempt(const std::string& name, const std::function<void()>& act) {
    const auto start = std::chrono::steady_clock::now();
    std::string failure;
    try {
      act();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    ++(failure.empty() ? passed_ : failed_);
    std::printf("%-6s %s (%.1f s)%s%s\n", failure.empty() ? "ok" : "FAILED", name.c_str(),
                took.count(), failure.empty() ? "" : ": ", failure.c_str());
    std::fflush(stdout);
  }

  int finish() const {
    std::printf("%d passed, %d failed\n", passed_, failed_);
    return failed_ == 0 ? 0 : 1;
  }

 private:
  int passed_ = 0, failed_ = 0;
};

int main(const std::string& fake_path) {
  Report report;
  std::uint32_t seed = 0;
  for (const Scenario& scenario : kScenarios) {
    ++seed;
    report.attempt(std::string("host, ") + scenario.name,
                   [&] { run(scenario, vattn::make_host_driver({.strict = true}), seed); });
    report.attempt(std::string("cuda on the fake, ") + scenario.name, [&] {
      FakeControl fake(fake_path);
      fake.start(kPage);
      try {
        run(scenario, vattn::make_cuda_driver({0, fake_path, true}), seed);
      } catch (const std::exception& error) {
        fail(error.what() + ("\n" + fake.violations()));
      }
      if (const std::string left = fake.violations() + fake.leaks(); !left.empty()) fail(left);
    });
  }
  return report.finish();
}

}  // namespace
}  // namespace stress

int main(int count, char** arguments) {
#ifdef VATTN_FAKE_CUDA
  const std::string built = VATTN_FAKE_CUDA;
#else
  const std::string built;
#endif
  if (count > 2 || (count < 2 && built.empty())) {
    std::fprintf(stderr, "usage: vattn_stress path/of/libfake_cuda.so\n");
    return 2;
  }
  return stress::main(count == 2 ? arguments[1] : built);
}
