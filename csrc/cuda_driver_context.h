// What surrounds every call of the CUDA driver: a context that lives, is current on the calling
// thread, and is not disturbed by a graph capture.
#pragma once

#include "cuda_api.h"

namespace vattn {

// A reference on a device's primary context, the one that PyTorch uses, too.
class PrimaryContext {
 public:
  PrimaryContext(const CudaApi& api, CUdevice device);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  CUcontext get() const noexcept { return context_; }
  // In a forked child there is no context to give back, and CUDA must not be called.
  void abandon() noexcept { context_ = nullptr; }

 private:
  const CudaApi& api_;
  CUdevice device_;
  CUcontext context_ = nullptr;
};

// Makes a context current on this thread. If another one was current it is again afterwards; if
// there was none ours stays, so that the next call of this thread finds it in place.
class ContextScope {
 public:
  ContextScope(const CudaApi& api, CUcontext context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const CudaApi& api_;
  CUcontext previous_ = nullptr;  // to put back; null: nothing
};

// Lets this thread manage memory while some thread captures a graph. CUDA refuses such calls then,
// because an allocation inside a graph is usually a mistake; ours are never part of the graph.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const CudaApi& api);
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const CudaApi& api_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // then the one to put back
};

}  // namespace vattn
