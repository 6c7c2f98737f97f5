#include "trace.h"

#include <algorithm>
#include <bit>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <unordered_map>

#include "policy.h"

namespace bench {
namespace {

constexpr std::size_t kRecordBytes = 16;

template <typename Integer>
Integer little_endian(const char* bytes) {
  Integer value = 0;
  for (std::size_t i = sizeof(Integer); i-- > 0;) {
    value = static_cast<Integer>(value << 8 | static_cast<unsigned char>(bytes[i]));
  }
  return value;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (text.size() % kRecordBytes != 0) {
    throw std::runtime_error(path + " has " + std::to_string(text.size()) +
                             " bytes, not whole records of 16");
  }
  return text;
}

struct Life {
  std::uint32_t block;
  std::uint32_t stream;
  std::uint64_t bytes;
};

class Reader {
 public:
  void add(std::uint32_t id, std::uint32_t stream, std::uint64_t bytes) {
    if (bytes == 0) {
      release(id);
    } else {
      request(id, stream, bytes);
    }
  }

  Trace take() {
    trace_.live_at_end = live_;
    trace_.streams = static_cast<std::uint32_t>(streams_.size());
    return std::move(trace_);
  }

 private:
  void request(std::uint32_t id, std::uint32_t stream, std::uint64_t bytes) {
    const std::uint32_t index =
        streams_.emplace(stream, static_cast<std::uint32_t>(streams_.size())).first->second;
    const Life life{trace_.blocks, index, bytes};
    if (!lives_.emplace(id, life).second) fail("id " + std::to_string(id) + " is in use already");
    ++trace_.blocks;
    live_ += live_bytes(bytes);
    trace_.peak_live_bytes = std::max(trace_.peak_live_bytes, live_);
    trace_.operations.push_back({life.block, life.stream, bytes, false});
  }

  void release(std::uint32_t id) {
    const auto found = lives_.find(id);
    if (found == lives_.end()) fail("id " + std::to_string(id) + " is not in use");
    const Life life = found->second;
    lives_.erase(found);
    live_ -= live_bytes(life.bytes);
    trace_.operations.push_back({life.block, life.stream, life.bytes, true});
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("record " + std::to_string(trace_.operations.size()) + ": " + what);
  }

  Trace trace_;
  std::uint64_t live_ = 0;
  std::unordered_map<std::uint32_t, Life> lives_;
  std::unordered_map<std::uint32_t, std::uint32_t> streams_;
};

}  // namespace

Trace read_trace(const std::string& path) {
  const std::string text = read_file(path);
  Reader reader;
  for (std::size_t at = 0; at < text.size(); at += kRecordBytes) {
    const char* const record = text.data() + at;
    reader.add(little_endian<std::uint32_t>(record), little_endian<std::uint32_t>(record + 4),
               little_endian<std::uint64_t>(record + 8));
  }
  if (text.empty()) throw std::runtime_error(path + " is empty");
  return reader.take();
}

}  // namespace bench
