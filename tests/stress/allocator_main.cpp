// Threads on one allocator over the cuda driver on the fake libcuda, beside a KV cache on the same
// pool: eight streams whose work is done late, graph pools, tags that pause, budgets and limits
// that move, failures that are injected. Every block carries its owner's bytes, written in the
// order of its stream: two live blocks on one page, or a page that is given away before its stream
// is done, never compare equal.
//
//   vattn_allocator_stress [operations [path of libfake_cuda.so]]
//
// Ends by proving that nothing is left.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <thread>

#include "allocator_graphs.h"
#include "allocator_kv.h"
#include "allocator_pressure.h"
#include "cuda_driver.h"
#include "host_driver.h"

namespace stress {

void fail(const std::string& what) { throw std::runtime_error(what); }

namespace {

constexpr std::size_t kThreads = 4;
constexpr std::size_t kBudget = std::size_t{320} << 20;  // all blocks of all workers hardly fit

struct Scenario {
  const char* name;
  std::size_t page_bytes;
  bool fake;
  bool held;    // streams work when a thread lets them; else when somebody waits for them
  bool mapper;  // old mappings go in the background
  bool faults;
};

constexpr Scenario kScenarios[] = {
    {"host, 64 KiB pages", 64 << 10, false, false, true, false},
    {"lazy streams, 2 MiB pages", 2 << 20, true, false, true, false},
    {"held streams, 256 KiB pages", 256 << 10, true, true, true, false},
    {"held streams, 2 MiB pages, no mapper", 2 << 20, true, true, false, false},
    {"lazy streams, 2 MiB pages, faults", 2 << 20, true, false, true, true},
    {"held streams, 256 KiB pages, faults", 256 << 10, true, true, true, true},
};

// Threads whose first error ends up with whoever joins them.
class Threads {
 public:
  explicit Threads(std::atomic<bool>& stop) : stop_(stop) {}
  void start(std::function<void()> act) {
    errors_.emplace_back();
    std::exception_ptr& error = errors_.back();
    threads_.emplace_back([this, &error, act = std::move(act)] {
      try {
        act();
      } catch (...) {
        error = std::current_exception();
        stop_ = true;
      }
    });
  }
  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  void rethrow() const {
    for (const std::exception_ptr& error : errors_) {
      if (error) std::rethrow_exception(error);
    }
  }

