#include "checksums.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "io.h"

namespace lohan_fx {
namespace {

std::vector<std::uint64_t> checksums_of(const char* memory, std::size_t bytes) {
  std::vector<std::uint64_t> found(bytes / kAlign);
  for (std::size_t i = 0; i < found.size(); ++i) found[i] = page_checksum(memory + i * kAlign);
  return found;
}

}  // namespace

std::uint64_t page_checksum(const char* page) {
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15;  // 2**64 / golden ratio, as Fibonacci hashing
  constexpr std::size_t kLanes = 8;                   // independent, so that they run side by side
  std::uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (std::size_t at = 0; at < kAlign; at += sizeof lanes) {
    std::uint64_t words[kLanes];
    std::memcpy(words, page + at, sizeof words);
    for (std::size_t i = 0; i < kLanes; ++i)
      lanes[i] = std::rotl((lanes[i] ^ words[i]) * kOdd, 29);
  }
  std::uint64_t all = 0;
  for (const std::uint64_t lane : lanes) all = std::rotl((all ^ lane) * kOdd, 29);
  return all == 0 ? 1 : all;
}

void Checksums::note(int fd, std::uint64_t offset, const char* memory, std::size_t bytes) {
  const auto found = checksums_of(memory, bytes);
  const std::lock_guard lock(mutex_);
  auto& pages = pages_[fd];
  const std::size_t first = offset / kAlign;
  if (pages.size() < first + found.size()) pages.resize(first + found.size());
  std::copy(found.begin(), found.end(), pages.begin() + static_cast<std::ptrdiff_t>(first));
}

void Checksums::forget(int fd, std::uint64_t offset, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  auto& pages = pages_[fd];
  const std::size_t end = std::min<std::size_t>(pages.size(), (offset + bytes) / kAlign);
  for (std::size_t i = offset / kAlign; i < end; ++i) pages[i] = 0;
}

std::int64_t Checksums::first_difference(int fd, std::uint64_t offset, const char* memory,
                                         std::size_t bytes) const {
  const auto found = checksums_of(memory, bytes);
  const std::lock_guard lock(mutex_);
  const auto file = pages_.find(fd);
  if (file == pages_.end()) return -1;
  const std::size_t first = offset / kAlign;
  for (std::size_t i = 0; i < found.size() && first + i < file->second.size(); ++i) {
    const std::uint64_t noted = file->second[first + i];
    if (noted != 0 && noted != found[i])
      return static_cast<std::int64_t>(offset + i * kAlign);
  }
  return -1;
}

}  // namespace lohan_fx
