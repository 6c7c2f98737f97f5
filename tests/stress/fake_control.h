// What the stress test asks of the fake libcuda; tests/fake_cuda/control.h documents the functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace stress {

class FakeControl {
 public:
  // Opens the library that the cuda driver will open. Throws std::runtime_error.
  explicit FakeControl(const std::string& path);

  // Like a new process, with small pages, and streams that finish their work as late as they may.
  void start(std::size_t granularity);

  // Work of `stream` is done when step() says so.
  void hold(std::uintptr_t stream) const;
  void release(std::uintptr_t stream) const;
  void step(std::uintptr_t stream, int count) const;
  void capture(std::uintptr_t stream, bool on) const;
  // A kernel that may touch [address, address + bytes).
  void launch(std::uintptr_t stream, std::uintptr_t address, std::size_t bytes) const;
  // Fresh memory is left as it is, which is faster than filling it.
  void no_poison() const;

  // The nth call of `name` from now fails with `code`, once.
  void fail(const char* name, std::uint64_t nth, int code) const;
  // Nothing can be created any more once `bytes` more are.
  void out_of_memory_after(std::size_t bytes) const;
  // Ends both.
  void clear_failures() const;
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
