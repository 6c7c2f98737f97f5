// What the operating system allows and has left, as its files tell.
#pragma once

#include "driver.h"

namespace vattn {

// The number that a file begins with; `fallback` if there is no such file or no number in it.
std::size_t read_number(const char* path, std::size_t fallback);
std::size_t count_lines(const char* path);
// The least of what the machine has and what the control groups of this process allow.
MemoryInfo host_memory();

}  // namespace vattn
