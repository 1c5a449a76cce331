// What every native failure carries across the Python boundary.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lohan_fx {

// Becomes lohan_fx.errors.TransferError in Python. `error` is an errno value, `offset` is in bytes
// from the start of the file at `path`; -1 and 0 mean unknown.
struct TransferError : std::runtime_error {
  TransferError(const std::string& message, std::string path_, std::int64_t offset_, int error_)
      : std::runtime_error(message), path(std::move(path_)), offset(offset_), error(error_) {}

  std::string path;
  std::int64_t offset = -1;
  int error = 0;
};

}  // namespace lohan_fx
