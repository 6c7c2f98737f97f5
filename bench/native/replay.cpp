#include "replay.h"

#include <algorithm>
#include <chrono>

#include "median.h"

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;

// A policy verifies all that it holds this often, and at the end.
constexpr std::size_t kCheckEvery = 4096;

double ns_per(Clock::duration elapsed, std::size_t operations) {
  return std::chrono::duration<double, std::nano>(elapsed).count() /
         static_cast<double>(std::max<std::size_t>(operations, 1));
}

// The addresses of the blocks, and the policy that gave them.
class Player {
 public:
  Player(const Trace& trace, Policy& policy) : policy_(policy), addresses_(trace.blocks) {}

  void* run(const Operation& operation) {
    void*& address = addresses_[operation.block];
    if (operation.is_free) {
      policy_.free(address, operation.bytes, operation.stream);
    } else {
      address = policy_.allocate(operation.bytes, operation.stream);
    }
    return address;
  }

  // What lives after the first `done` operations.
  void free_rest(const Trace& trace, std::size_t done) {
    std::vector<const Operation*> live(trace.blocks, nullptr);
    for (std::size_t i = 0; i < done; ++i) {
      const Operation& operation = trace.operations[i];
      live[operation.block] = operation.is_free ? nullptr : &operation;
    }
    for (const Operation* operation : live) {
      if (operation == nullptr) continue;
      policy_.free(addresses_[operation->block], operation->bytes, operation->stream);
    }
  }

 private:
  Policy& policy_;
  std::vector<void*> addresses_;
};

// The calls that a policy makes in each part of a trace.
class PartCalls {
 public:
  PartCalls(const Policy& policy, std::array<std::uint64_t, kParts>& by_part)
      : policy_(policy), by_part_(by_part) {}

  // Parts before this one are over.
  void end_before(std::size_t part) {
    for (; part_ < part; ++part_) {
      const std::uint64_t calls = total(policy_.driver_calls());
      by_part_[part_] = calls - counted_;
      counted_ = calls;
    }
  }

 private:
  const Policy& policy_;
  std::array<std::uint64_t, kParts>& by_part_;
  std::size_t part_ = 0;
  std::uint64_t counted_ = 0;
};

void step(Player& player, Ledger& ledger, const Policy& policy, const Operation& operation) {
  void* const address = player.run(operation);
  if (operation.is_free) {
    ledger.remove(address);
  } else {
    ledger.add(address, operation.bytes);
  }
  ledger.require_backed(policy.physical_bytes());
}

}  // namespace

void Ledger::add(const void* pointer, std::size_t requested) {
  const auto address = reinterpret_cast<Address>(pointer);
  const std::size_t bytes = live_bytes(requested);
  const std::string what =
      "the block of " + std::to_string(requested) + " bytes at " + std::to_string(address);
  if (address == 0) throw std::logic_error(what + " is null");
  if (address % kAlignment != 0) throw std::logic_error(what + " is not aligned to 512");
  const auto next = blocks_.lower_bound(address);
  const bool into_next = next != blocks_.end() && next->first < address + bytes;
  const bool from_before =
      next != blocks_.begin() && std::prev(next)->first + std::prev(next)->second > address;
  if (into_next || from_before) throw std::logic_error(what + " overlaps a live block");
  blocks_.emplace_hint(next, address, bytes);
  live_ += bytes;
}

void Ledger::remove(const void* address) {
  const auto found = blocks_.find(reinterpret_cast<Address>(address));
  live_ -= found->second;
  blocks_.erase(found);
}

void Ledger::require_backed(std::size_t physical_bytes) const {
  if (physical_bytes < live_) {
    throw std::logic_error(std::to_string(live_) + " live bytes on " +
                           std::to_string(physical_bytes) + " bytes of pages");
  }
}

Checked replay_checked(const Trace& trace, const MakePolicy& make) {
  const std::unique_ptr<Policy> policy = make();
  Player player(trace, *policy);
  Ledger ledger;
  Checked found;
  const std::size_t operations = trace.operations.size();
  PartCalls parts(*policy, found.by_part);
  std::size_t i = 0;
  try {
    for (; i < operations; ++i) {
      parts.end_before(kParts * i / operations);
      step(player, ledger, *policy, trace.operations[i]);
      if (i % kCheckEvery == 0) policy->check();
    }
    policy->check();
  } catch (const OutOfMemory&) {
    found.out_of_memory_at = i;
  } catch (const std::logic_error& error) {
    throw std::logic_error("operation " + std::to_string(i) + ": " + error.what());
  }
  found.peak_physical_bytes = policy->peak_physical_bytes();
  found.calls = policy->driver_calls();
  parts.end_before(kParts);
  player.free_rest(trace, i);
  policy->close();
  return found;
}

Timed replay_timed(const Trace& trace, const MakePolicy& make, int repetitions) {
  const std::size_t operations = trace.operations.size();
  const std::size_t half = operations / 2;
  std::vector<double> all, second;
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    const std::unique_ptr<Policy> policy = make();
    Player player(trace, *policy);
    const auto start = Clock::now();
    for (std::size_t i = 0; i < half; ++i) player.run(trace.operations[i]);
    const auto middle = Clock::now();
    for (std::size_t i = half; i < operations; ++i) player.run(trace.operations[i]);
    const auto end = Clock::now();
    all.push_back(ns_per(end - start, operations));
    second.push_back(ns_per(end - middle, operations - half));
    player.free_rest(trace, operations);
    policy->close();
  }
  return {median(all), median(second)};
}

}  // namespace bench
