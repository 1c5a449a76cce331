// Asynchronous O_DIRECT file I/O over one or several directories.
//
// An Extent is a span of bytes that is kept on disk, striped over the directories in blocks. Extents
// are preallocated (a full disk fails in allocate(), not in a write) and live in anonymous files, so
// nothing is left behind when the process dies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "errors.h"

namespace lohan_fx {

using Ticket = std::uint64_t;    // one request; 0 is never a valid ticket and counts as done
using ExtentId = std::uint64_t;  // 0 is never valid

struct FileEngineOptions {
  std::vector<std::string> directories;    // at least one; striped in this order
  std::vector<std::uint64_t> capacities;   // bytes per directory; 0 = no limit of our own
  std::string backend = "auto";            // "auto", "io_uring", "threads"
  std::size_t block_bytes = 8u << 20;      // largest single request, and the stripe
  unsigned queue_depth = 32;               // requests in flight per directory
};

// Thread-safe. Buffers must be 4096-byte aligned and stay alive until the ticket is done. Sizes may be
// anything: the buffer must then have room up to the next multiple of 4096.
class FileEngine {
 public:
  explicit FileEngine(FileEngineOptions options);
  ~FileEngine();  // waits for what is in flight
  FileEngine(const FileEngine&) = delete;
  FileEngine& operator=(const FileEngine&) = delete;

  ExtentId allocate(std::uint64_t bytes);
  void release(ExtentId extent);

  // `name` is used in errors only. `offset` is a multiple of 4096 within the extent.
  Ticket read(ExtentId extent, std::uint64_t offset, void* to, std::size_t bytes, std::string name);
  Ticket write(ExtentId extent, std::uint64_t offset, const void* from, std::size_t bytes,
               std::string name);

  bool done(Ticket ticket) const;  // true also for a failed one; wait() then throws
  // Throws TransferError when the request failed or is not done after timeout_s seconds.
  void wait(Ticket ticket, double timeout_s);

  const char* backend() const;             // the one in use: "io_uring" or "threads"
  std::uint64_t allocated_bytes() const;
  std::uint64_t bytes_read() const;
  std::uint64_t bytes_written() const;
  double read_busy_s() const;              // seconds with at least one read in flight
  double write_busy_s() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lohan_fx
