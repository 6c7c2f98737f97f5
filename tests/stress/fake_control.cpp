#include "fake_control.h"

#include <dlfcn.h>

#include <stdexcept>

namespace stress {
namespace {

constexpr int kLazy = 2;  // FAKE_LAZY

void require(int code, const char* name) {
  if (code != 0) throw std::runtime_error(std::string(name) + " gave " + std::to_string(code));
}

}  // namespace

FakeControl::FakeControl(const std::string& path)
    : path_(path), library_(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (library_ == nullptr) throw std::runtime_error(path + " is not there; run `make fake`");
}

template <typename Function>
Function* FakeControl::find(const char* name) const {
  void* found = ::dlsym(library_, name);
  if (found == nullptr) throw std::runtime_error(path_ + " has no function " + name);
  return reinterpret_cast<Function*>(found);
}

void FakeControl::start(std::size_t granularity) {
  find<std::size_t(char*, std::size_t)>("fake_reset")(nullptr, 0);
  require(find<int(std::size_t)>("fake_config_granularity")(granularity), "granularity");
  require(find<int(int)>("fake_config_stream_mode")(kLazy), "stream mode");
}

void FakeControl::hold(std::uintptr_t stream) const {
  require(find<int(std::uintptr_t)>("fake_stream_hold")(stream), "hold");
}

void FakeControl::release(std::uintptr_t stream) const {
  require(find<int(std::uintptr_t)>("fake_stream_release")(stream), "release");
}

void FakeControl::step(std::uintptr_t stream, int count) const {
  find<int(std::uintptr_t, int)>("fake_stream_step")(stream, count);
}

void FakeControl::capture(std::uintptr_t stream, bool on) const {
  require(find<int(std::uintptr_t, int)>("fake_stream_capture")(stream, on), "capture");
}

void FakeControl::launch(std::uintptr_t stream, std::uintptr_t address, std::size_t bytes) const {
  const unsigned long long start = address;
  using Launch =
      int(std::uintptr_t, const unsigned long long*, const std::size_t*, int, const char*);
  require(find<Launch>("fake_launch")(stream, &start, &bytes, 1, "kernel"), "launch");
}

void FakeControl::no_poison() const { require(find<int(int)>("fake_config_poison")(0), "poison"); }

void FakeControl::fail(const char* name, std::uint64_t nth, int code) const {
  require(find<int(const char*, std::uint64_t, int, int)>("fake_fail")(name, nth, code, 1), name);
}

void FakeControl::out_of_memory_after(std::size_t bytes) const {
  require(find<int(std::size_t)>("fake_config_oom_at")(bytes), "oom_at");
}

void FakeControl::clear_failures() const {
  find<void()>("fake_clear_failures")();
  require(find<int(std::size_t)>("fake_config_oom_at")(SIZE_MAX), "oom_at");
}

std::string FakeControl::text(const char* name) const {
  const auto write = find<std::size_t(char*, std::size_t)>(name);
  std::string out(write(nullptr, 0) + 1, '\0');
  out.resize(write(out.data(), out.size()));
  return out;
}

std::string FakeControl::violations() const { return text("fake_violations"); }
std::string FakeControl::leaks() const { return text("fake_check_leaks"); }

}  // namespace stress
