// PyTorch's own exceptions, thrown without PyTorch's headers: their constructors, tables and
// typeinfo are looked up in the libraries that the process has loaded.
//
// torch.OutOfMemoryError is what Python makes of c10::OutOfMemoryError and of nothing else, and a
// pluggable allocator's null is no error to PyTorch: the next kernel would write to it.
#pragma once

#include <string>
#include <vector>

namespace vattn {

// Looks the exceptions up in libraries that are loaded already, given by path or name, the first
// that has a symbol counts. Returns what is wrong: what is missing, or exceptions that do not come
// out as they went in. Empty: all is there, and the functions below throw them from now on.
std::vector<std::string> find_torch_errors(const std::vector<std::string>& libraries);

// c10::OutOfMemoryError and c10::Error. Before find_torch_errors() has found them, what the
// libraries of PyTorch have, and without those our own OutOfMemory and std::runtime_error.
[[noreturn]] void throw_torch_out_of_memory(const std::string& message);
[[noreturn]] void throw_torch_error(const std::string& message);

}  // namespace vattn
