#include "adam.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
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

}  // namespace lohan_fx
