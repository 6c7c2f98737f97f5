#include "injector.h"

#include <chrono>
#include <numeric>
#include <thread>

namespace fake {
namespace {

// These only read tables; real CUDA answers them even when the context is lost.
bool can_fail(Api api) {
  return api != Api::kGetErrorName && api != Api::kGetErrorString && api != Api::kDriverGetVersion;
}

}  // namespace

void delay(std::uint64_t ns) {
  if (ns >= 50'000) {
    std::this_thread::sleep_for(std::chrono::nanoseconds(ns));
    return;
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(ns);
  while (std::chrono::steady_clock::now() < end) {
  }
}

bool Injector::Rule::hits(Api called) {
  if (api && *api != called) return false;
  ++seen;
  if (seen < nth) return false;
  return count <= 0 || seen < nth + static_cast<std::uint64_t>(count);
}

Injector::Verdict Injector::on_call(Api api) {
  const std::size_t index = static_cast<std::size_t>(api);
  ++calls_[index];
  Verdict verdict{CUDA_SUCCESS, latency_ns_[index]};
  if (!can_fail(api)) return verdict;
  // Every rule sees every call, so that rules count independently of each other.
  for (Rule& rule : rules_) {
    if (!rule.hits(api) || verdict.code != CUDA_SUCCESS) continue;
    verdict.code = rule.code;
    ++failures_;
    if (rule.count < 0) sticky_ = rule.code;
  }
  if (verdict.code == CUDA_SUCCESS) verdict.code = sticky_;
  return verdict;
}

void Injector::fail(std::optional<Api> api, std::uint64_t nth, CUresult code, int count) {
  rules_.push_back(Rule{api, nth, code, count});
}

void Injector::latency(std::optional<Api> api, std::uint64_t ns) {
  if (api) {
    latency_ns_[static_cast<std::size_t>(*api)] = ns;
  } else {
    latency_ns_.fill(ns);
  }
}

std::uint64_t Injector::total_calls() const {
  return std::accumulate(calls_.begin(), calls_.end(), std::uint64_t{0});
}

}  // namespace fake
