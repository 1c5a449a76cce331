// Checksums of what was written, page by page, to tell a later read that brings back something else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace lohan_fx {

// 64 bits that depend on every bit of a page of 4096 bytes and on its place; 1 stands for 0. A single
// flipped bit changes them: each step is a bijection of the running value and of the word.
std::uint64_t page_checksum(const char* page);

// Thread-safe. Offsets and sizes are multiples of 4096. Takes 8 bytes of memory a page, up to the
// last one written of each file.
class Checksums {
 public:
  void note(int fd, std::uint64_t offset, const char* memory, std::size_t bytes);
  void forget(int fd, std::uint64_t offset, std::size_t bytes);
  // The file offset of the first page that differs from what was noted; -1 where none does. Pages
  // that were never noted agree with anything.
  std::int64_t first_difference(int fd, std::uint64_t offset, const char* memory,
                                std::size_t bytes) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<int, std::vector<std::uint64_t>> pages_;  // 0: not noted
};

}  // namespace lohan_fx
