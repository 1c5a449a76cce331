// What the file engine and its backends say to each other.
//
// A backend pulls transfers from its source, keeps as many of them going as it may, and hands each
// result back. The source knows requests, files and faults; the backend knows system calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>

#include "files.h"

namespace lohan_fx {

inline constexpr std::size_t kAlign = 4096;  // of memory, file offset and size, for O_DIRECT

inline std::uint64_t round_up(std::uint64_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

inline std::string describe_errno(int error) {
  return std::generic_category().message(error) + " (errno " + std::to_string(error) + ")";
}

// One contiguous piece between memory and a file.
struct Transfer {
  Direction direction;
  int fd;
  char* memory;
  std::uint64_t offset;  // in the file
  std::size_t bytes;
};

// Called from the backend's threads, several at once.
class TransferSource {
 public:
  virtual ~TransferSource() = default;
  // The next transfer to start; null when there is none now.
  virtual Transfer* next() = 0;
  // `result` is the bytes moved, or a negative errno. Returns the same transfer when more of it
  // must be moved (its fields then say what), else null and the transfer is gone.
  virtual Transfer* finished(Transfer* transfer, std::int64_t result) = 0;
};

// The destructor ends the backend's threads; the source must have nothing left to do by then.
class IoBackend {
 public:
  virtual ~IoBackend() = default;
  // The source has `transfers` more to give. Does not wait for the disk.
  virtual void wake(std::size_t transfers) = 0;
};

// Throws TransferError where the kernel refuses io_uring (too old, seccomp, sysctl).
std::unique_ptr<IoBackend> make_io_uring(TransferSource& source, unsigned queue_depth);
std::unique_ptr<IoBackend> make_io_threads(TransferSource& source, unsigned num_threads);

}  // namespace lohan_fx