 private:
  std::atomic<bool>& stop_;
  std::deque<std::exception_ptr> errors_;
  std::vector<std::thread> threads_;
};

// What a run must have met, so that it shows anything.
void require_events(const Shared& shared, const vattn::Figures& figures, const KvUser& kv,
                    std::size_t operations) {
  std::printf(
      "       %llu allocations, %llu out of memory, %llu failures, %llu pages moved, "
      "%llu pauses, %llu captures, %llu replays; KV: %llu steps, %llu out of pages, "
      "%llu tokens evicted\n",
      static_cast<unsigned long long>(shared.allocations),
      static_cast<unsigned long long>(shared.out_of_memory),
      static_cast<unsigned long long>(shared.failures),
      static_cast<unsigned long long>(figures.pages_moved),
      static_cast<unsigned long long>(shared.pauses),
      static_cast<unsigned long long>(shared.captures),
      static_cast<unsigned long long>(shared.replays), static_cast<unsigned long long>(kv.steps()),
      static_cast<unsigned long long>(kv.out_of_pages()),
      static_cast<unsigned long long>(kv.evicted_tokens()));
  if (operations < 5000) return;
  if (figures.pages_moved == 0) fail("no page was moved");
  if (shared.out_of_memory == 0) fail("memory never ran out");
  if (shared.pauses == 0 || shared.replays == 0) fail("nothing was paused, or nothing replayed");
  if (kv.evicted_tokens() == 0) fail("nothing was taken from the KV cache");
}

std::string text_of(const std::vector<vattn::SegmentInfo>& segments) {
  std::string text;
  for (const vattn::SegmentInfo& segment : segments) {
    text += "\n  " + segment.scope + ", stream " + std::to_string(segment.stream) + ":";
    for (const vattn::BlockInfo& block : segment.blocks) {
      text += " " + std::to_string(block.bytes) + " " + block.state;
    }
  }
  return text;
}

void run_threads(const Scenario& scenario, const std::shared_ptr<vattn::PagePool>& pool,
                 const Device& device, std::size_t operations, std::uint32_t seed) {
  const auto mapper = scenario.mapper ? std::make_shared<vattn::Mapper>(pool) : nullptr;
  auto allocator = std::make_unique<CachingAllocator>(pool, mapper);
  Shared shared{*allocator, device};
  GraphPools graphs(shared);
  // A pool's release waits for the streams that the allocator knows.
  for (std::size_t i = 0; i < Device::kStreams; ++i) {
    allocator->free(allocator->allocate(1, device.stream(i)));
  }
  std::vector<std::unique_ptr<AllocatorWorker>> workers;
  for (std::uint32_t i = 0; i < kThreads; ++i) {
    workers.push_back(std::make_unique<AllocatorWorker>(shared, graphs, 16 * seed + i + 1));
  }
  KvUser kv(pool, device, seed);
  Pressure pressure(shared, *pool, mapper.get(), kBudget, scenario.faults);

  std::atomic<bool> stop = false, quiet = false;
  Threads working(stop), beside(stop), streams(stop);
  streams.start([&] {
    Random random(seed);
    while (!quiet) {
      device.proceed(random);
      std::this_thread::yield();
    }
  });
  beside.start([&] { pressure.run(stop); });
  beside.start([&] {
    while (!stop) {
      {
        const auto entered = shared.gate.enter();
        kv.step();
      }
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  });
  for (const auto& worker : workers) {
    working.start([&] {
      constexpr std::size_t kChunk = 64;
      for (std::size_t done = 0; done < operations / kThreads && !stop; done += kChunk) {
        worker->run(kChunk);
      }
    });
  }
  working.join();
  stop = true;
  beside.join();
  std::exception_ptr error;
  try {
    working.rethrow();
    beside.rethrow();
    allocator->check();
    for (const auto& worker : workers) worker->finish();
    graphs.finish();
    kv.finish();
    allocator->check();
    require_events(shared, allocator->figures(), kv, operations);
    allocator->settle();
    allocator->trim();
    allocator->check();
    const vattn::Figures figures = allocator->figures();
    if (figures.all.reserved_bytes.current != 0) {
      fail(std::to_string(figures.all.reserved_bytes.current) +
           " bytes are mapped after trim():" + text_of(allocator->segments()));
    }
    if (figures.all.allocated_bytes.current != 0) fail("blocks are left");
    allocator.reset();
  } catch (...) {
    error = std::current_exception();
    device.release();  // what is destroyed now has nobody who uses it
  }
  if (mapper != nullptr) mapper->drain();
  quiet = true;
  streams.join();
  device.release();
  if (error) std::rethrow_exception(error);
  if (mapper != nullptr) mapper->stop();
}

void run(const Scenario& scenario, const std::shared_ptr<Driver>& driver, const FakeControl* fake,
         std::size_t operations, std::uint32_t seed) {
  auto pool = std::make_shared<vattn::PagePool>(
      driver, vattn::PoolOptions{scenario.page_bytes, kBudget, 0, 0});
  const Device device(driver, fake, scenario.held);
  run_threads(scenario, pool, device, operations, seed);
  {
    vattn::DeviceLock lock = pool->lock();
    pool->trim(0, lock);
    pool->check(lock);
  }
  if (const std::size_t left = driver->physical_bytes(); left != 0) {
    fail(std::to_string(left) + " bytes are left");
  }
}

// The first lines: what follows the first broken rule follows from it.
std::string beginning(const std::string& text) {
  std::size_t end = 0;
  for (int line = 0; line < 6 && end < text.size(); ++line) {
    end = std::min(text.find('\n', end), text.size() - 1) + 1;
  }
  return text.substr(0, end);
}

void run_on_fake(const Scenario& scenario, const std::string& path, std::size_t operations,
                 std::uint32_t seed) {
  FakeControl fake(path);
  fake.start(scenario.page_bytes);
  fake.no_poison();
  try {
    run(scenario, vattn::make_cuda_driver({0, path, true}), &fake, operations, seed);
  } catch (const std::exception& error) {
    fail(error.what() + ("\n" + beginning(fake.violations())));
  }
  if (const std::string left = fake.violations() + fake.leaks(); !left.empty()) {
    fail(beginning(left));
  }
}

int main(std::size_t operations, const std::string& fake_path) {
  int failed = 0;
  std::uint32_t seed = 0;
  for (const Scenario& scenario : kScenarios) {
    const auto start = std::chrono::steady_clock::now();
    const std::size_t share = operations / std::size(kScenarios);
    std::string failure;
    ++seed;
    try {
      if (scenario.fake) {
        run_on_fake(scenario, fake_path, share, seed);
      } else {
        run(scenario, vattn::make_host_driver({.strict = true}), nullptr, share, seed);
      }
    } catch (const std::exception& error) {
      failure = error.what();
      ++failed;
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("%-6s %s: %zu operations (%.1f s)%s%s\n", failure.empty() ? "ok" : "FAILED",
                scenario.name, share, took.count(), failure.empty() ? "" : ": ", failure.c_str());
    std::fflush(stdout);
  }
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace stress

int main(int count, char** arguments) {
#ifdef VATTN_FAKE_CUDA
  const std::string built = VATTN_FAKE_CUDA;
#else
  const std::string built;
#endif
  const std::string fake = count > 2 ? arguments[2] : built;
  const std::size_t operations =
      count > 1 ? std::strtoull(arguments[1], nullptr, 10) : VATTN_STRESS_OPERATIONS;
  if (count > 3 || fake.empty() || operations == 0) {
    std::fprintf(stderr, "usage: vattn_allocator_stress [operations [path/of/libfake_cuda.so]]\n");
    return 2;
  }
  return stress::main(operations, fake);
}
