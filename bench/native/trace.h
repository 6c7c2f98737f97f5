// A trace of allocations as the replay takes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bench {

// One request or release. Blocks have dense numbers, each for one life: a block that is released is
// not named again.
struct Operation {
  std::uint32_t block;
  std::uint32_t stream;  // dense, in the order of appearance; the stream that the block was made on
  std::uint64_t bytes;   // of the block
  bool is_free;
};

struct Trace {
  std::vector<Operation> operations;
  std::uint32_t blocks = 0;
  std::uint32_t streams = 0;
  std::uint64_t peak_live_bytes = 0;  // each request rounded up to 512
  std::uint64_t live_at_end = 0;
};

// Reads header-less little-endian records {u32 id, u32 stream, u64 bytes}, bytes 0 being the
// release of an id that is in use. Throws std::runtime_error with the record's number for anything
// else.
Trace read_trace(const std::string& path);

}  // namespace bench
