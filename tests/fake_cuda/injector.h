// Counts driver calls and decides which of them fail or are slow.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda_api.h"

namespace fake {

// Sleeps for 50 us or more, spins for less: a sleep of 5 us takes 60.
void delay(std::uint64_t ns);

class Injector {
 public:
  struct Verdict {
    CUresult code;
    std::uint64_t latency_ns;
  };

  // One call of `api` begins. Counts it, and says what is to happen to it.
  Verdict on_call(Api api);

  // Calls number nth, nth + 1, ... nth + count - 1 from now of `api` (any api: nullopt) fail with
  // `code`. A count of 0 fails all from the nth on; -1 makes the nth failure sticky.
  void fail(std::optional<Api> api, std::uint64_t nth, CUresult code, int count);
  void clear_failures() { rules_.clear(); }
  std::uint64_t failures() const { return failures_; }

  void latency(std::optional<Api> api, std::uint64_t ns);
  void sticky(CUresult code) { sticky_ = code; }

  std::uint64_t calls(Api api) const { return calls_[static_cast<std::size_t>(api)]; }
  std::uint64_t total_calls() const;
  void reset_calls() { calls_ = {}; }

 private:
  struct Rule {
    std::optional<Api> api;
    std::uint64_t nth;
    CUresult code;
    int count;
    std::uint64_t seen = 0;

    bool hits(Api called);
  };

  std::array<std::uint64_t, kApis> calls_ = {};
  std::array<std::uint64_t, kApis> latency_ns_ = {};
  std::uint64_t failures_ = 0;
  std::vector<Rule> rules_;
  CUresult sticky_ = CUDA_SUCCESS;
};

}  // namespace fake
