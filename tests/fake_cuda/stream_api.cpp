// Streams, events and capture state.
#include <utility>

#include "submit.h"

using fake::Api, fake::enter, fake::Event, fake::kContext, fake::kInit, fake::kUnsafe, fake::Lock,
    fake::StreamPtr, fake::Work, fake::World;

CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned int flags) {
  return enter(Api::kStreamCreate, kContext, [&](World& world, Lock&) {
    if (!stream || (flags & ~CU_STREAM_NON_BLOCKING) != 0) return CUDA_ERROR_INVALID_VALUE;
    *stream = world.streams.create(world.current_device(), flags);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuStreamDestroy(CUstream stream) {
  return enter(Api::kStreamDestroy, kContext, [&](World& world, Lock&) {
    const bool implicit = !stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
    if (implicit || !world.streams.destroy(stream)) return CUDA_ERROR_INVALID_HANDLE;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuStreamSynchronize(CUstream handle) {
  return enter(Api::kStreamSynchronize, kContext, [&](World& world, Lock& lock) {
    const StreamPtr stream = find_stream(world, handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return block(world, lock, world.streams.outstanding(*stream), "cuStreamSynchronize");
  });
}

CUresult CUDAAPI cuCtxSynchronize() {
  return enter(Api::kCtxSynchronize, kContext | kUnsafe, [&](World& world, Lock& lock) {
    const auto marks = world.streams.outstanding(world.current_device());
    return block(world, lock, marks, "cuCtxSynchronize");
  });
}

CUresult CUDAAPI cuStreamQuery(CUstream handle) {
  return enter(Api::kStreamQuery, kContext, [&](World& world, Lock&) {
    const StreamPtr stream = find_stream(world, handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return world.streams.outstanding(*stream).empty() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
  });
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned int flags) {
  return enter(Api::kStreamWaitEvent, kContext, [&](World& world, Lock&) {
    const StreamPtr stream = find_stream(world, handle);
    const Event* event = world.streams.find_event(event_handle);
    if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
    if ((flags & ~CU_EVENT_WAIT_EXTERNAL) != 0) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capturing) {
      return event->captured ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
    if (event->done()) return CUDA_SUCCESS;
    Work work{.name = "event wait", .ranges = {}, .after = {event->last}, .run = {}, .done = {}};
    world.streams.submit(stream, std::move(work));
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return enter(Api::kStreamIsCapturing, kContext, [&](World& world, Lock&) {
    const StreamPtr stream = find_stream(world, handle);
    if (!status) return CUDA_ERROR_INVALID_VALUE;
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *status = stream->capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return enter(Api::kThreadExchangeStreamCaptureMode, kInit, [&](World& world, Lock&) {
    if (!mode || *mode < CU_STREAM_CAPTURE_MODE_GLOBAL || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    std::swap(*mode, world.capture_mode());
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuEventCreate(CUevent* event, unsigned int flags) {
  return enter(Api::kEventCreate, kContext, [&](World& world, Lock&) {
    constexpr unsigned kKnown = CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING;
    if (!event || (flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
    *event = world.streams.create_event(world.current_device());
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuEventDestroy(CUevent event) {
  return enter(Api::kEventDestroy, kContext, [&](World& world, Lock&) {
    return world.streams.destroy_event(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
  });
}

CUresult CUDAAPI cuEventRecord(CUevent event_handle, CUstream handle) {
  return enter(Api::kEventRecord, kContext, [&](World& world, Lock&) {
    const StreamPtr stream = find_stream(world, handle);
    Event* event = world.streams.find_event(event_handle);
    if (!stream || !event || stream->device != event->device) return CUDA_ERROR_INVALID_HANDLE;
    event->captured = stream->capturing;
    if (stream->capturing) return CUDA_SUCCESS;
    event->last = world.streams.submit(
        stream, Work{.name = "event record", .ranges = {}, .after = {}, .run = {}, .done = {}});
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuEventQuery(CUevent handle) {
  return enter(Api::kEventQuery, kInit | kUnsafe, [&](World& world, Lock&) {
    const Event* event = world.streams.find_event(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
    return event->done() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
  });
}

CUresult CUDAAPI cuEventSynchronize(CUevent handle) {
  return enter(Api::kEventSynchronize, kContext | kUnsafe, [&](World& world, Lock& lock) {
    const Event* event = world.streams.find_event(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
    if (event->done()) return CUDA_SUCCESS;
    return block(world, lock, {event->last}, "cuEventSynchronize");
  });
}
