#include "adam_job.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "cuda_driver.h"

namespace lohan_fx {
namespace {

std::size_t dtype_bytes(Dtype dtype) {
  return dtype == Dtype::none ? 0 : dtype == Dtype::f32 ? 4 : 2;
}

// Host memory of a job, for error messages.
struct Span {
  const char* what;
  const void* pointer;
  std::size_t bytes;

  bool overlaps(const Span& other) const {
    if (pointer == nullptr || other.pointer == nullptr) return false;
    const auto begin = reinterpret_cast<std::uintptr_t>(pointer);
    const auto other_begin = reinterpret_cast<std::uintptr_t>(other.pointer);
    return begin < other_begin + other.bytes && other_begin < begin + bytes;
  }
};

// Why a job that is not updated in place makes no sense; empty where it does.
std::string wrong_with_new_arrays(const AdamJob& job) {
  const std::size_t f32 = job.numel * 4;
  const Span fresh[] = {{"the new master weights", job.new_master, f32},
                        {"the new exp_avg", job.new_exp_avg, f32},
                        {"the new exp_avg_sq", job.new_exp_avg_sq, f32}};
  for (const Span& span : fresh)
    if (span.pointer == nullptr) return "no place for " + std::string(span.what) + ", while others have one";
  if (!job.updates()) return "new arrays, but no update (no groups)";
  std::vector<Span> others{{"the gradient", job.grad, job.numel * dtype_bytes(job.grad_dtype)},
                           {"the sums", job.accum, f32}};
  for (const Array& array : arrays_of(job)) {
    if (array.read && array.place->extent != 0)
      return std::string(array.what) + ": on SSD; only state in memory can be updated into new arrays";
    others.push_back({array.what, array.place->host, array.bytes});
  }
  for (const Span& span : fresh) {
    for (const Span& other : others)
      if (span.overlaps(other)) return std::string(span.what) + " overlap " + other.what;
    others.push_back(span);
  }
  return "";
}

}  // namespace

std::vector<Array> arrays_of(const AdamJob& job) {
  if (!job.updates()) return {};
  const std::size_t f32 = job.numel * 4;
  std::vector<Array> arrays{{&job.master, f32, "master weights", true},
                            {&job.exp_avg, f32, "exp_avg", true},
                            {&job.exp_avg_sq, f32, "exp_avg_sq", true}};
  if (job.out_dtype != Dtype::none)
    arrays.push_back({&job.out, job.numel * dtype_bytes(job.out_dtype), "16-bit weights", false});
  return arrays;
}

bool share_bytes(const AdamJob& a, const AdamJob& b) {
  for (const Array& x : arrays_of(a))
    for (const Array& y : arrays_of(b))
      if (x.place->extent != 0 && x.place->extent == y.place->extent &&
          x.place->offset < y.place->offset + y.bytes && y.place->offset < x.place->offset + x.bytes)
        return true;
  return false;
}

void zero_gaps(const AdamJob& job, char* out) {
  std::vector<std::pair<std::size_t, std::size_t>> filled;  // [begin, end) in bytes
  for (const Segment& segment : job.segments)
    filled.emplace_back(2 * segment.offset, 2 * (segment.offset + segment.numel));
  std::sort(filled.begin(), filled.end());
  const std::size_t end = round_up_page(2 * job.numel);
  filled.emplace_back(end, end);
  std::size_t at = 0;
  for (const auto& [begin, next] : filled) {
    std::memset(out + at, 0, begin - at);
    at = next;
  }
}

std::size_t buffer_bytes(const AdamJob& job) {
  std::size_t bytes = 0;
  for (const Array& array : arrays_of(job))
    if (array.place->host == nullptr) bytes += round_up_page(array.bytes);
  return bytes;
}

void validate(const AdamJob& job, bool has_engine) {
  const auto refuse = [&](const std::string& why) {
    throw std::invalid_argument("optimizer job '" + job.name + "': " + why);
  };
  const auto takes = [](const Segment& segment) { return segment.add != Add::keep; };
  const bool adds = std::any_of(job.segments.begin(), job.segments.end(), takes);
  if (job.grad == nullptr && (adds || job.accum == nullptr)) refuse("no gradient");
  if (job.accum == nullptr && (adds || job.magnitudes != nullptr)) refuse("no sums to add to or measure");
  if (job.grad_dtype == Dtype::none) refuse("no gradient dtype");
  if (job.out_dtype == Dtype::f32) refuse("the output has 16 bits; an fp32 weight is the master itself");

  for (const Array& array : arrays_of(job)) {
    const Place& place = *array.place;
    const std::string what = array.what;
    const bool both = place.host != nullptr && place.extent != 0;
    if (place.host == nullptr && place.extent == 0) refuse(what + ": neither in memory nor on SSD");
    if (both && place.host != job.out.host) refuse(what + ": both in memory and on SSD");
    if (both && !page_aligned(place.host)) refuse(what + ": written to SSD from memory not 4096-byte aligned");
    if (place.extent != 0 && place.offset % kPage != 0) refuse(what + ": offset not a multiple of 4096");
    if (place.extent != 0 && !has_engine) refuse(what + ": on SSD, but there is no file engine");
  }
  if (job.out_dtype == Dtype::none && (job.out.host != nullptr || job.out.extent != 0))
    refuse("an output place without an output dtype");
  if (!job.in_place()) {
    const std::string wrong = wrong_with_new_arrays(job);
    if (!wrong.empty()) refuse(wrong);
  }

  if (job.out.host != nullptr) {
    const auto grad = reinterpret_cast<std::uintptr_t>(job.grad);
    const auto out = reinterpret_cast<std::uintptr_t>(job.out.host);
    const bool overlap = out < grad + job.numel * dtype_bytes(job.grad_dtype) &&
                         grad < out + job.numel * dtype_bytes(job.out_dtype);
    if (overlap && (out != grad || job.grad_dtype == Dtype::f32))
      refuse("the output may be the gradient's own memory only if both have 16 bits");
  }

  std::vector<Segment> sorted = job.segments;
  std::sort(sorted.begin(), sorted.end(),
            [](const Segment& a, const Segment& b) { return a.offset < b.offset; });
  std::size_t end = 0;
  for (const Segment& segment : sorted) {
    if (segment.offset < end) refuse("two segments overlap at element " + std::to_string(segment.offset));
    if (segment.offset > job.numel || segment.numel > job.numel - segment.offset)
      refuse("the segment at element " + std::to_string(segment.offset) + " leaves the bucket");
    if (job.updates() && segment.group >= job.groups.size())
      refuse("a segment names group " + std::to_string(segment.group) + " of " +
             std::to_string(job.groups.size()));
    end = segment.offset + segment.numel;
  }

  if (!job.ready_events.empty()) {
    std::string why;
    if (CudaDriver::get(&why) == nullptr) refuse("has CUDA events, but no driver: " + why);
  }
}

}  // namespace lohan_fx
