// cuGetProcAddress, which is how cuda-python and the CUDA runtime find the driver's functions.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "entry.h"

namespace fake {
namespace {

struct Function {
  const char* name;
  void* address;
};

// By the names without suffix, at the versions that cuda.h's macros name: there are no others here.
#define X(name) {"cu" #name, reinterpret_cast<void*>(&cu##name)},
const Function kFunctions[] = {FAKE_CUDA_APIS(X)};
#undef X

CUresult find(const char* symbol, void** out, CUdriverProcAddressQueryResult* status) {
  const auto found = std::find_if(std::begin(kFunctions), std::end(kFunctions),
                                  [&](const auto& f) { return std::strcmp(f.name, symbol) == 0; });
  const bool known = found != std::end(kFunctions);
  *out = known ? found->address : nullptr;
  if (status) {
    *status = known ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return known ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // namespace
}  // namespace fake

CUresult CUDAAPI cuGetProcAddress(const char* symbol, void** out, int version, cuuint64_t flags,
                                  CUdriverProcAddressQueryResult* status) {
  return fake::enter(fake::Api::kGetProcAddress, fake::kNothing, [&](fake::World&, fake::Lock&) {
    if (!symbol || !out || version <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (flags == CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM) return CUDA_ERROR_NOT_SUPPORTED;
    if (flags != CU_GET_PROC_ADDRESS_DEFAULT && flags != CU_GET_PROC_ADDRESS_LEGACY_STREAM) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    return fake::find(symbol, out, status);
  });
}
