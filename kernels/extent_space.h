// Which bytes of which directory belong to which extent.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "extent_file.h"

namespace lohan_fx {

// Where one block of an extent is.
struct Piece {
  std::size_t directory;
  std::uint64_t offset, bytes;  // in the directory's file; both multiples of 4096
};

// Thread-safe.
class ExtentSpace {
 public:
  explicit ExtentSpace(const FileEngineOptions& options);

  // Pieces for `bytes`, block_bytes each but for the last, in turn over the directories that have
  // room. The disk keeps room for them. Throws TransferError (ENOSPC) when there is not enough.
  std::vector<Piece> take(std::uint64_t bytes);
  // Never waits for the disk.
  void give(std::vector<Piece> pieces);
  // Closes the files, and with them frees the disk. Nothing may be in flight.
  void close();

  int fd(std::size_t directory) const { return files_[directory]->fd(); }
  bool direct(std::size_t directory) const { return files_[directory]->direct(); }

 private:
  std::vector<Piece> place(std::uint64_t bytes, const std::vector<std::uint64_t>& limits);
  std::optional<std::size_t> back_all(const std::vector<Piece>& pieces);
  void give_now(const std::vector<Piece>& pieces);
  [[noreturn]] void throw_full(std::uint64_t bytes, const std::vector<std::uint64_t>& limits) const;

  const std::uint64_t block_bytes_;
  std::mutex disk_mutex_;  // held while the disk reserves, so maybe for long
  std::vector<std::unique_ptr<ExtentFile>> files_;
  std::size_t turn_ = 0;  // the directory that the next block goes to
  bool closed_ = false;

  std::mutex given_mutex_;                 // may be taken under disk_mutex_
  std::vector<std::vector<Piece>> given_;  // back, but not yet known to files_
};

}  // namespace lohan_fx
