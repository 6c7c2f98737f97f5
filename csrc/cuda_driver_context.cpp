#include "cuda_driver_context.h"

namespace vattn {
namespace {

// The context that ContextScope left on this thread, which had none.
thread_local CUcontext left_on_this_thread = nullptr;

}  // namespace

PrimaryContext::PrimaryContext(const CudaApi& api, CUdevice device) : api_(api), device_(device) {
  api.check_memory(api.cuDevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain",
                   {{"device", static_cast<std::uint64_t>(device)}});
}

PrimaryContext::~PrimaryContext() {
  if (context_ == nullptr) return;
  // Results are ignored: at the end of the process the driver may be gone already.
  CUcontext current = nullptr;
  if (left_on_this_thread == context_ && api_.cuCtxGetCurrent(&current) == CUDA_SUCCESS &&
      current == context_) {
    // Ours may be the last reference: leave no dead context behind for others on this thread.
    api_.cuCtxSetCurrent(nullptr);
    left_on_this_thread = nullptr;
  }
  api_.cuDevicePrimaryCtxRelease(device_);
}

ContextScope::ContextScope(const CudaApi& api, CUcontext context) : api_(api) {
  CUcontext current = nullptr;
  api.check(api.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  if (current == context) return;
  api.check(api.cuCtxSetCurrent(context), "cuCtxSetCurrent",
            {{"context", reinterpret_cast<std::uintptr_t>(context), true}});
  previous_ = current;
  if (current == nullptr) left_on_this_thread = context;
}

ContextScope::~ContextScope() {
  // It fails if the other context was destroyed meanwhile; then ours is as good as any.
  if (previous_ != nullptr) api_.cuCtxSetCurrent(previous_);
}

RelaxedCapture::RelaxedCapture(const CudaApi& api) : api_(api) {
  api.check(api.cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode");
}

RelaxedCapture::~RelaxedCapture() { api_.cuThreadExchangeStreamCaptureMode(&mode_); }

}  // namespace vattn
