#include "extent_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>

#include "io.h"

namespace lohan_fx {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Zeros = std::unique_ptr<char, Free>;

Zeros aligned_zeros(std::size_t bytes) {
  void* memory = std::aligned_alloc(kAlign, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  std::fill_n(static_cast<char*>(memory), bytes, '\0');
  return Zeros(static_cast<char*>(memory));
}

}  // namespace

ExtentFile::ExtentFile(std::string directory, std::uint64_t capacity, const Faults& faults)
    : directory_(std::move(directory)),
      capacity_(capacity == 0 ? kNoLimit : capacity / kAlign * kAlign),
      faults_(faults) {
  open_anonymous();
  choose_direct();
}

ExtentFile::~ExtentFile() { ::close(fd_); }

// A file without a name: it is gone when the process is, however it ends.
void ExtentFile::open_anonymous() {
  int error = EOPNOTSUPP;
  if (!faults_.refuse_tmpfile) {
    fd_ = ::open(directory_.c_str(), O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    error = errno;
  }
  // These three mean "no O_TMPFILE here", from the file system or from an old kernel.
  if (fd_ < 0 && (error == EOPNOTSUPP || error == EISDIR || error == ENOENT))
    error = open_unlinked(O_CREAT | O_EXCL | O_NOFOLLOW | O_RDWR | O_CLOEXEC);
  if (fd_ < 0)
    throw TransferError("cannot make a file in " + directory_ + ": " + describe_errno(error) +
                            "; give an existing directory that this user may write to",
                        directory_, -1, error);
}

int ExtentFile::open_unlinked(int flags) {
  std::random_device random;
  for (int attempt = 0; attempt < 16; ++attempt) {
    const std::string path =
        directory_ + "/.lohan_fx-" + std::to_string(::getpid()) + "-" + std::to_string(random());
    fd_ = ::open(path.c_str(), flags, 0600);
    if (fd_ >= 0) {
      if (::unlink(path.c_str()) == 0) return 0;
      const int error = errno;
      ::close(fd_);
      fd_ = -1;
      return error;
    }
    if (errno != EEXIST) return errno;
  }
  return EEXIST;
}

// Some file systems refuse O_DIRECT when it is asked for, others only when it is used.
void ExtentFile::choose_direct() {
  const int flags = ::fcntl(fd_, F_GETFL);
  direct_ = !faults_.refuse_direct && ::fcntl(fd_, F_SETFL, flags | O_DIRECT) == 0;
  if (!direct_) return;
  const Zeros zeros = aligned_zeros(kAlign);
  const bool refused = ::pwrite(fd_, zeros.get(), kAlign, 0) < 0 && errno == EINVAL;
  [[maybe_unused]] const int emptied = ::ftruncate(fd_, 0);
  if (refused) direct_ = ::fcntl(fd_, F_SETFL, flags & ~O_DIRECT) != 0;
}

std::optional<std::uint64_t> ExtentFile::take(std::uint64_t bytes, std::uint64_t limit) {
  const auto found = std::find_if(free_.begin(), free_.end(),
                                  [bytes](const auto& span) { return span.second >= bytes; });
  if (found != free_.end()) {
    const auto [offset, have] = *found;
    free_.erase(found);
    if (have > bytes) free_.emplace(offset + bytes, have - bytes);
    return offset;
  }
  const std::uint64_t most = std::min(limit, capacity_);
  if (bytes > most || end_ > most - bytes) return std::nullopt;
  end_ += bytes;
  return end_ - bytes;
}

void ExtentFile::give(std::uint64_t offset, std::uint64_t bytes) {
  auto after = free_.upper_bound(offset);
  if (after != free_.end() && after->first == offset + bytes) {
    bytes += after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      offset = before->first;
      bytes += before->second;
      free_.erase(before);
    }
  }
  if (offset + bytes == end_)
    end_ = offset;
  else
    free_.emplace(offset, bytes);
}

int ExtentFile::back() {
  if (end_ <= backed_) return 0;
  const int error = reserve(backed_, end_ - backed_);
  if (error != 0) {
    // A reservation that failed half-way keeps its first half otherwise.
    [[maybe_unused]] const int shrunk = ::ftruncate(fd_, static_cast<off_t>(backed_));
    return error;
  }
  backed_ = end_;
  return 0;
}

int ExtentFile::reserve(std::uint64_t from, std::uint64_t bytes) {
  if (faults_.refuse_fallocate) return write_zeros(from, bytes);
  for (;;) {
    if (::fallocate(fd_, 0, static_cast<off_t>(from), static_cast<off_t>(bytes)) == 0) return 0;
    if (errno == EOPNOTSUPP || errno == ENOSYS) return write_zeros(from, bytes);
    if (errno != EINTR) return errno;
  }
}

// Slow, but the only way left to learn here, not later, that the disk is too small.
int ExtentFile::write_zeros(std::uint64_t from, std::uint64_t bytes) {
  const std::size_t step = std::min<std::uint64_t>(bytes, 4u << 20);
  const Zeros zeros = aligned_zeros(step);
  for (const std::uint64_t end = from + bytes; from < end;) {
    const std::size_t now = std::min<std::uint64_t>(step, end - from);
    const ssize_t written = ::pwrite(fd_, zeros.get(), now, static_cast<off_t>(from));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    if (written == 0) return EIO;
    from += static_cast<std::uint64_t>(written) / kAlign * kAlign;
    if (static_cast<std::size_t>(written) < kAlign) return ENOSPC;
  }
  return 0;
}

}  // namespace lohan_fx
