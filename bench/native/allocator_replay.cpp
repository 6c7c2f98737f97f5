// Replays a trace of allocations through a policy, with every check, and prints what it took.
//
// Prints one JSON object. Exit status: 0; 1 if a check failed or something cannot be read, with the
// reason on standard error; 2 for arguments that make no sense. A trace that does not fit the
// device is a result: "out_of_memory_at" is the operation, and the figures are of those before it.
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <optional>

#include "json.h"
#include "pair.h"
#include "replay.h"
#include "self_test.h"

namespace {

using bench::JsonObject;

#ifdef VATTN_FAKE_CUDA
constexpr const char* kFakeCuda = VATTN_FAKE_CUDA;
#else
constexpr const char* kFakeCuda = "";
#endif

const char* const kUsage =
    "usage: vattn_allocator_replay TRACE.raw --policy NAME --device-memory BYTES [--repeat N]\n"
    "       vattn_allocator_replay --pair BYTES [--policy NAME] [--threads N]\n"
    "       vattn_allocator_replay --self-test\n"
    "options: --libcuda FILE  the fake CUDA driver, for the policy vattn\n"
    "         --repeat 0      no timing\n";

class BadUsage : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct Arguments {
  std::string trace;
  std::string policy = "vattn";
  std::size_t device_bytes = 0;
  std::size_t repeat = 5;
  std::optional<std::size_t> pair_bytes{};
  std::uint32_t threads = 2;
  std::string libcuda = kFakeCuda;
  bool self_test = false;
};

std::size_t number(const std::string& option, const std::string& text, std::size_t least,
                   std::size_t most) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(text.c_str(), &end, 10);
  const bool digits = !text.empty() && text[0] >= '0' && text[0] <= '9' && *end == '\0';
  if (!digits || errno != 0 || value < least || value > most) {
    throw BadUsage(option + " " + text + ": give a whole number from " + std::to_string(least) +
                   " to " + std::to_string(most));
  }
  return value;
}

Arguments parse(int count, char** words) {
  constexpr std::size_t kMost = std::size_t{1} << 46;
  Arguments found;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == count) throw BadUsage(word + " needs a value");
      return words[++i];
    };
    if (word == "--policy") {
      found.policy = value();
    } else if (word == "--device-memory") {
      found.device_bytes = number(word, value(), bench::kDriverPageBytes, kMost);
    } else if (word == "--repeat") {
      found.repeat = number(word, value(), 0, 1000);
    } else if (word == "--pair") {
      found.pair_bytes = number(word, value(), 1, kMost);
    } else if (word == "--threads") {
      found.threads = static_cast<std::uint32_t>(number(word, value(), 1, 64));
    } else if (word == "--libcuda") {
      found.libcuda = value();
    } else if (word == "--self-test") {
      found.self_test = true;
    } else if (word.starts_with("--") || !found.trace.empty()) {
      throw BadUsage("unexpected argument " + word);
    } else {
      found.trace = word;
    }
  }
  if (found.self_test || found.pair_bytes) {
    if (!found.trace.empty()) throw BadUsage(found.trace + ": this mode takes no trace");
  } else if (found.trace.empty() || found.device_bytes == 0) {
    throw BadUsage("give a trace, --policy and --device-memory");
  }
  return found;
}

JsonObject by_call(const bench::CallCounts& calls) {
  JsonObject out;
  for (std::size_t i = 0; i < bench::kCalls; ++i) {
    if (calls[i] != 0) out.add(bench::call_name(static_cast<bench::Call>(i)), calls[i]);
  }
  return out;
}

void replay(const Arguments& arguments) {
  const bench::Trace trace = bench::read_trace(arguments.trace);
  const auto make = [&] {
    return bench::make_policy(arguments.policy,
                              {arguments.device_bytes, trace.streams, arguments.libcuda});
  };
  const bench::Checked checked = bench::replay_checked(trace, make);
  JsonObject out;
  out.add("trace", std::filesystem::path(arguments.trace).stem().string());
  out.add("policy", arguments.policy);
  out.add("device_bytes", arguments.device_bytes);
  out.add("operations", trace.operations.size());
  out.add("streams", trace.streams);
  out.add("peak_live_bytes", trace.peak_live_bytes);
  out.add("peak_physical_bytes", checked.peak_physical_bytes);
  out.add("driver_calls", bench::total(checked.calls));
  out.add("driver_calls_second_half", bench::second_half(checked.by_part));
  out.add_all("driver_calls_by_tenth", checked.by_part);
  out.add("calls", by_call(checked.calls));
  out.add("modelled_driver_ms", bench::modelled_ms(checked.calls));
  if (checked.out_of_memory_at || arguments.repeat == 0) {
    out.add_null("ns_per_op");
    out.add_null("ns_per_op_second_half");
  } else {
    const bench::Timed timed = bench::replay_timed(trace, make, static_cast<int>(arguments.repeat));
    out.add("ns_per_op", timed.ns_per_op);
    out.add("ns_per_op_second_half", timed.ns_per_op_second_half);
  }
  if (checked.out_of_memory_at) {
    out.add("out_of_memory_at", *checked.out_of_memory_at);
  } else {
    out.add_null("out_of_memory_at");
  }
  out.add("live_at_end", trace.live_at_end);
  std::puts(out.text().c_str());
}

void pair(const Arguments& arguments) {
  const std::size_t bytes = *arguments.pair_bytes;
  const std::size_t room = bench::round_up(bytes, 64 * bench::kMiB) * 4 * (arguments.threads + 1);
  const std::unique_ptr<bench::Policy> policy =
      bench::make_policy(arguments.policy, {room, arguments.threads, arguments.libcuda});
  const bench::PairTimes times = bench::measure_pair(*policy, bytes, arguments.threads);
  policy->close();
  JsonObject out;
  out.add("policy", arguments.policy);
  out.add("bytes", bytes);
  out.add("threads", arguments.threads);
  out.add("single_ns", times.single_ns);
  out.add("threads_ns", times.threads_ns);
  out.add("ratio", times.ratio);
  out.add("driver_calls", bench::total(times.calls));
  out.add("calls", by_call(times.calls));
  std::puts(out.text().c_str());
}

}  // namespace

int main(int count, char** words) {
  try {
    const Arguments arguments = parse(count, words);
    if (arguments.self_test) return bench::self_test() ? 0 : 1;
    if (arguments.pair_bytes) {
      pair(arguments);
    } else {
      replay(arguments);
    }
    return 0;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "error: %s\n%s", error.what(), kUsage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
