// What the stress test asks of the fake libcuda; tests/fake_cuda/control.h documents the functions.
#pragma once

#include <cstddef>
#include <string>

namespace stress {

class FakeControl {
 public:
  // Opens the library that the cuda driver will open. Throws std::runtime_error.
  explicit FakeControl(const std::string& path);

  // Like a new process, with small pages, and streams that finish their work as late as they may.
  void start(std::size_t granularity);
  // Broken rules, and what still exists, one per line.
  std::string violations() const;
  std::string leaks() const;

 private:
  template <typename Function>
  Function* find(const char* name) const;
  std::string text(const char* name) const;

  std::string path_;
  void* library_;
};

}  // namespace stress
