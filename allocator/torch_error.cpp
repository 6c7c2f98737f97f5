#include "torch_error.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <typeinfo>

#include "errors.h"

namespace __cxxabiv1 {
// The C++ runtime's; no header of it declares this one.
extern "C" [[noreturn]] void __cxa_throw(void* object, std::type_info* type,
                                         void (*destroy)(void*));
}  // namespace __cxxabiv1

namespace vattn {
namespace {

// c10::SourceLocation.
struct SourceLocation {
  const char* function;
  const char* file;
  std::uint32_t line;
};
// The constructor of both: this, SourceLocation, std::string.
using Construct = void (*)(void* object, SourceLocation location, std::string message);

struct ErrorClass {
  Construct construct;
  std::type_info* type;
  // Where the constructor is that of the base class: what makes the object one of this class.
  void* methods;
};
struct TorchErrors {
  ErrorClass out_of_memory, error;
};

#define VATTN_C10_ARGUMENTS \
  "NS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
constexpr const char* kOutOfMemoryConstructor = "_ZN3c1016OutOfMemoryErrorC1E" VATTN_C10_ARGUMENTS;
constexpr const char* kOutOfMemoryType = "_ZTIN3c1016OutOfMemoryErrorE";
constexpr const char* kOutOfMemoryTable = "_ZTVN3c1016OutOfMemoryErrorE";
constexpr const char* kErrorConstructor = "_ZN3c105ErrorC1E" VATTN_C10_ARGUMENTS;
constexpr const char* kErrorType = "_ZTIN3c105ErrorE";
#undef VATTN_C10_ARGUMENTS

// The table of virtual functions as an object points to it, behind its offset and typeinfo.
constexpr std::size_t kTableHeader = 2 * sizeof(void*);

// Such an object has 128 bytes in torch 2.13; members that come later have room.
constexpr std::size_t kErrorBytes = 4096;

// Found once, never destroyed: tensors are freed until the process ends.
std::atomic<const TorchErrors*> found_errors{nullptr};

// Both are std::exceptions, and nothing but that, at offset 0; the destructor is virtual.
void destroy(void* object) { static_cast<std::exception*>(object)->~exception(); }

[[noreturn]] void throw_as(const ErrorClass& kind, const std::string& message) {
  void* object = abi::__cxa_allocate_exception(kErrorBytes);
  try {
    kind.construct(object, {"allocate", "vattn/allocator", 0}, message);
    if (kind.methods != nullptr) std::memcpy(object, &kind.methods, sizeof kind.methods);
  } catch (...) {
    abi::__cxa_free_exception(object);
    throw;
  }
  abi::__cxa_throw(object, kind.type, &destroy);
}

// Whether an exception of this class can be thrown, caught, and says what it was told.
bool works(const ErrorClass& kind) {
  const std::string message = "vattn asks whether this arrives";
  try {
    throw_as(kind, message);
  } catch (const std::exception& error) {
    return typeid(error) == *kind.type && std::string(error.what()).find(message) == 0;
  } catch (...) {
    return false;
  }
}

const TorchErrors* torch_errors() {
  const TorchErrors* errors = found_errors.load(std::memory_order_acquire);
  if (errors == nullptr) {
    find_torch_errors({"libc10.so", "libc10_cuda.so", "libtorch_python.so"});
    errors = found_errors.load(std::memory_order_acquire);
  }
  return errors;
}

// Symbols of libraries that are loaded, and the names of those that none of them has.
class Symbols {
 public:
  explicit Symbols(const std::vector<std::string>& libraries) {
    for (const std::string& library : libraries) {
      void* handle = ::dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
      if (handle != nullptr) handles_.push_back(handle);
    }
  }
  ~Symbols() {
    for (void* handle : handles_) ::dlclose(handle);  // whoever loaded them keeps them
  }
  Symbols(const Symbols&) = delete;
  Symbols& operator=(const Symbols&) = delete;

  void* find(const char* name) const {
    for (void* handle : handles_) {
      if (void* address = ::dlsym(handle, name)) return address;
    }
    return nullptr;
  }
  template <typename T>
  T need(const char* name) {
    void* address = find(name);
    if (address == nullptr) missing.emplace_back(name);
    return reinterpret_cast<T>(address);
  }

  std::vector<std::string> missing;

 private:
  std::vector<void*> handles_;
};

// In torch 2.11 c10::OutOfMemoryError inherits the constructors of c10::Error, and no library has
// one. It adds no member, so that an Error with its table of virtual functions is one.
ErrorClass find_out_of_memory(Symbols& symbols, Construct construct_error) {
  auto* type = symbols.need<std::type_info*>(kOutOfMemoryType);
  if (void* constructor = symbols.find(kOutOfMemoryConstructor)) {
    return {reinterpret_cast<Construct>(constructor), type, nullptr};
  }
  char* table = symbols.need<char*>(kOutOfMemoryTable);
  return {construct_error, type, table == nullptr ? nullptr : table + kTableHeader};
}

}  // namespace

std::vector<std::string> find_torch_errors(const std::vector<std::string>& libraries) {
  Symbols symbols(libraries);
  const ErrorClass error{symbols.need<Construct>(kErrorConstructor),
                         symbols.need<std::type_info*>(kErrorType), nullptr};
  const ErrorClass out_of_memory = find_out_of_memory(symbols, error.construct);
  if (!symbols.missing.empty()) return symbols.missing;
  std::vector<std::string> wrong;
  if (!works(out_of_memory)) wrong.emplace_back("c10::OutOfMemoryError that arrives when thrown");
  if (!works(error)) wrong.emplace_back("c10::Error that arrives when thrown");
  if (!wrong.empty()) return wrong;
  const TorchErrors* none = nullptr;
  const auto* found = new TorchErrors{out_of_memory, error};
  if (!found_errors.compare_exchange_strong(none, found)) delete found;
  return {};
}

void throw_torch_out_of_memory(const std::string& message) {
  if (const TorchErrors* errors = torch_errors()) throw_as(errors->out_of_memory, message);
  throw OutOfMemory(message);
}

void throw_torch_error(const std::string& message) {
  if (const TorchErrors* errors = torch_errors()) throw_as(errors->error, message);
  throw std::runtime_error(message);
}

}  // namespace vattn
