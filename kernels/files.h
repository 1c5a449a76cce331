// Asynchronous O_DIRECT file I/O over one or several directories.
//
// An Extent is a span of bytes that is kept on disk, striped over the directories in blocks.
// Extents are preallocated (a full disk fails in allocate(), not in a write) and live in anonymous
// files, so nothing is left behind when the process dies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "errors.h"

namespace lohan_fx {

using Ticket = std::uint64_t;    // one request; 0 is never a valid ticket and counts as done
using ExtentId = std::uint64_t;  // 0 is never valid

enum class Direction : std::uint8_t { read, write };

// Disk troubles made on purpose, so that tests see what a bad day does. All off by default. They
// act between the engine and its backend, hence alike on every backend.
struct Faults {
  unsigned short_every = 0;              // every n-th transfer moves only about half of its bytes
  int error = 0;                         // an errno value that transfers fail with ...
  unsigned after = 0;                    // ... from the one after the first `after` on ...
  unsigned times = 0;                    // ... this many times; 0 = always
  unsigned delay_ms = 0;                 // every transfer finishes this much later
  bool on_read = true, on_write = true;  // which transfers the lines above are about
  unsigned flip_every = 0;               // every n-th read brings back one wrong bit

  bool refuse_tmpfile = false;    // as a file system without O_TMPFILE does
  bool refuse_direct = false;     // as a file system without O_DIRECT does
  bool refuse_fallocate = false;  // as a file system without fallocate does
};

struct FileEngineOptions {
  std::vector<std::string> directories;   // at least one; striped in this order
  std::vector<std::uint64_t> capacities;  // bytes per directory; 0 = no limit of our own
  std::string backend = "auto";           // "auto", "io_uring", "threads"
  std::size_t block_bytes = 8u << 20;     // largest single transfer, and the stripe; 4096 * n
  unsigned queue_depth = 32;              // transfers in flight per directory
  std::size_t trace_events = 1u << 16;    // finished requests kept for take_trace(); newest win
  bool verify = false;  // keep checksums of what is written, and compare what is read (EBADMSG)
  Faults faults;
};

// Thread-safe. Buffers must be 4096-byte aligned and stay alive until the ticket is done. Sizes may
// be anything: whole multiples of 4096 are moved, so the buffer must have room up to the next one,
// and the bytes up to there go with a write. No request is ordered after another: a caller that
// needs order waits in between.
//
// "auto" takes io_uring where the kernel allows it, else threads; LOHAN_FX_IO=io_uring|threads
// stands in for "auto". std::invalid_argument is for calls that are wrong whatever the disk does.
class FileEngine {
 public:
  // One finished request, from its first transfer's start to its last one's end.
  struct Event {
    std::string name;
    Direction direction;
    double start_s, end_s;  // CLOCK_MONOTONIC
  };

  explicit FileEngine(FileEngineOptions options);
  ~FileEngine();  // close()
  FileEngine(const FileEngine&) = delete;
  FileEngine& operator=(const FileEngine&) = delete;

  // Waits for what is in flight and gives the disk space back. Later calls throw. May be repeated.
  void close();

  // Throws TransferError (ENOSPC, path) when the directories together have no room for it.
  ExtentId allocate(std::uint64_t bytes);
  // The space is reused once the extent's last request is done.
  void release(ExtentId extent);

  // `name` is used in errors and in the trace. `offset` is a multiple of 4096 within the extent.
  // Never blocks on the disk: what exceeds queue_depth waits its turn, first come first served.
  Ticket read(ExtentId extent, std::uint64_t offset, void* to, std::size_t bytes, std::string name);
  Ticket write(ExtentId extent, std::uint64_t offset, const void* from, std::size_t bytes,
               std::string name);

  bool done(Ticket ticket) const;  // true also for a failed one; wait() then throws
  // Throws TransferError when the request failed, or (ETIMEDOUT) is not done after timeout_s
  // seconds; a late request stays in flight. `poll`, if given, is called a few times a second and
  // may throw.
  void wait(Ticket ticket, double timeout_s, const std::function<void()>& poll = {});

  const char* backend() const;  // the one in use: "io_uring" or "threads"
  const std::vector<std::string>& directories() const;
  std::vector<bool> direct() const;  // per directory: false where O_DIRECT was refused
  std::size_t block_bytes() const;
  unsigned queue_depth() const;
  std::uint64_t allocated_bytes() const;  // of live extents, in whole 4096s
  std::uint64_t bytes_read() const;       // moved by finished transfers
  std::uint64_t bytes_written() const;
  double read_busy_s() const;  // seconds with at least one read in flight
  double write_busy_s() const;
  std::vector<Event> take_trace();  // in order of their ends; each event is given once

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lohan_fx
