// A trace through a policy: once with every check, then as often as it is timed.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>

#include "policy.h"
#include "trace.h"

namespace bench {

inline constexpr std::size_t kParts = 10;

using MakePolicy = std::function<std::unique_ptr<Policy>()>;

// The live blocks of a policy. Throws std::logic_error where a policy hands out what it must not.
class Ledger {
 public:
  // A block that starts at a multiple of 512 and overlaps none that lives.
  void add(const void* address, std::size_t bytes);
  void remove(const void* address);
  // Every live byte is backed.
  void require_backed(std::size_t physical_bytes) const;
  std::size_t live() const noexcept { return live_; }

 private:
  std::map<Address, std::size_t> blocks_;
  std::size_t live_ = 0;
};

struct Checked {
  std::size_t peak_physical_bytes = 0;
  CallCounts calls{};                           // up to the end of the trace
  std::array<std::uint64_t, kParts> by_part{};  // of all kinds, by tenths of the operations
  // The operation at which the device had too little memory: the figures are of those before it.
  std::optional<std::size_t> out_of_memory_at{};
};

inline std::uint64_t second_half(const std::array<std::uint64_t, kParts>& parts) {
  return std::accumulate(parts.begin() + kParts / 2, parts.end(), std::uint64_t{0});
}

struct Timed {
  double ns_per_op = 0;              // median over the repetitions
  double ns_per_op_second_half = 0;  // of the second half of the operations
};

// Throws std::logic_error, with the operation's number, where a check fails.
Checked replay_checked(const Trace& trace, const MakePolicy& make);
// Wall time in the policy, a fake driver's own included. Pre: the trace fits the device.
Timed replay_timed(const Trace& trace, const MakePolicy& make, int repetitions);

}  // namespace bench
