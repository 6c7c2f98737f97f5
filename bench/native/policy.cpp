#include "policy.h"

#include <numeric>

namespace bench {
namespace {

struct CallCost {
  const char* name;
  double us;
};

// Microseconds per call as vAttention and others published them for pages of 2 MiB, the upper ends
// of their ranges where they agree (bench/fake.py takes the same); PyTorch's notes say that the
// cost goes by the number of allocations, not by their size. A cudaMalloc counts as a create, a map
// and a set access, a cudaFree as an unmap and a release, without the wait for the device that it
// implies. Reserving and freeing addresses, events and waits are left out: nobody published them.
constexpr CallCost kCosts[kCalls] = {
    {"cudaMalloc", 100 + 2 + 38},
    {"cudaFree", 34 + 23},
    {"cuMemAddressReserve", 0},
    {"cuMemAddressFree", 0},
    {"cuMemCreate", 100},
    {"cuMemRelease", 23},
    {"cuMemMap", 2},
    {"cuMemSetAccess", 38},
    {"cuMemUnmap", 34},
    {"cuStreamSynchronize", 0},
    {"event", 0},
    {"copy", 0},
    {"fill", 0},
};

struct Maker {
  const char* name;
  std::unique_ptr<Policy> (*make)(const PolicyOptions&);
};

constexpr Maker kMakers[] = {
    {"vattn", make_vattn_policy},
    {"native", make_native_policy},
    {"expandable", make_expandable_policy},
    {"direct", make_direct_policy},
};

}  // namespace

const char* call_name(Call call) noexcept { return kCosts[static_cast<std::size_t>(call)].name; }

std::uint64_t total(const CallCounts& counts) noexcept {
  return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
}

CallCounts difference(CallCounts after, const CallCounts& before) noexcept {
  for (std::size_t i = 0; i < kCalls; ++i) after[i] -= before[i];
  return after;
}

double modelled_ms(const CallCounts& counts) noexcept {
  double us = 0;
  for (std::size_t i = 0; i < kCalls; ++i) us += static_cast<double>(counts[i]) * kCosts[i].us;
  return us / 1000;
}

std::string policy_names() {
  std::string names;
  for (const Maker& maker : kMakers) {
    if (!names.empty()) names += &maker == std::end(kMakers) - 1 ? " or " : ", ";
    names += maker.name;
  }
  return names;
}

std::unique_ptr<Policy> make_policy(const std::string& name, const PolicyOptions& options) {
  for (const Maker& maker : kMakers) {
    if (name == maker.name) return maker.make(options);
  }
  throw std::invalid_argument("there is no policy '" + name + "'; use " + policy_names());
}

}  // namespace bench
