// The implementations behind adam.h, one per file. A file that this CPU family cannot have compiles to
// nothing.
#pragma once

#include "adam.h"

#if defined(__FAST_MATH__)
#error "Adam must round alike everywhere: build without -ffast-math"
#endif

#if defined(__x86_64__)
#define LOHAN_FX_X86_64 1
#elif defined(__aarch64__)
#define LOHAN_FX_AARCH64 1
#endif

namespace lohan_fx {

extern const AdamImpl adam_scalar;
#if defined(LOHAN_FX_X86_64)
extern const AdamImpl adam_avx2;
extern const AdamImpl adam_avx512;
#elif defined(LOHAN_FX_AARCH64)
extern const AdamImpl adam_neon;
#endif

}  // namespace lohan_fx
