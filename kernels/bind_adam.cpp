#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "adam.h"
#include "dtype_names.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace lohan_fx {

void bind_adam(py::module_& module) {
  module.def("isa", [] { return std::string(active_adam().name); },
             "Instruction set of the Adam in use: the best this CPU has, or LOHAN_FX_ISA.");
  module.def("available_isas", &available_isas,
             "Instruction sets there is an Adam for on this CPU, best first.");
  module.def("usable_cpus", &usable_cpus, "CPUs this process may run on.");

  module.def(
      "measure",
      [](std::uintptr_t values, std::size_t numel) {
        if (numel > 0 && values == 0) throw std::invalid_argument("measure: a null pointer");
        const py::gil_scoped_release release;
        const Magnitude total = measure(reinterpret_cast<const float*>(values), numel);
        return std::make_pair(total.sum_squares, static_cast<double>(total.largest));
      },
      py::arg("values_ptr"), py::arg("numel"),
      "(Sum of squares, largest magnitude) of numel fp32 values; NaN counts as the largest.");

  module.def(
      "adam_factors",
      [](const AdamStep& step) {
        const AdamFactors f(step);
        return py::make_tuple(f.unscale, f.grad_scale, f.decay, f.l2, f.blend, f.blend_from_grad, f.beta2,
                              f.one_minus_beta2, f.bias2_sqrt, f.eps, f.step_size);
      },
      py::arg("step"),
      "The scalars of one update, for another implementation of it; in the order of AdamFactors.");

  module.def(
      "adam_update",
      [](std::uintptr_t master, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq,
         std::uintptr_t grad, const std::string& grad_dtype, std::uintptr_t out,
         const std::optional<std::string>& out_dtype, std::size_t numel, double lr, double beta1,
         double beta2, double eps, double weight_decay, bool decoupled, std::int64_t step,
         double grad_scale, double unscale, unsigned num_threads, const std::optional<std::string>& isa,
         std::uintptr_t new_master, std::uintptr_t new_exp_avg, std::uintptr_t new_exp_avg_sq) {
        const AdamArrays arrays{reinterpret_cast<float*>(master),
                                reinterpret_cast<float*>(exp_avg),
                                reinterpret_cast<float*>(exp_avg_sq),
                                reinterpret_cast<const void*>(grad),
                                grad_dtype_of(grad_dtype),
                                reinterpret_cast<void*>(out),
                                out_dtype_of(out_dtype),
                                reinterpret_cast<float*>(new_master),
                                reinterpret_cast<float*>(new_exp_avg),
                                reinterpret_cast<float*>(new_exp_avg_sq)};
        if (numel > 0 && (master == 0 || exp_avg == 0 || exp_avg_sq == 0 || grad == 0))
          throw std::invalid_argument("adam_update: a null pointer among master, moments, gradient");
        if (numel > 0 && (out != 0) != (arrays.out_dtype != Dtype::none))
          throw std::invalid_argument("adam_update: out_ptr and out_dtype go together");
        if ((new_master != 0) != (new_exp_avg != 0) || (new_master != 0) != (new_exp_avg_sq != 0))
          throw std::invalid_argument("adam_update: new arrays for master and both moments, or for none");
        const AdamFactors factors(
            {lr, beta1, beta2, eps, weight_decay, decoupled, step, unscale, grad_scale});
        const AdamImpl& impl = isa ? find_adam(*isa) : active_adam();
        const py::gil_scoped_release release;
        adam_update(arrays, factors, numel, shared_pool(), num_threads, impl);
      },
      py::arg("master_ptr"), py::arg("exp_avg_ptr"), py::arg("exp_avg_sq_ptr"), py::arg("grad_ptr"),
      py::arg("grad_dtype"), py::arg("out_ptr"), py::arg("out_dtype"), py::arg("numel"),
      py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
      py::arg("weight_decay"), py::arg("decoupled"), py::arg("step"), py::arg("grad_scale") = 1.,
      py::arg("unscale") = 1.,
      py::arg("num_threads") = 0, py::arg("isa") = py::none(), py::arg("new_master_ptr") = 0,
      py::arg("new_exp_avg_ptr") = 0, py::arg("new_exp_avg_sq_ptr") = 0,
      R"(Updates numel elements, in place or into the three new arrays; the GIL is released.

master, exp_avg and exp_avg_sq are fp32. The gradient is "float32", "bfloat16" or "float16". With an
out_dtype of "bfloat16" or "float16" the new weights are also written to out_ptr, rounded to nearest
even; it may be the gradient's own memory if that has 16 bits too. Every instruction set and number of
threads (0: all usable CPUs) gives the same bits.)");
}

}  // namespace lohan_fx
