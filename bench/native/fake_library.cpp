#include "fake_library.h"

#include <dlfcn.h>

#include <stdexcept>

#include "../../tests/fake_cuda/control.h"

namespace bench {
namespace {

void require(int code, const char* what) {
  if (code == 0) return;
  throw std::runtime_error(std::string(what) + " of the fake CUDA driver: it gave " +
                           std::to_string(code));
}

}  // namespace

FakeLibrary::FakeLibrary(const std::string& path)
    : path_(path), library_(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (library_ != nullptr) return;
  throw std::runtime_error("the fake CUDA driver '" + path_ +
                           "' is not there: run `make fake`, or give --libcuda FILE");
}

template <typename Function>
Function FakeLibrary::find(const char* name) const {
  void* const found = ::dlsym(library_, name);
  if (found == nullptr) throw std::runtime_error(path_ + " has no function " + name);
  return reinterpret_cast<Function>(found);
}

void FakeLibrary::start(std::size_t device_bytes, std::size_t page_bytes) {
  find<decltype(&fake_reset)>("fake_reset")(nullptr, 0);
  require(find<decltype(&fake_config_defaults)>("fake_config_defaults")(), "settings");
  require(find<decltype(&fake_config_granularity)>("fake_config_granularity")(page_bytes),
          "page size");
  require(find<decltype(&fake_config_device_bytes)>("fake_config_device_bytes")(device_bytes),
          "device memory");
  require(find<decltype(&fake_config_elide)>("fake_config_elide")(1), "accounting alone");
}

std::size_t FakeLibrary::peak_bytes() const {
  fake_stats stats{};
  find<decltype(&fake_get_stats)>("fake_get_stats")(&stats);
  return stats.bytes_peak;
}

std::string FakeLibrary::complaints() const {
  std::string out;
  for (const char* name : {"fake_violations", "fake_check_leaks"}) {
    const auto write = find<decltype(&fake_violations)>(name);
    std::string text(write(nullptr, 0) + 1, '\0');
    text.resize(write(text.data(), text.size()));
    out += text;
  }
  return out;
}

}  // namespace bench
