#include "cuda_driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <type_traits>

namespace lohan_fx {
namespace {
constexpr int kSuccess = 0;
constexpr int kNotReady = 600;
}  // namespace

// The driver's own signatures, with its handles (pointers to opaque structs) as void*.
struct CudaDriver::Calls {
  int (*init)(unsigned);
  int (*device_get)(int*, int);
  int (*primary_retain)(void**, int);
  int (*primary_release)(int);
  int (*set_current)(void*);
  int (*event_query)(void*);
  int (*error_name)(int, const char**);

  // Empty if every function was found; else what is missing.
  std::string load() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* reason = dlerror();
      return reason == nullptr ? "libcuda.so.1 does not load" : reason;
    }
    std::string missing;
    const auto find = [&](auto& function, const char* name) {
      void* symbol = dlsym(library, name);
      if (symbol == nullptr) missing = std::string("libcuda.so.1 has no ") + name;
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
    };
    find(init, "cuInit");
    find(device_get, "cuDeviceGet");
    find(primary_retain, "cuDevicePrimaryCtxRetain");
    find(primary_release, "cuDevicePrimaryCtxRelease_v2");
    find(set_current, "cuCtxSetCurrent");
    find(event_query, "cuEventQuery");
    find(error_name, "cuGetErrorName");
    return missing;
  }
};

CudaDriver* CudaDriver::get(std::string* why) {
  // Never unloaded: a driver must not go while events of it are about.
  static std::string missing;
  static CudaDriver* const driver = []() -> CudaDriver* {
    auto* calls = new Calls{};
    missing = calls->load();
    if (missing.empty()) {
      const int result = calls->init(0);
      if (result != kSuccess) missing = "cuInit failed with error " + std::to_string(result);
    }
    if (!missing.empty()) {
      delete calls;
      return nullptr;
    }
    return new CudaDriver(calls);
  }();
  if (driver == nullptr && why != nullptr) *why = missing;
  return driver;
}

void CudaDriver::check(int result, const char* call) const {
  if (result == kSuccess) return;
  const char* name = nullptr;
  if (calls_->error_name(result, &name) != kSuccess || name == nullptr) name = "unknown error";
  throw std::runtime_error(std::string(call) + ": " + name + " (" + std::to_string(result) + ")");
}

void CudaDriver::enter(int device) {
  int handle = 0;
  void* context = nullptr;
  check(calls_->device_get(&handle, device), "cuDeviceGet");
  check(calls_->primary_retain(&context, handle), "cuDevicePrimaryCtxRetain");
  check(calls_->set_current(context), "cuCtxSetCurrent");
}

void CudaDriver::leave(int device) {
  // Results are of no use here: at process exit the driver may be gone already.
  int handle = 0;
  calls_->set_current(nullptr);
  if (calls_->device_get(&handle, device) == kSuccess) calls_->primary_release(handle);
}

bool CudaDriver::done(std::uintptr_t event) {
  const int result = calls_->event_query(reinterpret_cast<void*>(event));
  if (result == kNotReady) return false;
  check(result, "cuEventQuery");
  return true;
}

}  // namespace lohan_fx
