#include "backing.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

namespace fake {
namespace {

constexpr int kReserveFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

// One NaN in float, half, bfloat16 and double; -1 as an integer.
bool fill_with_poison(int file, std::uint64_t offset, std::size_t bytes) {
  static const std::vector<unsigned char> pattern(1 << 20, 0xFF);
  while (bytes > 0) {
    const std::size_t chunk = std::min(bytes, pattern.size());
    const ssize_t done = pwrite(file, pattern.data(), chunk, static_cast<off_t>(offset));
    if (done <= 0) return false;
    offset += static_cast<std::uint64_t>(done);
    bytes -= static_cast<std::size_t>(done);
  }
  return true;
}

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

void* Backing::reserve(std::size_t bytes, std::uintptr_t hint) {
  void* base = mmap(pointer(hint), bytes, PROT_NONE, kReserveFlags, -1, 0);
  return base == MAP_FAILED ? nullptr : base;
}

void* Backing::allocate_host(std::size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kReserveFlags, -1, 0);
  return base == MAP_FAILED ? nullptr : base;
}

void Backing::release(void* base, std::size_t bytes) { munmap(base, bytes); }

bool Backing::allocate(std::size_t bytes, bool poison, std::uint64_t* offset) {
  if (elide_) {
    *offset = 0;
    return true;
  }
  if (file_ < 0) file_ = memfd_create("fake_cuda", MFD_CLOEXEC);
  if (file_ < 0) return false;
  if (ftruncate(file_, static_cast<off_t>(end_ + bytes)) != 0) return false;
  if (poison && !fill_with_poison(file_, end_, bytes)) {
    discard(end_, bytes);
    return false;
  }
  *offset = end_;
  end_ += bytes;
  return true;
}

void Backing::discard(std::uint64_t offset, std::size_t bytes) {
  if (elide_) return;
  fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
            static_cast<off_t>(bytes));
}

bool Backing::map(std::uintptr_t address, std::size_t bytes, std::uint64_t offset) {
  if (elide_) return true;
  return mmap(pointer(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file_,
              static_cast<off_t>(offset)) != MAP_FAILED;
}

bool Backing::unmap(std::uintptr_t address, std::size_t bytes) {
  if (elide_) return true;
  return mmap(pointer(address), bytes, PROT_NONE, kReserveFlags | MAP_FIXED, -1, 0) != MAP_FAILED;
}

bool Backing::protect(std::uintptr_t address, std::size_t bytes, bool read, bool write) {
  if (elide_) return true;
  return mprotect(pointer(address), bytes, (read ? PROT_READ : 0) | (write ? PROT_WRITE : 0)) == 0;
}

std::uint64_t Backing::physical_bytes() const {
  struct stat info = {};
  if (file_ < 0 || fstat(file_, &info) != 0) return 0;
  return static_cast<std::uint64_t>(info.st_blocks) * 512;
}

void Backing::clear() {
  if (file_ >= 0) close(file_);
  file_ = -1;
  end_ = 0;
}

}  // namespace fake
