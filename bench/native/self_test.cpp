#include "self_test.h"

#include <cstdio>

#include "json.h"
#include "replay.h"

namespace bench {
namespace {

// Hands out fresh addresses for ever, and counts memory as it should.
class Bump : public Policy {
 public:
  const char* name() const noexcept override { return "bump"; }
  void* allocate(std::size_t bytes, std::uint32_t) override {
    const Address address = next_;
    next_ += live_bytes(bytes);
    physical_ += live_bytes(bytes);
    return reinterpret_cast<void*>(address);
  }
  void free(void*, std::size_t bytes, std::uint32_t) override { physical_ -= live_bytes(bytes); }
  std::size_t physical_bytes() const override { return physical_; }
  std::size_t peak_physical_bytes() const override { return physical_; }
  CallCounts driver_calls() const override { return {}; }
  void check() const override {}
  void close() override {}

 protected:
  Address next_ = kMiB;
  std::size_t physical_ = 0;
};

class Overlapping final : public Bump {
  void* allocate(std::size_t bytes, std::uint32_t stream) override {
    next_ = kMiB + kAlignment;
    static_cast<void>(stream);
    physical_ += live_bytes(bytes);
    return reinterpret_cast<void*>(made_++ == 0 ? kMiB : next_);
  }
  int made_ = 0;
};

class Misaligned final : public Bump {
  void* allocate(std::size_t bytes, std::uint32_t stream) override {
    return static_cast<char*>(Bump::allocate(bytes, stream)) + 256;
  }
};

class Null final : public Bump {
  void* allocate(std::size_t, std::uint32_t) override { return nullptr; }
};

class Unbacked final : public Bump {
  std::size_t physical_bytes() const override { return physical_ / 2; }
};

class Broken final : public Bump {
  void check() const override { throw std::logic_error("an invariant does not hold"); }
};

class Leaking final : public Bump {
  void close() override { throw std::logic_error("a page is left"); }
};

// Three blocks, the second released before the third.
Trace small_trace() {
  Trace trace;
  trace.operations = {
      {0, 0, 4096, false}, {1, 0, 8192, false}, {1, 0, 8192, true}, {2, 0, 512, false}};
  trace.blocks = 3;
  trace.streams = 1;
  return trace;
}

template <typename Breaking>
bool noticed(const char* rule, JsonObject& out) {
  try {
    replay_checked(small_trace(), [] { return std::make_unique<Breaking>(); });
  } catch (const std::logic_error& error) {
    out.add(rule, std::string(error.what()));
    return true;
  }
  out.add_null(rule);
  return false;
}

}  // namespace

bool self_test() {
  replay_checked(small_trace(), [] { return std::make_unique<Bump>(); });  // which breaks none
  JsonObject out;
  bool all = noticed<Overlapping>("overlap", out);
  all = noticed<Misaligned>("alignment", out) && all;
  all = noticed<Null>("null", out) && all;
  all = noticed<Unbacked>("physical", out) && all;
  all = noticed<Broken>("check", out) && all;
  all = noticed<Leaking>("close", out) && all;
  std::puts(out.text().c_str());
  return all;
}

}  // namespace bench
