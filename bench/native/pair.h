// Time of a request and its release that the policy serves from its cache.
#pragma once

#include "policy.h"

namespace bench {

struct PairTimes {
  double single_ns = 0;   // one thread; median over the samples
  double threads_ns = 0;  // each of `threads` threads at once, on streams of their own
  double ratio = 0;       // median of threads / single over neighbouring samples
  CallCounts calls{};     // during the samples
};

// One thread and all take turns on one policy. Pre: the policy has as many streams as threads.
PairTimes measure_pair(Policy& policy, std::size_t bytes, std::uint32_t threads);

}  // namespace bench
