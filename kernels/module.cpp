// The Python face of the native part: `lohan_fx._native`, imported only by lohan_fx/native.py.
#include <pybind11/pybind11.h>

#include "errors.h"

namespace py = pybind11;

namespace lohan_fx {

void bind_memory(py::module_& module);
void bind_files(py::module_& module);
void bind_adam(py::module_& module);
void bind_pipeline(py::module_& module);

namespace {
void translate_errors() {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const TransferError& failure) {
      py::object type = py::module_::import("lohan_fx.errors").attr("TransferError");
      py::dict where;
      where["path"] = failure.path.empty() ? py::object(py::none()) : py::object(py::str(failure.path));
      where["offset"] =
          failure.offset < 0 ? py::object(py::none()) : py::object(py::int_(failure.offset));
      where["errno"] = failure.error == 0 ? py::object(py::none()) : py::object(py::int_(failure.error));
      py::object error = type(failure.what(), **where);
      PyErr_SetObject(type.ptr(), error.ptr());
    }
  });
}
}  // namespace

}  // namespace lohan_fx

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native part of lohan_fx: host memory, direct file I/O, CPU Adam.";
  lohan_fx::translate_errors();
  lohan_fx::bind_memory(module);
  lohan_fx::bind_files(module);
  lohan_fx::bind_adam(module);
  lohan_fx::bind_pipeline(module);
}
