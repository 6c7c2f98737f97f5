// What the replay asks of the fake libcuda; tests/fake_cuda/control.h documents the functions.
#pragma once

#include <cstddef>
#include <string>

namespace bench {

class FakeLibrary {
 public:
  // Opens the library that the cuda driver will open. Throws std::runtime_error.
  explicit FakeLibrary(const std::string& path);

  // Like a new process, with a device of so many bytes; accounting only, no memory behind pages.
  void start(std::size_t device_bytes, std::size_t page_bytes);
  // The most bytes of pages that existed at once since start().
  std::size_t peak_bytes() const;
  // Broken rules and what still exists, one per line; empty if all is well.
  std::string complaints() const;

 private:
  template <typename Function>
  Function find(const char* name) const;

  std::string path_;
  void* library_;
};

}  // namespace bench
