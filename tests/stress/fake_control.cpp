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

std::string FakeControl::text(const char* name) const {
  const auto write = find<std::size_t(char*, std::size_t)>(name);
  std::string out(write(nullptr, 0) + 1, '\0');
  out.resize(write(out.data(), out.size()));
  return out;
}

std::string FakeControl::violations() const { return text("fake_violations"); }
std::string FakeControl::leaks() const { return text("fake_check_leaks"); }

}  // namespace stress
