// Dtypes cross the Python boundary by their torch names.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "adam.h"

namespace lohan_fx {

inline Dtype grad_dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::f32;
  if (name == "bfloat16") return Dtype::bf16;
  if (name == "float16") return Dtype::f16;
  throw std::invalid_argument("gradient dtype '" + name +
                              "' is not known; use float32, bfloat16 or float16");
}

inline Dtype out_dtype_of(const std::optional<std::string>& name) {
  if (!name) return Dtype::none;
  if (*name == "bfloat16") return Dtype::bf16;
  if (*name == "float16") return Dtype::f16;
  throw std::invalid_argument("output dtype '" + *name +
                              "' is not known; use bfloat16, float16 or None");
}

}  // namespace lohan_fx
