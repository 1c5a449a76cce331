#include "memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>

#include "thread_pool.h"

namespace lohan_fx {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = 2u << 20;
constexpr std::size_t kPopulateBytes = 64u << 20;  // by one thread at a time
constexpr std::size_t kCopyBytes = 4u << 20;  // a thread costs as much as copying a tenth of it

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

[[noreturn]] void refuse(std::size_t bytes, const std::string& why) {
  throw HostMemoryError("cannot get " + std::to_string(bytes) + " bytes of host memory: " + why +
                        "; lower the dram budget or free memory");
}

// Whole pages at a multiple of `alignment`; null (and errno) when the kernel refuses.
char* map(std::size_t bytes, std::size_t alignment) {
  const std::size_t spare = alignment - kPage;
  if (bytes + spare < bytes) {
    errno = ENOMEM;
    return nullptr;
  }
  void* memory =
      ::mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(memory);
  const std::size_t skip =
      (alignment - reinterpret_cast<std::uintptr_t>(begin) % alignment) % alignment;
  if (skip > 0) ::munmap(begin, skip);
  if (spare > skip) ::munmap(begin + skip + bytes, spare - skip);
  return begin + skip;
}

// Returns 0 or an errno value. The kernel lets no other thread map memory while it populates a range, so
// ranges are short: Python maps memory all the time.
int populate(char* begin, std::size_t bytes) {
  while (bytes > 0) {
    const std::size_t size = std::min(kHugePage, bytes);
    if (::madvise(begin, size, MADV_POPULATE_WRITE) == 0) {
      begin += size;
      bytes -= size;
    } else if (errno == EINVAL) {
      break;  // an older kernel
    } else if (errno != EINTR && errno != EAGAIN) {
      return errno;
    }
  }
  for (std::size_t at = 0; at < bytes; at += kPage) *static_cast<volatile char*>(begin + at) = 0;
  return 0;
}

int populate_all(char* begin, std::size_t bytes, unsigned num_threads) {
  std::atomic<int> error = 0;
  ThreadPool pool;
  pool.run((bytes + kPopulateBytes - 1) / kPopulateBytes, num_threads, [&](std::size_t i) {
    const std::size_t at = i * kPopulateBytes;
    if (error != 0) return;
    if (const int failed = populate(begin + at, std::min(kPopulateBytes, bytes - at)))
      error = failed;
  });
  return error;
}

}  // namespace

HostBuffer::HostBuffer(std::size_t bytes, bool huge_pages, unsigned num_threads) {
  if (bytes == 0) throw std::invalid_argument("a host buffer needs at least one byte");
  // Refused here, it is an error; taken beyond the limit, the kernel would kill the process.
  const std::uint64_t available = host_available_bytes();
  if (bytes > available) refuse(bytes, std::to_string(available) + " bytes are available");
  bytes_ = (bytes + kPage - 1) / kPage * kPage;
  huge_pages = huge_pages && bytes_ >= kHugePage;
  data_ = map(bytes_, huge_pages ? kHugePage : kPage);
  if (data_ == nullptr) refuse(bytes, std::generic_category().message(errno));
  // Advice: where it is refused, the memory is as good, only slower.
  if (huge_pages) ::madvise(data_, bytes_, MADV_HUGEPAGE);
  ::madvise(data_, bytes_, MADV_DONTFORK);
  if (const int error = populate_all(data_, bytes_, num_threads)) {
    ::munmap(data_, bytes_);
    refuse(bytes, std::generic_category().message(error));
  }
}

HostBuffer::~HostBuffer() { ::munmap(data_, bytes_); }

void copy_bytes(void* to, const void* from, std::size_t bytes, unsigned num_threads) {
  char* const target = static_cast<char*>(to);
  const char* const source = static_cast<const char*>(from);
  if (bytes == 0) return;
  if (target == nullptr || source == nullptr) throw std::invalid_argument("copy: a null pointer");
  const auto at_to = reinterpret_cast<std::uintptr_t>(to);
  const auto at_from = reinterpret_cast<std::uintptr_t>(from);
  if (std::max(at_to, at_from) - std::min(at_to, at_from) < bytes)
    throw std::invalid_argument("copy: source and target overlap in their " +
                                std::to_string(bytes) + " bytes");
  const std::size_t num_tasks = (bytes + kCopyBytes - 1) / kCopyBytes;
  if (num_tasks == 1 || num_threads == 1) {
    ::memcpy(target, source, bytes);
    return;
  }
  // A pool of its own: the shared one may be busy with an update for a long time.
  ThreadPool pool;
  pool.run(num_tasks, num_threads, [&](std::size_t i) {
    const std::size_t at = i * kCopyBytes;
    ::memcpy(target + at, source + at, std::min(kCopyBytes, bytes - at));
  });
}

}  // namespace lohan_fx
