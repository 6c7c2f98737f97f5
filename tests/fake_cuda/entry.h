// What every driver function does before its own work.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

#include "state.h"

namespace fake {

// What a call needs, besides its arguments being right.
inline constexpr unsigned kNothing = 0;
inline constexpr unsigned kInit = 1;     // cuInit
inline constexpr unsigned kContext = 2;  // a current context; includes kInit
inline constexpr unsigned kUnsafe = 4;   // CUDA's "potentially unsafe" during graph capture

inline CUresult check_needs(World& world, unsigned needs) {
  if ((needs & (kInit | kContext)) != 0 && !world.initialized) return CUDA_ERROR_NOT_INITIALIZED;
  if ((needs & kContext) != 0) {
    const int device = world.current_device();
    if (device < 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (world.devices[static_cast<std::size_t>(device)].retains == 0) {
      return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
  }
  if ((needs & kUnsafe) != 0 && world.streams.any_capturing() &&
      world.capture_mode() != CU_STREAM_CAPTURE_MODE_RELAXED) {
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return CUDA_SUCCESS;
}

// Counts the call, delays it outside the lock, fails it if so injected, checks what it needs, and
// runs `body(world, lock)` under the lock. Nothing is thrown into the caller.
template <typename Body>
CUresult enter(Api api, unsigned needs, Body&& body) noexcept {
  World& world = World::get();
  try {
    Lock lock(world.mutex);
    const Injector::Verdict verdict = world.injector.on_call(api);
    if (verdict.latency_ns > 0) {
      lock.unlock();
      delay(verdict.latency_ns);
      lock.lock();
    }
    if (verdict.code != CUDA_SUCCESS) return verdict.code;
    const CUresult code = check_needs(world, needs);
    return code != CUDA_SUCCESS ? code : std::forward<Body>(body)(world, lock);
  } catch (const std::bad_alloc&) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  } catch (...) {
    return CUDA_ERROR_UNKNOWN;
  }
}

}  // namespace fake
