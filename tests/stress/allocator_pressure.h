// What goes on beside the allocator's users: budgets and limits move, memory is trimmed, invariants
// are verified, driver calls fail.
#pragma once

#include "allocator_worker.h"

namespace stress {

class Pressure {
 public:
  Pressure(Shared& shared, vattn::PagePool& pool, vattn::Mapper* mapper, std::size_t budget_bytes,
           bool faults);

  // For as long as the workers run. At the end nothing is restricted or failing any more.
  void run(const std::atomic<bool>& stop);

 private:
  void next_fault();
  void step();

  Shared& shared_;
  vattn::PagePool& pool_;
  vattn::Mapper* const mapper_;
  const std::size_t budget_bytes_;
  const bool faults_;
  Random random_;
};

}  // namespace stress
