// Control of the fake libcuda: what a test sets, and what it asks afterwards.
//
// Every function is thread-safe and may be called at any time, before cuInit too; none of them
// counts as a driver call, and none is delayed or made to fail by injection.
//
// Functions that return int give a CUresult: CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE for a bad
// argument (an unknown function name, a zero size), CUDA_ERROR_ILLEGAL_STATE for a setting that
// cannot change while objects exist, CUDA_ERROR_INVALID_HANDLE for an unknown stream.
//
// Functions that return text write at most `size` bytes into `buffer`, always terminated if `size`
// is not 0, and return the full length without the terminator, as snprintf does; lines are
// separated by '\n', so 0 means "nothing to say".
//
// A stream argument is a CUstream of the fake (created ones, also destroyed ones that still have
// work queued) or 0, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD: those of the calling thread's current
// device, or of device 0 where it has none.
#pragma once

#pragma GCC visibility push(default)

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- Life cycle and settings ----------------------------------------------------------------

// Back to a process that has not called cuInit: frees every object, forgets violations, counters,
// injections and latencies. Settings stay. Returns what was outstanding, as fake_check_leaks does.
// A thread that is blocked in a synchronize returns CUDA_ERROR_DEINITIALIZED.
size_t fake_reset(char* buffer, size_t size);

// Every setting below back to its default; refused while objects exist.
int fake_config_defaults(void);
// Memory of each device. Default 1 GiB. May change at any time, below what is in use too (as when
// another process takes memory): free memory is then 0.
int fake_config_device_bytes(size_t bytes);
// Default 2 MiB; a power of two of at least 4096. Only while nothing exists (see
// fake_check_leaks).
int fake_config_granularity(size_t bytes);
// Default 2, at most 8. Only while nothing exists.
int fake_config_devices(int count);
// Whether fresh memory is filled with 0xFF (default 1) or with zeroes (0). Real CUDA promises
// neither.
int fake_config_poison(int on);
// With 1 there is no memory behind handles, only accounting: mapped ranges stay inaccessible to the
// CPU, copies and memsets are checked and counted but move nothing. Default 0. Only while nothing
// exists.
int fake_config_elide(int on);
// How long a synchronize may block before it logs a violation "deadlock" and returns
// CUDA_ERROR_LAUNCH_TIMEOUT. Default 20000.
int fake_config_watchdog_ms(unsigned milliseconds);
// cuMemCreate and cuMemAlloc fail with CUDA_ERROR_OUT_OF_MEMORY once they have created more than
// `bytes` in total since this call (what was freed in between counts, too). SIZE_MAX: never.
int fake_config_oom_at(size_t bytes);

// When the work of a stream is done.
enum {
  FAKE_IMMEDIATE = 0,  // as soon as its stream order allows: the default
  FAKE_HELD = 1,       // when the test says so: fake_stream_step, fake_stream_release
  FAKE_LAZY = 2        // when a thread blocks for it (cuStreamSynchronize, cuEventSynchronize): the
                       // slowest device possible. Queries alone never make it proceed.
};
// Mode of streams that come to exist from now on, the implicit ones included.
int fake_config_stream_mode(int mode);

// ---- Injection ------------------------------------------------------------------------------

// Makes calls number nth ... nth + count - 1 of `name` ("cuMemMap"), counted from now and from 1,
// return `code` and do nothing else. "*": any call, except cuGetErrorName, cuGetErrorString and
// cuDriverGetVersion. count 0: all from the nth on. count -1: the nth, and from then on every call
// of any name (a lost context). Rules add up, and each counts for itself.
int fake_fail(const char* name, uint64_t nth, int code, int count);
// Forgets all rules, not a sticky error.
void fake_clear_failures(void);
// From now on every call returns `code`; CUDA_SUCCESS ends it.
void fake_sticky(int code);
// Each call of `name` ("*": all) takes this much longer; slept outside the fake's lock, so that
// calls of several threads overlap. 0 ends it.
int fake_latency(const char* name, uint64_t nanoseconds);

// ---- Streams and kernels --------------------------------------------------------------------

int fake_stream_mode(CUstream stream, int mode);
int fake_stream_hold(CUstream stream);     // = FAKE_HELD
int fake_stream_release(CUstream stream);  // = FAKE_IMMEDIATE: runs what is queued
// Runs up to `count` queued pieces of work (kernels, copies, memsets, event records, event waits)
// of a held stream; stops at a wait for an event that is not done. Returns how many ran, or -1 for
// an unknown stream.
int fake_stream_step(CUstream stream, int count);
// Queued pieces of work; -1 for an unknown stream.
int fake_stream_pending(CUstream stream);
// Live created streams, oldest first; returns how many there are, writes at most `count`.
size_t fake_streams(CUstream* out, size_t count);
// Pretends that a graph capture is in progress on `stream`. Then calls that CUDA calls potentially
// unsafe fail with CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED unless the thread's capture mode is
// relaxed; kernels given to the stream are checked and not run; copies and memsets on it are
// violations (captured accesses to slots are kernel nodes only).
int fake_stream_capture(CUstream stream, int on);
// A kernel that may touch the given ranges of bytes. Every byte must be mapped with access for the
// stream's device now, and stay so until the kernel is done: else a violation. `name` is for
// messages. Computes nothing.
int fake_launch(CUstream stream, const CUdeviceptr* starts, const size_t* sizes, int count,
                const char* name);

// ---- Bytes ----------------------------------------------------------------------------------

// Device memory as the CPU sees it now. CUDA_ERROR_ILLEGAL_ADDRESS where a byte is not mapped or
// not accessible (a plain pointer access would fault there), CUDA_ERROR_NOT_SUPPORTED with elide.
int fake_read(CUdeviceptr address, void* out, size_t bytes);
int fake_write(CUdeviceptr address, const void* in, size_t bytes);

// ---- Results --------------------------------------------------------------------------------

// Broken rules of the project, oldest first (the first 1000).
size_t fake_violations(char* buffer, size_t size);
void fake_clear_violations(void);
// One line for each reservation, handle, mapping, allocation, event, stream or retained context
// that exists now.
size_t fake_check_leaks(char* buffer, size_t size);

// Calls of `name` since the last reset; NULL: of all together; -1 for an unknown name.
int64_t fake_calls(const char* name);
// The names that fake_calls knows.
size_t fake_call_names(char* buffer, size_t size);
void fake_reset_calls(void);

struct fake_stats {
  uint64_t bytes_live;  // of handles and cuMemAlloc, over all devices
  uint64_t bytes_peak;
  uint64_t bytes_created;  // ever, since the last reset
  uint64_t handles_live;   // not yet destroyed, cuMemAlloc's included
  uint64_t handles_peak;
  uint64_t mappings_live;  // cuMemAlloc's included
  uint64_t mappings_peak;
  uint64_t reservations_live;  // cuMemAlloc's included
  uint64_t reserved_bytes;
  uint64_t host_allocs_live;
  uint64_t streams_live;  // created ones
  uint64_t events_live;
  uint64_t contexts_retained;
  uint64_t work_pending;  // queued and not done, over all streams
  uint64_t launches;
  uint64_t copies;  // done, and the bytes of them; so for memsets
  uint64_t copied_bytes;
  uint64_t memsets;
  uint64_t memset_bytes;
  uint64_t access_regrants;    // mappings given access to that they had already
  uint64_t failures_injected;  // by fake_fail; not by sticky errors or fake_config_oom_at
  uint64_t violations;
  uint64_t physical_bytes;  // host memory in use by the memfd
};
void fake_get_stats(struct fake_stats* out);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
