// printf into a std::string (g++ 12 has no std::format).
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

namespace fake {

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace fake
