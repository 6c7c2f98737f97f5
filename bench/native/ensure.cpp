// Time of SlotSpace::ensure() when everything is mapped already: what every decode step pays.
//
// Prints one JSON object: nanoseconds per sequence in a batch of 256, once with lengths that stay
// and once with a token more at each call, and for a call with one sequence. Each figure is the
// median of many repetitions.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "host_driver.h"
#include "slots.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int32_t kSequences = 256;
constexpr std::int32_t kTokens = 1024;
constexpr int kCalls = 512;
constexpr int kRepetitions = 101;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Median nanoseconds of one call of `work(i)`, i counting the calls of a repetition.
template <typename Prepare, typename Work>
double measure(Prepare prepare, Work work) {
  std::vector<double> times;
  for (int repetition = 0; repetition < kRepetitions; ++repetition) {
    prepare();
    const auto start = Clock::now();
    for (int i = 0; i < kCalls; ++i) work(i);
    const std::chrono::duration<double, std::nano> elapsed = Clock::now() - start;
    times.push_back(elapsed.count() / kCalls);
  }
  return median(times);
}

}  // namespace

int main() {
  auto pool = std::make_shared<vattn::PagePool>(vattn::make_host_driver({}),
                                                vattn::PoolOptions{0, std::size_t{1} << 30, 0, 0});
  // 4 layers of 2 KV heads of 64 float32 in head order: 16 runs per slot.
  vattn::RegionSpec region;
  region.runs = 16;
  region.token_bytes = 256;
  region.capacity_tokens = kTokens;
  vattn::SlotSpace space(pool, {kSequences, kTokens, {region}, {1}, true});

  std::vector<std::int32_t> slots, tokens(kSequences, kTokens);
  for (std::int32_t i = 0; i < kSequences; ++i) {
    slots.push_back(static_cast<std::int32_t>(space.open(std::nullopt, 0)));
  }
  space.ensure(slots, std::vector<std::int32_t>(kSequences, 1), 0);

  const auto nothing = [] {};
  const auto shorten = [&] {
    for (const std::int32_t slot : slots) space.truncate(static_cast<std::uint32_t>(slot), 1, 0);
    space.prepare(slots, std::vector<std::int32_t>(kSequences, kTokens), 0);
  };
  const double growing = measure(shorten, [&](int i) {
    std::fill(tokens.begin(), tokens.end(), i + 2);
    space.ensure(slots, tokens, 0);
  });
  const double same = measure(nothing, [&](int) { space.ensure(slots, tokens, 0); });
  const double one = measure(nothing, [&](int) {
    space.ensure(std::span(slots).first(1), std::span(tokens).first(1), 0);
  });

  std::printf(
      "{\"ensure_ns_per_sequence\": %.2f, \"ensure_growing_ns_per_sequence\": %.2f, "
      "\"ensure_single_ns\": %.2f, \"sequences\": %d}\n",
      same / kSequences, growing / kSequences, one, kSequences);
  return 0;
}
