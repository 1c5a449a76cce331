// Host memory: large, page-aligned, all there from the start; and moving bytes within it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>

namespace lohan_fx {

// Becomes MemoryError in Python.
struct HostMemoryError : std::bad_alloc {
  explicit HostMemoryError(std::string message_) : message(std::move(message_)) {}
  const char* what() const noexcept override { return message.c_str(); }

  std::string message;
};

// Anonymous memory that belongs to this process only: a forked child does not have it at all, so
// that a data loader's workers neither copy it nor double the budget.
class HostBuffer {
 public:
  // `bytes` is rounded up to 4096, nothing more. huge_pages asks for 2 MiB pages (and starts at a
  // multiple of them) from 2 MiB up. Every page is backed by memory on return, by `num_threads`
  // threads (0: one for each usable CPU). Throws HostMemoryError when the host does not have it.
  explicit HostBuffer(std::size_t bytes, bool huge_pages = true, unsigned num_threads = 0);
  ~HostBuffer();
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// memcpy by several threads (0: one for each usable CPU); small copies take one. The two spans must
// not overlap (std::invalid_argument).
void copy_bytes(void* to, const void* from, std::size_t bytes, unsigned num_threads = 0);

// Bytes of memory this process may still take: what the host has free or can free, or what its
// control groups (version 1 or 2) leave, whichever is less. `root` stands in for "/" when /proc and
// the control groups are read.
std::uint64_t host_available_bytes(const std::string& root = "");

}  // namespace lohan_fx
