#include "adam.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "adam_impl.h"
#include "thread_pool.h"

#if defined(LOHAN_FX_X86_64)
#include <xmmintrin.h>
#endif

namespace lohan_fx {
namespace {

// Best first.
const AdamImpl* const kImpls[] = {
#if defined(LOHAN_FX_X86_64)
    &adam_avx512,
    &adam_avx2,
#elif defined(LOHAN_FX_AARCH64)
    &adam_neon,
#endif
    &adam_scalar,
};

const AdamImpl& choose() {
  const char* forced = std::getenv("LOHAN_FX_ISA");
  if (forced != nullptr && *forced != '\0') {
    try {
      return find_adam(forced);
    } catch (const std::invalid_argument& failure) {
      throw std::invalid_argument(std::string("LOHAN_FX_ISA: ") + failure.what());
    }
  }
  for (const AdamImpl* impl : kImpls)
    if (impl->supported()) return *impl;
  return adam_scalar;
}

// Round to nearest, denormals kept, whatever the calling thread was set to (torch.set_flush_denormal).
// See [Note: the same bits on every machine] in adam.h.
class PlainRounding {
 public:
#if defined(LOHAN_FX_X86_64)
  PlainRounding() : before_(_mm_getcsr()) {
    if ((before_ & ~kSticky) != kDefault) _mm_setcsr(kDefault);
  }
  ~PlainRounding() {
    if ((before_ & ~kSticky) != kDefault) _mm_setcsr(before_);
  }

 private:
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, nothing else
  static constexpr unsigned kSticky = 0x3f;     // flags of exceptions seen
  unsigned before_;
#elif defined(LOHAN_FX_AARCH64)
  PlainRounding() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    if (before_ != 0) asm volatile("msr fpcr, %0" ::"r"(std::uint64_t{0}) : "memory");
  }
  ~PlainRounding() {
    if (before_ != 0) asm volatile("msr fpcr, %0" ::"r"(before_) : "memory");
  }

 private:
  std::uint64_t before_;
#else
  PlainRounding() {}
#endif
};

}  // namespace

AdamFactors::AdamFactors(const AdamStep& s) {
  if (s.step < 1) throw std::invalid_argument("Adam's step counts from 1, got " + std::to_string(s.step));
  const double blend_weight = 1. - s.beta1;
  const double bias1 = 1. - std::pow(s.beta1, static_cast<double>(s.step));
  const double bias2 = 1. - std::pow(s.beta2, static_cast<double>(s.step));
  unscale = static_cast<float>(s.unscale);
  grad_scale = static_cast<float>(s.grad_scale);
  decay = s.decoupled ? static_cast<float>(1. - s.lr * s.weight_decay) : 1.f;
  l2 = s.decoupled ? 0.f : static_cast<float>(s.weight_decay);
  blend_from_grad = blend_weight >= .5;
  blend = static_cast<float>(blend_from_grad ? -s.beta1 : blend_weight);
  beta2 = static_cast<float>(s.beta2);
  one_minus_beta2 = static_cast<float>(1. - s.beta2);
  bias2_sqrt = static_cast<float>(std::sqrt(bias2));
  eps = static_cast<float>(s.eps);
  step_size = static_cast<float>(s.lr / bias1);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const AdamImpl* impl : kImpls)
    if (impl->supported()) names.emplace_back(impl->name);
  return names;
}

const AdamImpl& find_adam(const std::string& name) {
  std::string available;
  for (const AdamImpl* impl : kImpls) {
    if (!impl->supported()) continue;
    if (name == impl->name) return *impl;
    if (!available.empty()) available += ", ";
    available += impl->name;
  }
  throw std::invalid_argument("no Adam for instruction set '" + name + "' on this CPU; available: " +
                              available);
}

const AdamImpl& active_adam() {
  static const AdamImpl& impl = choose();
  return impl;
}

void adam_update(const AdamArrays& arrays, const AdamFactors& factors, std::size_t begin,
                 std::size_t end, const AdamImpl& impl) {
  const PlainRounding rounding;
  impl.run(arrays, factors, begin, end);
}

void adam_update(const AdamArrays& arrays, const AdamFactors& factors, std::size_t num_params,
                 ThreadPool& pool, unsigned num_threads, const AdamImpl& impl) {
  const std::size_t pieces = (num_params + kAdamPiece - 1) / kAdamPiece;
  pool.run(pieces, num_threads, [&](std::size_t piece) {
    const std::size_t begin = piece * kAdamPiece;
    adam_update(arrays, factors, begin, std::min(num_params, begin + kAdamPiece), impl);
  });
}

void accumulate(float* sum, const void* grad, Dtype grad_dtype, bool set, std::size_t begin,
                std::size_t end, const AdamImpl& impl) {
  const PlainRounding rounding;
  impl.accumulate(sum, grad, grad_dtype, set, begin, end);
}

void Magnitude::merge(const Magnitude& other) {
  sum_squares += other.sum_squares;
  if (largest == largest && !(other.largest <= largest)) largest = other.largest;  // a NaN wins
}

Magnitude measure_piece(const float* values, std::size_t begin, std::size_t end) {
  // A fixed number of sums, so that the order of additions does not depend on the vector width. The
  // square of a float is exact in double. Magnitudes compare as their bits do, NaN above infinity.
  constexpr std::size_t kSums = 16;
  double sums[kSums] = {};
  std::uint32_t largest[kSums] = {};
  const auto take = [&](std::size_t lane, float value) {
    sums[lane] += static_cast<double>(value) * static_cast<double>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    largest[lane] = std::max(largest[lane], bits & 0x7fffffffu);
  };
  std::size_t i = begin;
  for (; i + kSums <= end; i += kSums)
    for (std::size_t lane = 0; lane < kSums; ++lane) take(lane, values[i + lane]);
  for (std::size_t lane = 0; i < end; ++i, ++lane) take(lane, values[i]);

  Magnitude total;
  std::uint32_t most = 0;
  for (std::size_t lane = 0; lane < kSums; ++lane) {
    total.sum_squares += sums[lane];
    most = std::max(most, largest[lane]);
  }
  std::memcpy(&total.largest, &most, 4);
  return total;
}

Magnitude measure(const float* values, std::size_t count) {
  const PlainRounding rounding;
  Magnitude total;
  for (std::size_t at = 0; at < count; at += kAdamPiece)
    total.merge(measure_piece(values, at, std::min(count, at + kAdamPiece)));
  return total;
}

}  // namespace lohan_fx
