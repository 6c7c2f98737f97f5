// What the replay asks of an allocation policy, and the device that the models of torch's allocator
// count their calls on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace bench {

using Address = std::uintptr_t;

inline constexpr std::size_t kKiB = std::size_t{1} << 10;
inline constexpr std::size_t kMiB = std::size_t{1} << 20;
inline constexpr std::size_t kAlignment = 512;             // torch's smallest block
inline constexpr std::size_t kDriverPageBytes = 2 * kMiB;  // what a CUDA driver hands out

constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// What a request counts as when it is live: torch's rounding.
constexpr std::size_t live_bytes(std::size_t bytes) {
  return bytes < kAlignment ? kAlignment : round_up(bytes, kAlignment);
}

// Calls as an application makes them; a page of the driver that is mapped with another is a call of
// its own, access is set once for a range.
enum class Call : std::uint8_t {
  kMalloc,
  kFree,
  kReserve,
  kAddressFree,
  kCreate,
  kRelease,
  kMap,
  kSetAccess,
  kUnmap,
  kSynchronize,
  kEvent,
  kCopy,
  kFill,
  kCount
};
inline constexpr std::size_t kCalls = static_cast<std::size_t>(Call::kCount);
const char* call_name(Call call) noexcept;

using CallCounts = std::array<std::uint64_t, kCalls>;
std::uint64_t total(const CallCounts& counts) noexcept;
CallCounts difference(CallCounts after, const CallCounts& before) noexcept;
// What so many calls take by published figures; the constants say whose.
double modelled_ms(const CallCounts& counts) noexcept;

// The device cannot give what a request needs, not even without what is cached.
class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Policy {
 public:
  virtual ~Policy() = default;
  Policy() = default;
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  virtual const char* name() const noexcept = 0;
  // Pre: bytes > 0, stream < the count that the policy was made for. Thread-safe. Throws
  // OutOfMemory.
  virtual void* allocate(std::size_t bytes, std::uint32_t stream) = 0;
  // Pre: what allocate() gave for the same bytes and stream, once.
  virtual void free(void* address, std::size_t bytes, std::uint32_t stream) = 0;
  // Bytes of the physical pages that the policy holds, now and at most so far.
  virtual std::size_t physical_bytes() const = 0;
  virtual std::size_t peak_physical_bytes() const = 0;
  virtual CallCounts driver_calls() const = 0;
  // Throws std::logic_error where an invariant does not hold.
  virtual void check() const = 0;
  // Gives everything back. Pre: nothing is live. Throws std::logic_error if something is left or a
  // rule of the driver was broken.
  virtual void close() = 0;
};

struct PolicyOptions {
  std::size_t device_bytes = 0;  // memory of the device, all of it for the policy
  std::uint32_t streams = 1;     // stream numbers are below this
  std::string libcuda;           // of the policies that need a driver: the fake one
};

// "vattn", "native", "expandable" or "direct". Throws std::invalid_argument for another name.
std::unique_ptr<Policy> make_policy(const std::string& name, const PolicyOptions& options);
// The names, for messages: "vattn, native, expandable or direct".
std::string policy_names();

std::unique_ptr<Policy> make_native_policy(const PolicyOptions& options);
std::unique_ptr<Policy> make_expandable_policy(const PolicyOptions& options);
std::unique_ptr<Policy> make_direct_policy(const PolicyOptions& options);
std::unique_ptr<Policy> make_vattn_policy(const PolicyOptions& options);

}  // namespace bench
