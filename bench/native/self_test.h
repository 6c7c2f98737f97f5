// Policies that break one rule each: what the replay's checks are worth.
#pragma once

namespace bench {

// Prints {"rule": "what the replay said", ...}; a rule whose breach goes unnoticed has null.
// Returns whether every breach was noticed.
bool self_test();

}  // namespace bench
