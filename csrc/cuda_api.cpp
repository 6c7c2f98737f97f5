#include "cuda_api.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

namespace vattn {
namespace {

constexpr const char* kDefaultLibrary = "libcuda.so.1";

// Numbers, because headers of CUDA 12 lack some of the names.
constexpr std::array kFatalCodes = {
    4,    // DEINITIALIZED: the process is exiting
    214,  // ECC_UNCORRECTABLE
    220,  // NVLINK_UNCORRECTABLE
    226,  // CONTAINED: a hardware fault
    700,  // ILLEGAL_ADDRESS
    702,  // LAUNCH_TIMEOUT
    709,  // CONTEXT_IS_DESTROYED
    710,  // ASSERT in a kernel
    714,  // HARDWARE_STACK_ERROR
    715,  // ILLEGAL_INSTRUCTION
    716,  // MISALIGNED_ADDRESS
    717,  // INVALID_ADDRESS_SPACE
    718,  // INVALID_PC
    719,  // LAUNCH_FAILED
    721,  // TENSOR_MEMORY_LEAK
    810,  // MPS_CLIENT_TERMINATED
    911,  // EXTERNAL_DEVICE
};

std::string library_path(const std::string& path) {
  if (!path.empty()) return path;
  const char* named = std::getenv("VATTN_LIBCUDA");
  return named != nullptr && *named != '\0' ? named : kDefaultLibrary;
}

void* find_symbol(void* library, const std::string& path, const char* symbol) {
  void* address = ::dlsym(library, symbol);
  if (address != nullptr) return address;
  throw DriverError("dlsym", 0,
                    path + " has no function " + symbol +
                        "; vattn needs the driver of CUDA 11.8 or newer: update the NVIDIA "
                        "driver, or name another library with VATTN_LIBCUDA");
}

std::string arguments_text(std::initializer_list<CallArg> args) {
  std::string text;
  for (const CallArg& arg : args) {
    char value[32];
    std::snprintf(value, sizeof value, arg.is_address ? "0x%" PRIx64 : "%" PRIu64, arg.value);
    text.append(text.empty() ? " (" : ", ").append(arg.name).append("=").append(value);
  }
  return text.empty() ? text : text + ")";
}

}  // namespace

bool is_fatal(CUresult code) noexcept {
  return std::find(kFatalCodes.begin(), kFatalCodes.end(), static_cast<int>(code)) !=
         kFatalCodes.end();
}

std::shared_ptr<const CudaApi> CudaApi::load(const std::string& path) {
  std::shared_ptr<CudaApi> api(new CudaApi);
  api->path_ = library_path(path);
  void* library = ::dlopen(api->path_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = ::dlerror();
    throw DriverError("dlopen", 0,
                      std::string(reason != nullptr ? reason : api->path_) +
                          "; install the NVIDIA driver, name its library with VATTN_LIBCUDA, or "
                          "use the CPU (device=\"cpu\")");
  }
// Two steps, so that the name is expanded to the versioned one before it becomes a string.
#define VATTN_CUDA_STRING(call) #call
#define VATTN_CUDA_RESOLVE(call)                   \
  api->call = reinterpret_cast<decltype(&::call)>( \
      find_symbol(library, api->path_, VATTN_CUDA_STRING(call)));
  VATTN_CUDA_CALLS(VATTN_CUDA_RESOLVE)
#undef VATTN_CUDA_RESOLVE
#undef VATTN_CUDA_STRING
  return api;
}

std::string CudaApi::describe(CUresult code) const {
  const char* name = nullptr;
  const char* meaning = nullptr;
  // Both refuse codes that are newer than the library.
  if (cuGetErrorName(code, &name) != CUDA_SUCCESS || name == nullptr) name = "unknown CUDA error";
  if (cuGetErrorString(code, &meaning) != CUDA_SUCCESS || meaning == nullptr) meaning = "";
  std::string text = std::string(name) + " (" + std::to_string(static_cast<int>(code)) + ")";
  return *meaning == '\0' ? text : text + ": " + meaning;
}

DriverError CudaApi::error(CUresult code, const char* call,
                           std::initializer_list<CallArg> args) const {
  std::string detail = describe(code) + arguments_text(args);
  const bool fatal = is_fatal(code);
  if (fatal) {
    detail +=
        "; the device's context is lost, by an earlier kernel perhaps, and every later call will "
        "fail: restart the process (CUDA_LAUNCH_BLOCKING=1 shows the kernel)";
  }
  return DriverError(call, static_cast<int>(code), detail, fatal);
}

OutOfPages CudaApi::out_of_memory(const char* call, std::initializer_list<CallArg> args) const {
  return OutOfPages(std::string(call) + " failed: " + describe(CUDA_ERROR_OUT_OF_MEMORY) +
                    arguments_text(args) +
                    "; release sequences, lower the budget, or stop other programs that use "
                    "this device");
}

}  // namespace vattn
