// One bucket's update as data: where its arrays live, and which scalars go with which elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "adam.h"
#include "files.h"

namespace lohan_fx {

constexpr std::size_t kPage = 4096;  // what direct I/O asks of memory, offsets and sizes

inline std::size_t round_up_page(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

inline bool page_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kPage == 0;
}

// Where one array of a bucket lives. Exactly one of `host` and `extent` is set (see AdamJob::out for
// the exception). `offset` is in bytes within the extent, a multiple of 4096.
struct Place {
  void* host = nullptr;
  ExtentId extent = 0;
  std::uint64_t offset = 0;
};

// What a segment's gradient does to the fp32 sums of AdamJob::accum: nothing, become them, be added.
enum class Add : std::uint8_t { keep, set, add };

// Elements [offset, offset + numel) of the bucket, updated with the scalars of groups[group].
struct Segment {
  std::size_t offset, numel, group;
  Add add = Add::keep;
};

// One bucket's update. All host memory stays valid, and is left alone by others, until the job is done.
//
// [Note: accumulated gradients]
// With `accum`, gradients go into these fp32 sums first, each segment as its `add` says, and the update
// is made from the sums. Without groups there is no update: the job adds only, and needs no state.
struct AdamJob {
  std::string name;
  std::size_t numel = 0;          // elements of every array, gaps between segments included
  const void* grad = nullptr;
  Dtype grad_dtype = Dtype::f32;
  std::vector<Segment> segments;  // disjoint; what lies between them keeps its value
  std::vector<AdamStep> groups;
  float* accum = nullptr;             // sums of gradients, fp32; null where there are none
  double* magnitudes = nullptr;       // receives (sum of squares, largest magnitude) of each segment's sums
  Place master, exp_avg, exp_avg_sq;  // fp32
  // All null: updated in place. Else the new values go here, and the old ones, all in host memory, are
  // only read. No other array of the job may be here.
  float *new_master = nullptr, *new_exp_avg = nullptr, *new_exp_avg_sq = nullptr;
  // New weights in 16 bit. With a host place and an extent both, they are written to the host place
  // (4096-byte aligned, with room up to the next multiple) and from there to the extent. An extent alone
  // is filled from a state buffer, its gaps with zeros. Dtype::none: the master is the weight.
  Place out;
  Dtype out_dtype = Dtype::none;
  // CUevents that must be complete before the gradient is read and any weight is written.
  std::vector<std::uintptr_t> ready_events;
  std::int64_t rank = 0;  // see [Note: whose turn it is]

  bool updates() const { return accum == nullptr || !groups.empty(); }
  bool in_place() const {
    return new_master == nullptr && new_exp_avg == nullptr && new_exp_avg_sq == nullptr;
  }
};

// An array of a job, however it is kept.
struct Array {
  const Place* place;
  std::size_t bytes;
  const char* what;
  bool read;  // its old value is needed
};

// The arrays of a job that an update needs; none where it adds gradients only.
std::vector<Array> arrays_of(const AdamJob& job);

// True where two jobs have bytes on SSD in common.
bool share_bytes(const AdamJob& a, const AdamJob& b);

// Zeros what no segment fills of 16-bit weights in a state buffer: what the buffer held before must not
// reach the disk.
void zero_gaps(const AdamJob& job, char* out);

// Bytes of state buffer a job takes; 0 if nothing of it is on SSD only.
std::size_t buffer_bytes(const AdamJob& job);

// Throws std::invalid_argument, naming the job, where it makes no sense.
void validate(const AdamJob& job, bool has_engine);

}  // namespace lohan_fx
