// The three kinds of failure of the native core.
//
//   bad input   std::invalid_argument   names the value and the remedy; nothing has changed
//   exhaustion  OutOfPages, PagesGone   recoverable; nothing has changed
//   driver      DriverError             carries the call, its code and its arguments
//
// A broken invariant is a bug of ours and raises InvariantError from `check()`.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace vattn {

// Not enough physical memory, or not enough of the budget, for a request. The caller may release
// sequences, lower its demand or raise the budget, and try again.
class OutOfPages : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Every slot of a cache is taken.
class OutOfSlots : public OutOfPages {
 public:
  using OutOfPages::OutOfPages;
};

// Not enough memory for a tensor: what torch.OutOfMemoryError is made of.
class OutOfMemory : public OutOfPages {
 public:
  using OutOfPages::OutOfPages;
};

// The operating system allows no further mappings, whatever memory is left. Unmapping what is stale
// helps.
class OutOfMappings : public OutOfPages {
 public:
  using OutOfPages::OutOfPages;
};

// What a kept slot held is no longer there: its pages were taken for somebody else. The caller does
// without it.
class PagesGone : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A driver call failed for a reason other than memory. `fatal()` says that the device's context is
// lost (an illegal address in an earlier kernel, say): no later call can succeed.
class DriverError : public std::runtime_error {
 public:
  DriverError(std::string call, int code, const std::string& detail, bool fatal = false)
      : std::runtime_error(call + " failed: " + detail),
        call_(std::move(call)),
        code_(code),
        fatal_(fatal) {}

  const std::string& call() const noexcept { return call_; }
  int code() const noexcept { return code_; }
  bool fatal() const noexcept { return fatal_; }

 private:
  std::string call_;
  int code_;
  bool fatal_;
};

class InvariantError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

}  // namespace vattn
