// The few calls of the CUDA driver that waiting for an event takes. libcuda is loaded when first asked
// for, so this package builds and runs where there is none.
#pragma once

#include <cstdint>
#include <string>

namespace lohan_fx {

class CudaDriver {
 public:
  // Null where there is no usable driver; `why`, if given, then says what is missing.
  static CudaDriver* get(std::string* why = nullptr);

  // Makes the device's primary context, the one torch uses, current on the calling thread. Call
  // leave() on the same thread when done. Throws std::runtime_error.
  void enter(int device);
  void leave(int device);

  // True once everything before the event (a CUevent) has completed. Throws std::runtime_error, with
  // the driver's name for the failure, if that work failed.
  bool done(std::uintptr_t event);

 private:
  struct Calls;
  explicit CudaDriver(Calls* calls) : calls_(calls) {}
  void check(int result, const char* call) const;

  Calls* calls_;
};

}  // namespace lohan_fx
