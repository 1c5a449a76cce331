#include "extent_space.h"

#include <errno.h>

#include <algorithm>

#include "io.h"

namespace lohan_fx {
namespace {

bool is_full(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

}  // namespace

ExtentSpace::ExtentSpace(const FileEngineOptions& options) : block_bytes_(options.block_bytes) {
  for (std::size_t i = 0; i < options.directories.size(); ++i)
    files_.push_back(std::make_unique<ExtentFile>(options.directories[i], options.capacities[i],
                                                  options.faults));
}

void ExtentSpace::give(std::vector<Piece> pieces) {
  std::lock_guard lock(given_mutex_);
  given_.push_back(std::move(pieces));
}

void ExtentSpace::close() {
  std::lock_guard lock(disk_mutex_);
  closed_ = true;
  files_.clear();
}

std::vector<Piece> ExtentSpace::take(std::uint64_t bytes) {
  std::lock_guard lock(disk_mutex_);
  if (closed_) throw TransferError("the file engine is closed", "", -1, EBADF);
  {
    std::lock_guard given_lock(given_mutex_);
    for (const std::vector<Piece>& pieces : given_) give_now(pieces);
    given_.clear();
  }
  std::vector<std::uint64_t> limits(files_.size(), ExtentFile::kNoLimit);
  for (;;) {
    std::vector<Piece> pieces = place(bytes, limits);
    if (pieces.empty()) throw_full(bytes, limits);
    const std::optional<std::size_t> full = back_all(pieces);
    if (!full) return pieces;
    give_now(pieces);
    limits[*full] = files_[*full]->backed();  // happens at most once for each directory
  }
}

void ExtentSpace::give_now(const std::vector<Piece>& pieces) {
  for (const Piece& piece : pieces) files_[piece.directory]->give(piece.offset, piece.bytes);
}

// Empty when the directories, none larger than its limit, have no room.
std::vector<Piece> ExtentSpace::place(std::uint64_t bytes,
                                      const std::vector<std::uint64_t>& limits) {
  std::vector<Piece> pieces;
  std::size_t turn = turn_;
  for (std::uint64_t left = round_up(bytes); left > 0;) {
    const std::uint64_t now = std::min(left, block_bytes_);
    std::optional<std::uint64_t> offset;
    for (std::size_t tries = 0; !offset && tries < files_.size(); ++tries, ++turn) {
      const std::size_t index = turn % files_.size();
      offset = files_[index]->take(now, limits[index]);
      if (offset) pieces.push_back({index, *offset, now});
    }
    if (!offset) {
      give_now(pieces);
      return {};
    }
    left -= now;
  }
  turn_ = turn % files_.size();
  return pieces;
}

// A directory whose disk has no room for what was taken; none when all have.
std::optional<std::size_t> ExtentSpace::back_all(const std::vector<Piece>& pieces) {
  for (std::size_t i = 0; i < files_.size(); ++i) {
    ExtentFile& file = *files_[i];
    const int error = file.back();
    if (error == 0) continue;
    if (is_full(error)) return i;
    give_now(pieces);
    throw TransferError(
        "cannot reserve space in " + file.directory() + ": " + describe_errno(error),
        file.directory(), static_cast<std::int64_t>(file.backed()), error);
  }
  return std::nullopt;
}

void ExtentSpace::throw_full(std::uint64_t bytes, const std::vector<std::uint64_t>& limits) const {
  std::string where;
  for (std::size_t i = 0; i < files_.size(); ++i) {
    const ExtentFile& file = *files_[i];
    const std::string backed = std::to_string(file.backed());
    where += (i ? ", " : "") + file.directory() +
             (limits[i] != ExtentFile::kNoLimit
                  ? " (the disk is full with " + backed + " bytes of it ours)"
                  : " (" + backed + " bytes of its limit of " + std::to_string(file.capacity()) +
                        " in use)");
  }
  throw TransferError("no room for " + std::to_string(bytes) + " more bytes in " + where + ": " +
                          describe_errno(ENOSPC) + "; free disk space, or raise the ssd budget",
                      files_.front()->directory(), -1, ENOSPC);
}

}  // namespace lohan_fx
