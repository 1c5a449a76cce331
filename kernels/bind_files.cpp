#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "files.h"

namespace py = pybind11;

namespace lohan_fx {
namespace {

Faults parse_faults(const py::dict& given) {
  Faults faults;
  for (const auto& [key, value] : given) {
    const auto name = key.cast<std::string>();
    if (name == "short_every")
      faults.short_every = value.cast<unsigned>();
    else if (name == "errno")
      faults.error = value.cast<int>();
    else if (name == "after")
      faults.after = value.cast<unsigned>();
    else if (name == "times")
      faults.times = value.cast<unsigned>();
    else if (name == "delay_ms")
      faults.delay_ms = value.cast<unsigned>();
    else if (name == "flip_every")
      faults.flip_every = value.cast<unsigned>();
    else if (name == "refuse_tmpfile")
      faults.refuse_tmpfile = value.cast<bool>();
    else if (name == "refuse_direct")
      faults.refuse_direct = value.cast<bool>();
    else if (name == "refuse_fallocate")
      faults.refuse_fallocate = value.cast<bool>();
    else if (name == "on") {
      const auto on = value.cast<std::string>();
      if (on != "read" && on != "write" && on != "both")
        throw std::invalid_argument("fault on=" + on + " is unknown; use read, write or both");
      faults.on_read = on != "write";
      faults.on_write = on != "read";
    } else {
      throw std::invalid_argument("fault " + name + " is unknown");
    }
  }
  return faults;
}

std::shared_ptr<FileEngine> make_engine(std::vector<std::string> directories,
                                        std::optional<std::vector<std::uint64_t>> capacities,
                                        std::string backend, std::size_t block_bytes,
                                        unsigned queue_depth, bool verify,
                                        const std::optional<py::dict>& faults) {
  FileEngineOptions options;
  options.directories = std::move(directories);
  options.capacities = std::move(capacities).value_or(std::vector<std::uint64_t>{});
  options.backend = std::move(backend);
  options.block_bytes = block_bytes;
  options.queue_depth = queue_depth;
  options.verify = verify;
  if (faults) options.faults = parse_faults(*faults);
  const py::gil_scoped_release release;
  return std::make_shared<FileEngine>(std::move(options));
}

void wait(FileEngine& engine, Ticket ticket, double timeout_s) {
  engine.wait(ticket, timeout_s, [] {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C
  });
}

py::list take_trace(FileEngine& engine) {
  py::list events;
  for (const FileEngine::Event& event : engine.take_trace())
    events.append(py::make_tuple(event.name,
                                 event.direction == Direction::read ? "ssd_read" : "ssd_write",
                                 event.start_s, event.end_s));
  return events;
}

}  // namespace

void bind_files(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<FileEngine, std::shared_ptr<FileEngine>>(
      module, "FileEngine", "Asynchronous direct file I/O, striped over directories.")
      .def(py::init(&make_engine), py::arg("directories"), py::kw_only(),
           py::arg("capacities") = py::none(), py::arg("backend") = "auto",
           py::arg("block_bytes") = std::size_t{8} << 20, py::arg("queue_depth") = 32,
           py::arg("verify") = false, py::arg("faults") = py::none())
      .def("close", &FileEngine::close, Release())
      .def("allocate", &FileEngine::allocate, py::arg("bytes"), Release())
      .def("release", &FileEngine::release, py::arg("extent"), Release())
      .def(
          "read",
          [](FileEngine& self, ExtentId extent, std::uint64_t offset, std::uintptr_t to,
             std::size_t bytes, std::string name) {
            return self.read(extent, offset, reinterpret_cast<void*>(to), bytes, std::move(name));
          },
          py::arg("extent"), py::arg("offset"), py::arg("ptr"), py::arg("bytes"), py::arg("name"),
          Release())
      .def(
          "write",
          [](FileEngine& self, ExtentId extent, std::uint64_t offset, std::uintptr_t from,
             std::size_t bytes, std::string name) {
            return self.write(extent, offset, reinterpret_cast<const void*>(from), bytes,
                              std::move(name));
          },
          py::arg("extent"), py::arg("offset"), py::arg("ptr"), py::arg("bytes"), py::arg("name"),
          Release())
      .def("done", &FileEngine::done, py::arg("ticket"), Release())
      .def("wait", &wait, py::arg("ticket"), py::arg("timeout_s") = 60.0, Release())
      .def("take_trace", &take_trace)
      .def_property_readonly("backend", &FileEngine::backend)
      .def_property_readonly("directories", &FileEngine::directories)
      .def_property_readonly("direct", &FileEngine::direct)
      .def_property_readonly("block_bytes", &FileEngine::block_bytes)
      .def_property_readonly("queue_depth", &FileEngine::queue_depth)
      .def_property_readonly("allocated_bytes", &FileEngine::allocated_bytes)
      .def_property_readonly("bytes_read", &FileEngine::bytes_read)
      .def_property_readonly("bytes_written", &FileEngine::bytes_written)
      .def_property_readonly("read_busy_s", &FileEngine::read_busy_s)
      .def_property_readonly("write_busy_s", &FileEngine::write_busy_s);
}

}  // namespace lohan_fx
