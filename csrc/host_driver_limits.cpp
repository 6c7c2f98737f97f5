#include "host_driver_limits.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>

namespace vattn {

std::size_t read_number(const char* path, std::size_t fallback) {
  std::ifstream file(path);
  std::size_t value = 0;
  return file >> value ? value : fallback;  // "max" in a cgroup file is no number: no limit
}

std::size_t count_lines(const char* path) {
  std::ifstream file(path);
  return static_cast<std::size_t>(
      std::count(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>(), '\n'));
}

namespace {

MemoryInfo machine_memory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  std::size_t value = 0, total = 0, available = 0;
  while (file >> key >> value) {
    std::getline(file, unit);
    if (key == "MemTotal:") total = value * 1024;
    if (key == "MemAvailable:") available = value * 1024;
  }
  return {available, total};
}

constexpr std::size_t kNoLimit = std::numeric_limits<std::size_t>::max();

// What a control group and those above it leave to this process. `root` is where their files are,
// `path` the group's name below it.
MemoryInfo group_memory(const std::string& root, std::string path, const char* limit_file,
                        const char* usage_file) {
  MemoryInfo least{kNoLimit, kNoLimit};
  for (;;) {
    const std::string folder = root + path + "/";
    const std::size_t limit = read_number((folder + limit_file).c_str(), kNoLimit);
    if (limit < kNoLimit) {
      const std::size_t usage = read_number((folder + usage_file).c_str(), 0);
      least.free_bytes = std::min(least.free_bytes, limit > usage ? limit - usage : 0);
      least.total_bytes = std::min(least.total_bytes, limit);
    }
    if (path.empty()) return least;
    path.resize(path.find_last_of('/'));
  }
}

// By the control groups of this process, versions 2 and 1. In a container the names may be those
// outside of it: the root of what is visible counts in any case.
MemoryInfo cgroup_memory() {
  MemoryInfo least{kNoLimit, kNoLimit};
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path == "/" || path.empty() || path.front() != '/') path.clear();
    MemoryInfo found{kNoLimit, kNoLimit};
    if (controllers.empty()) {
      found = group_memory("/sys/fs/cgroup", path, "memory.max", "memory.current");
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      found = group_memory("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes",
                           "memory.usage_in_bytes");
    }
    least.free_bytes = std::min(least.free_bytes, found.free_bytes);
    least.total_bytes = std::min(least.total_bytes, found.total_bytes);
  }
  return least;
}

}  // namespace

MemoryInfo host_memory() {
  const MemoryInfo machine = machine_memory();
  const MemoryInfo group = cgroup_memory();
  return {std::min(machine.free_bytes, group.free_bytes),
          std::min(machine.total_bytes, group.total_bytes)};
}

}  // namespace vattn
