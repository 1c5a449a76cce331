// The anonymous file that holds one directory's share of the extents.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>

#include "files.h"

namespace lohan_fx {

// Not thread-safe.
class ExtentFile {
 public:
  static constexpr std::uint64_t kNoLimit = std::numeric_limits<std::uint64_t>::max();

  // Throws TransferError when no file can be made in `directory`. `capacity` in bytes, 0 = no
  // limit. Of `faults`, the refuse_ ones matter here.
  ExtentFile(std::string directory, std::uint64_t capacity, const Faults& faults);
  ~ExtentFile();
  ExtentFile(const ExtentFile&) = delete;
  ExtentFile& operator=(const ExtentFile&) = delete;

  const std::string& directory() const { return directory_; }
  int fd() const { return fd_; }
  bool direct() const { return direct_; }
  std::uint64_t capacity() const { return capacity_; }
  std::uint64_t backed() const { return backed_; }

  // Offset of a span of `bytes` (a multiple of 4096) that nobody else has: given-back space first,
  // else at the end. None when the file would have to be larger than `limit` or the capacity.
  std::optional<std::uint64_t> take(std::uint64_t bytes, std::uint64_t limit = kNoLimit);
  void give(std::uint64_t offset, std::uint64_t bytes);

  // Has the disk keep room for everything taken. Returns 0, or an errno value and takes no more of
  // the disk than before.
  int back();

 private:
  void open_anonymous();
  int open_unlinked(int flags);
  void choose_direct();
  int reserve(std::uint64_t from, std::uint64_t bytes);
  int write_zeros(std::uint64_t from, std::uint64_t bytes);

  const std::string directory_;
  const std::uint64_t capacity_;
  const Faults faults_;
  int fd_ = -1;
  bool direct_ = true;
  std::map<std::uint64_t, std::uint64_t> free_;  // offset -> bytes; no two touch, none touches end_
  std::uint64_t end_ = 0;                        // of the last span taken
  std::uint64_t backed_ = 0;                     // what the disk keeps room for: size of the file
};

}  // namespace lohan_fx
