#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "dtype_names.h"
#include "pipeline.h"

namespace py = pybind11;

namespace lohan_fx {
namespace {

using Extent = std::pair<ExtentId, std::uint64_t>;            // (extent, byte offset)
using PlaceArg = std::variant<std::uintptr_t, Extent>;        // a host pointer, or on SSD
using BufferArg = std::pair<std::uintptr_t, std::size_t>;     // (pointer, bytes)
using SegmentArg = std::tuple<std::size_t, std::size_t, std::size_t>;

Place place_of(const PlaceArg& arg) {
  if (const auto* pointer = std::get_if<std::uintptr_t>(&arg))
    return {reinterpret_cast<void*>(*pointer), 0, 0};
  const auto& [extent, offset] = std::get<Extent>(arg);
  return {nullptr, extent, offset};
}

std::vector<StateBuffer> buffers_of(const std::vector<BufferArg>& args) {
  std::vector<StateBuffer> buffers;
  for (const auto& [pointer, bytes] : args)
    buffers.push_back({reinterpret_cast<void*>(pointer), bytes});
  return buffers;
}

PipelineMode mode_of(const std::string& name) {
  if (name == "optimized") return PipelineMode::optimized;
  if (name == "naive") return PipelineMode::naive;
  throw std::invalid_argument("pipeline mode '" + name + "' is not known; use optimized or naive");
}

Add add_of(const std::string& name) {
  if (name == "keep") return Add::keep;
  if (name == "set") return Add::set;
  if (name == "add") return Add::add;
  throw std::invalid_argument("'" + name + "' is nothing to do with a sum; use keep, set or add");
}

AdamJob make_job(std::string name, std::size_t numel, std::uintptr_t grad,
                 const std::string& grad_dtype, const std::vector<SegmentArg>& segments,
                 std::vector<AdamStep> groups, const PlaceArg& master, const PlaceArg& exp_avg,
                 const PlaceArg& exp_avg_sq, std::uintptr_t out, const std::optional<Extent>& out_extent,
                 const std::optional<std::string>& out_dtype,
                 std::vector<std::uintptr_t> ready_events, std::uintptr_t accum,
                 const std::vector<std::string>& adds, std::uintptr_t magnitudes, std::int64_t rank,
                 std::uintptr_t new_master, std::uintptr_t new_exp_avg, std::uintptr_t new_exp_avg_sq) {
  AdamJob job;
  job.name = std::move(name);
  job.numel = numel;
  job.grad = reinterpret_cast<const void*>(grad);
  job.grad_dtype = grad_dtype_of(grad_dtype);
  for (const auto& [offset, count, group] : segments) job.segments.push_back({offset, count, group});
  if (!adds.empty() && adds.size() != segments.size())
    throw std::invalid_argument("optimizer job '" + job.name + "': one of adds for each segment");
  for (std::size_t i = 0; i < adds.size(); ++i) job.segments[i].add = add_of(adds[i]);
  job.accum = reinterpret_cast<float*>(accum);
  job.magnitudes = reinterpret_cast<double*>(magnitudes);
  job.groups = std::move(groups);
  job.master = place_of(master);
  job.exp_avg = place_of(exp_avg);
  job.exp_avg_sq = place_of(exp_avg_sq);
  job.out.host = reinterpret_cast<void*>(out);
  if (out_extent) std::tie(job.out.extent, job.out.offset) = *out_extent;
  job.out_dtype = out_dtype_of(out_dtype);
  job.ready_events = std::move(ready_events);
  job.rank = rank;
  job.new_master = reinterpret_cast<float*>(new_master);
  job.new_exp_avg = reinterpret_cast<float*>(new_exp_avg);
  job.new_exp_avg_sq = reinterpret_cast<float*>(new_exp_avg_sq);
  return job;
}

// So that Ctrl-C ends a wait. The GIL is released around it.
void let_python_in() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::dict stats_dict(const AdamPipeline& pipeline) {
  const PipelineStats stats = pipeline.stats();
  py::dict dict;
  dict["adam_s"] = stats.adam_s;
  dict["read_s"] = stats.read_s;
  dict["write_s"] = stats.write_s;
  dict["read_wait_s"] = stats.read_wait_s;
  dict["event_wait_s"] = stats.event_wait_s;
  dict["params"] = stats.params;
  dict["jobs"] = stats.jobs;
  return dict;
}

}  // namespace

void bind_pipeline(py::module_& module) {
  py::class_<AdamStep>(module, "AdamStep", "One step's scalars for one parameter group.")
      .def(py::init([](double lr, double beta1, double beta2, double eps, double weight_decay,
                       bool decoupled, std::int64_t step, double grad_scale, double unscale) {
             return AdamStep{lr,   beta1,   beta2,     eps, weight_decay, decoupled,
                             step, unscale, grad_scale};
           }),
           py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("weight_decay"), py::arg("decoupled"), py::arg("step"),
           py::arg("grad_scale") = 1., py::arg("unscale") = 1.)
      .def_readonly("lr", &AdamStep::lr)
      .def_readonly("beta1", &AdamStep::beta1)
      .def_readonly("beta2", &AdamStep::beta2)
      .def_readonly("eps", &AdamStep::eps)
      .def_readonly("weight_decay", &AdamStep::weight_decay)
      .def_readonly("decoupled", &AdamStep::decoupled)
      .def_readonly("step", &AdamStep::step)
      .def_readonly("grad_scale", &AdamStep::grad_scale)
      .def_readonly("unscale", &AdamStep::unscale);

  py::class_<AdamJob>(module, "AdamJob", R"(One bucket's update.

Arrays have numel elements. master, exp_avg and exp_avg_sq (fp32) are each a host pointer or an (extent,
byte offset). Segments are (offset, numel, group index) in elements; what lies between them keeps its
value. New 16-bit weights go to the host pointer out (which may be a 16-bit gradient's), to out_extent, or
to both; without an out_dtype the master is the weight. ready_events are CUevents that must be complete
before the gradient is read and any weight is written.

With `accum`, a host pointer to numel fp32 sums, each segment's gradient first goes into them as its entry
of adds says ("keep", "set", "add"), and the update is made from the sums; with no groups there is none.
`magnitudes` points to two doubles a segment, which receive its sums' sum of squares and largest
magnitude.

With the host pointers new_master, new_exp_avg and new_exp_avg_sq (all or none) the new fp32 values go
there, and the old ones, all in memory, are only read.

Of the jobs that can be updated, that of the lowest rank comes first.)")
      .def(py::init(&make_job), py::kw_only(), py::arg("name"), py::arg("numel"), py::arg("grad"),
           py::arg("grad_dtype"), py::arg("segments"), py::arg("groups"), py::arg("master"),
           py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("out") = 0,
           py::arg("out_extent") = py::none(), py::arg("out_dtype") = py::none(),
           py::arg("ready_events") = std::vector<std::uintptr_t>{}, py::arg("accum") = 0,
           py::arg("adds") = std::vector<std::string>{}, py::arg("magnitudes") = 0,
           py::arg("rank") = 0, py::arg("new_master") = 0, py::arg("new_exp_avg") = 0,
           py::arg("new_exp_avg_sq") = 0)
      .def_readonly("name", &AdamJob::name)
      .def_readonly("numel", &AdamJob::numel)
      .def_property_readonly("buffer_bytes", &buffer_bytes,
                             "Bytes of a state buffer that this job takes; 0 if it needs none.");

  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<AdamPipeline>(module, "AdamPipeline", R"(Runs optimizer jobs one after another on its own threads.

"optimized" reads the next job's state from SSD and writes the last one's back beside the update of
this one; "naive" does one thing after another. The numbers are the same. state_buffers are (pointer,
bytes), 4096-byte aligned, owned by the caller and alive as long as the pipeline.)")
      .def(py::init([](unsigned num_threads, const std::string& mode,
                       std::shared_ptr<FileEngine> engine, const std::vector<BufferArg>& buffers,
                       double timeout_s, int cuda_device, std::size_t trace_events) {
             const PipelineOptions options{num_threads, mode_of(mode), timeout_s, cuda_device,
                                           trace_events};
             return std::make_unique<AdamPipeline>(options, std::move(engine), buffers_of(buffers));
           }),
           py::arg("num_threads") = 0, py::arg("mode") = "optimized", py::arg("engine") = py::none(),
           py::arg("state_buffers") = std::vector<BufferArg>{}, py::kw_only(),
           py::arg("timeout_s") = 600., py::arg("cuda_device") = 0,
           py::arg("trace_events") = std::size_t{1} << 16)
      .def("set_state_buffers",
           [](AdamPipeline& self, const std::vector<BufferArg>& buffers) {
             const py::gil_scoped_release release;
             self.set_state_buffers(buffers_of(buffers));
           },
           py::arg("buffers"), "Replaces the state buffers; only while no job is in flight.")
      .def("submit", &AdamPipeline::submit, py::arg("job"), Release(),
           "Queues a job and returns its ticket. ValueError for a job that makes no sense.")
      .def("cancel", &AdamPipeline::cancel, py::arg("ticket"), Release(),
           "Drops a job whose update has not begun and that takes no state buffer; it is done soon. True if so.")
      .def("done", &AdamPipeline::done, py::arg("ticket"), Release(),
           "True when the new weights are in memory and everything on SSD is written, or it failed.")
      .def("weights_ready", &AdamPipeline::weights_ready, py::arg("ticket"), Release(),
           "True when the new weights are in host memory; state may still be on its way to SSD.")
      .def("wait",
           [](const AdamPipeline& self, Ticket ticket, double timeout_s) {
             self.wait(ticket, timeout_s, let_python_in);
           },
           py::arg("ticket"), py::arg("timeout_s"), Release(),
           "Waits until done. TransferError, naming the job, on failure or after timeout_s.")
      .def("wait_weights",
           [](const AdamPipeline& self, Ticket ticket, double timeout_s) {
             self.wait_weights(ticket, timeout_s, let_python_in);
           },
           py::arg("ticket"), py::arg("timeout_s"), Release(), "Like wait, for weights_ready.")
      .def("wait_any_weights",
           [](const AdamPipeline& self, const std::vector<Ticket>& tickets, double timeout_s) {
             self.wait_any_weights(tickets, timeout_s, let_python_in);
           },
           py::arg("tickets"), py::arg("timeout_s"), Release(),
           "Waits until weights_ready of one of them. TransferError after timeout_s only.")
      .def_property_readonly("progress", &AdamPipeline::progress,
                             "Grows whenever a job's weights are ready and whenever it is done.")
      .def("drain",
           [](const AdamPipeline& self, double timeout_s) { self.drain(timeout_s, let_python_in); },
           py::arg("timeout_s"), Release(),
           "Waits for all jobs. Once a job has failed, every drain raises its TransferError.")
      .def("close", &AdamPipeline::close, Release(),
           "Finishes jobs under way, drops the others, ends the threads. May be repeated.")
      .def("stats", &stats_dict, "Totals since construction, by lane.")
      .def("take_trace",
           [](AdamPipeline& self) {
             py::list events;
             for (const AdamPipeline::Event& event : self.take_trace())
               events.append(py::make_tuple(event.name, event.lane, event.start_s, event.end_s));
             return events;
           },
           "(job, lane, start_s, end_s) of what ended since the last call, oldest first.");
}

}  // namespace lohan_fx
