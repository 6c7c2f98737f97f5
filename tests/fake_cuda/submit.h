// How the API files give work to streams and block for it.
#pragma once

#include <string>
#include <vector>

#include "entry.h"

namespace fake {

// The stream that a handle names for the calling thread; null: unknown. Without a current context
// the implicit streams are device 0's (only control functions get so far without one).
StreamPtr find_stream(World& world, CUstream handle, bool even_destroyed = false);

// Logs a violation for each range that is not mapped with access for `device` (-1: any) now.
// True if there is none.
bool check_accessible(World& world, const std::string& name, const std::vector<Range>& ranges,
                      int device, bool write = true);

// Blocks until all marks are done, or the watchdog ends it: a violation "deadlock" and
// CUDA_ERROR_LAUNCH_TIMEOUT. CUDA_ERROR_DEINITIALIZED if the world is reset meanwhile.
CUresult block(World& world, Lock& lock, const std::vector<MarkPtr>& marks, const char* call);

}  // namespace fake
