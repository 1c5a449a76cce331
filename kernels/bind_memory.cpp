#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>

#include "memory.h"

namespace py = pybind11;

namespace lohan_fx {

void bind_memory(py::module_& module) {
  py::class_<HostBuffer, std::shared_ptr<HostBuffer>>(
      module, "HostBuffer", py::buffer_protocol(),
      "Page-aligned host memory, a writable buffer; freed with its last reference.")
      .def(py::init<std::size_t, bool, unsigned>(), py::arg("bytes"), py::kw_only(),
           py::arg("huge_pages") = true, py::arg("threads") = 0,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly(
          "ptr",
          [](const HostBuffer& self) { return reinterpret_cast<std::uintptr_t>(self.data()); })
      .def_property_readonly("nbytes", &HostBuffer::bytes)
      .def("__len__", &HostBuffer::bytes)
      .def_buffer([](HostBuffer& self) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(self.data()),
                               static_cast<py::ssize_t>(self.bytes()));
      });

  module.def(
      "copy",
      [](std::uintptr_t to, std::uintptr_t from, std::size_t bytes, unsigned num_threads) {
        copy_bytes(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes,
                   num_threads);
      },
      py::arg("dst_ptr"), py::arg("src_ptr"), py::arg("bytes"), py::arg("threads") = 0,
      py::call_guard<py::gil_scoped_release>(),
      "Copies bytes with several threads (0: one for each usable CPU).");

  module.def("host_available_bytes", &host_available_bytes, py::arg("root") = "",
             "Bytes of memory this process may still take, control groups' limits included.");
}

}  // namespace lohan_fx
