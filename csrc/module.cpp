// The Python module _C: how this library was built, what the planners decide, and switches for
// tests. The ops are in schemas.cpp. No function here takes a tensor, and no header of torch is
// included.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "cpu/cores.h"
#include "cpu/engine.h"
#include "cpu/plan.h"
#include "cuda/plan.h"
#include "epilogues.h"
#include "forward_mode.h"
#ifdef FUSEDRNN_CUDA
#include "cuda/engine.h"
#endif

namespace {

namespace py = pybind11;

template <class Names>
int place_of(const std::string& name, const Names& names, const char* what) {
  std::string all;
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) return int(i);
    all += std::string(i ? ", " : "") + names[i];
  }
  throw py::value_error(std::string("fusedrnn: ") + what + " must be one of " + all + ", got " +
                        name);
}

fusedrnn::Storage storage_named(const std::string& dtype) {
  constexpr const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  return fusedrnn::Storage(place_of(dtype, dtypes, "dtype"));
}

// Returns the CPU planner's decision for the forward pass or, if `adjoint`, for the backward pass
// with all gradients. `isa` names a compiled instruction set; without it, the one in use.
py::dict plan_cpu(bool adjoint, const std::string& dtype, int64_t T, int64_t B, int64_t I,
                  int64_t H, int threads, const std::optional<std::string>& isa) {
  namespace cpu = fusedrnn::cpu;
  const cpu::InstructionSet* set = isa ? cpu::find_instruction_set(*isa) : &cpu::instruction_set();
  if (!set)
    throw py::value_error("fusedrnn: isa must be in build_info()['isa_compiled'], got " + *isa);
  const fusedrnn::Pass pass = adjoint ? fusedrnn::Pass::adjoint : fusedrnn::Pass::activation;
  const fusedrnn::Storage storage = storage_named(dtype);
  const bool multiplies = adjoint && cpu::multiplies_as_fast(*set, storage, H * (H + I));
  const int64_t gemms = multiplies ? cpu::Gradients::multiplications(H, I, true, true, true) : 0;
  const auto planned = [&](const auto& kernels) {
    return cpu::make_plan({kernels, pass, storage, T, B, adjoint ? 0 : I, H, threads, gemms});
  };
  const cpu::Plan plan =
      storage == fusedrnn::Storage::f64 ? planned(*set->f64) : planned(*set->f32);
  py::dict result;
  result["isa"] = set->name;
  result["threads"] = plan.threads();
  result["gemms"] = multiplies;
  result["batch_groups"] = plan.batch_groups;
  result["hidden_groups"] = plan.hidden_groups;
  result["pack"] = plan.pack;
  result["project_ahead"] = plan.project_ahead;
  result["chunk"] = plan.chunk;
  result["cycles"] = plan.cycles;
  return result;
}

using Regime = fusedrnn::cuda::Regime;

std::optional<Regime> regime_named(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return Regime(place_of(*name, fusedrnn::cuda::kRegimeNames, "regime"));
}

fusedrnn::cuda::Device cuda_device(const py::object& device) {
  if (!py::isinstance<py::dict>(device)) {
#ifdef FUSEDRNN_CUDA
    return fusedrnn::cuda::device_properties(device.cast<int>());
#else
    throw py::type_error("built without CUDA: device must be a dict of properties");
#endif
  }
  fusedrnn::cuda::Device result;
  result.name = device["name"].cast<std::string>();
  result.architecture = device["architecture"].cast<int>();
  result.sms = device["sms"].cast<int>();
  result.shared_memory = device["shared_memory"].cast<int64_t>();
  result.clock = device["clock"].cast<double>();
  result.memory_bandwidth = device["memory_bandwidth"].cast<double>();
  const auto clusters = device["clusters"].cast<std::array<int, 5>>();
  std::copy(clusters.begin(), clusters.end(), result.clusters);
  if (device.contains("cooperative")) result.cooperative = device["cooperative"].cast<bool>();
  return result;
}

// Builds the input of the CUDA planner. `tf32` is whether torch allows TF32 in float32 products.
fusedrnn::cuda::PlanInput plan_input(const fusedrnn::cuda::Device& on, bool adjoint,
                                     const std::string& dtype, int64_t T, int64_t B, int64_t I,
                                     int64_t H, bool leaky, bool tf32) {
  fusedrnn::cuda::PlanInput in;
  in.pass = adjoint ? fusedrnn::Pass::adjoint : fusedrnn::Pass::activation;
  in.storage = on.computed_as(storage_named(dtype));
  in.tf32 = in.storage == fusedrnn::Storage::f32 && tf32;
  in.T = T;
  in.B = B;
  in.I = I;
  in.H = H;
  in.leaky = leaky;
  return in;
}

// Returns the CUDA planner's decision. `device` is an index, or a dict of device properties; with a
// dict, no GPU is needed.
py::dict plan_cuda(bool adjoint, const std::string& dtype, int64_t T, int64_t B, int64_t I,
                   int64_t H, bool leaky, bool tf32, const std::optional<std::string>& regime,
                   std::optional<int> tile, std::optional<int> split,
                   std::optional<bool> fuse_input, const py::object& device) {
  const fusedrnn::cuda::Device on = cuda_device(device);
  const fusedrnn::cuda::PlanInput in = plan_input(on, adjoint, dtype, T, B, I, H, leaky, tf32);
  const fusedrnn::cuda::Plan plan =
      make_plan(in, on, {regime_named(regime), tile, split, fuse_input});
  py::dict result;
  result["regime"] = fusedrnn::cuda::kRegimeNames[int(plan.regime)];
  result["fuse_input"] = plan.fuse_input;
  result["tile"] = plan.tile;
  result["split"] = plan.split;
  result["rows"] = plan.rows;
  result["units"] = plan.units;
  result["blocks"] = plan.blocks;
  result["batch_groups"] = plan.batch_groups;
  result["waves"] = plan.waves;
  result["chunks"] = plan.chunks;
  result["shared_memory"] = plan.shared.end;
  result["counters"] = plan.counters;
  result["microseconds"] = plan.microseconds;
  result["input_microseconds"] = plan.input_microseconds;
  result["words"] = in_words(in, plan, on);
  return result;
}

// Returns kTiles of cuda/plan.h, as dicts.
py::list cuda_tiles() {
  constexpr const char* names[] = {"fma_f32", "fma_f64", "mma_bf16", "mma_f16", "mma_tf32"};
  py::list result;
  for (const fusedrnn::cuda::Tile& tile : fusedrnn::cuda::kTiles) {
    py::dict one;
    one["arithmetic"] = names[int(tile.arithmetic)];
    one["units"] = tile.units;
    one["rows"] = tile.rows;
    one["number_size"] = tile.number_size();
    one["chunk"] = tile.chunk();
    one["held"] = tile.held();
    one["chunk_bytes"] = tile.chunk_bytes();
    one["block_units"] = tile.block_units(1);
    result.append(one);
  }
  return result;
}

#ifdef FUSEDRNN_CUDA
py::dict device_properties(int index) {
  const fusedrnn::cuda::Device& device = fusedrnn::cuda::device_properties(index);
  py::dict result;
  result["name"] = device.name;
  result["architecture"] = device.architecture;
  result["sms"] = device.sms;
  result["shared_memory"] = device.shared_memory;
  result["clock"] = device.clock;
  result["memory_bandwidth"] = device.memory_bandwidth;
  result["cooperative"] = device.cooperative;
  result["clusters"] = std::vector<int>(std::begin(device.clusters), std::end(device.clusters));
  return result;
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  py::list compiled;
#ifdef __x86_64__
  compiled.append(fusedrnn::cpu::kAvx512.name);
  compiled.append(fusedrnn::cpu::kAvx2.name);
#endif
  compiled.append(fusedrnn::cpu::kBaseline.name);
  info["isa_compiled"] = compiled;
  info["isa_chosen"] = fusedrnn::cpu::instruction_set().name;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

unsigned long main_thread;

// Runs Python's handlers of signals that have arrived, such as Ctrl-C, and returns the exception if
// one raises it. Does nothing on threads other than Python's main thread, because Python runs
// handlers only there; nor within 100 ms of the last time, because another thread may hold the GIL
// for 5 ms.
std::exception_ptr exception_of_signals() {
  if (PyThread_get_thread_ident() != main_thread) return nullptr;
  using Clock = std::chrono::steady_clock;
  static Clock::time_point last;
  const Clock::time_point now = Clock::now();
  if (now - last < std::chrono::milliseconds(100)) return nullptr;
  last = now;
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return nullptr;
  return std::make_exception_ptr(py::error_already_set());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  main_thread =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  fusedrnn::cpu::use_interruption(&exception_of_signals);
  m.def("forward_mode", &fusedrnn::forward_mode);
  m.def("build_info", &build_info);
  py::set saving_z;
  for (int i = 0; i < fusedrnn::kNonlinearities; ++i)
    if (fusedrnn::saves_z(fusedrnn::Nonlinearity(i))) saving_z.add(fusedrnn::kNonlinearityNames[i]);
  m.attr("saving_z") = py::frozenset(saving_z);
  m.def("allow_shortcuts", &fusedrnn::cpu::allow_shortcuts, py::arg("allowed"));
  m.def("cpu_threads", &fusedrnn::cpu::num_threads);
  m.def("use_cores", &fusedrnn::cpu::use_cores, py::arg("cores"));
  m.def("cores_in_quota", &fusedrnn::cpu::cores_in_quota, py::arg("root"));
  m.def("use_isa", &fusedrnn::cpu::use_instruction_set, py::arg("name"));
  m.def("plan_cpu", &plan_cpu, py::kw_only(), py::arg("adjoint") = false,
        py::arg("dtype") = "float32", py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("threads"), py::arg("isa") = py::none());
  m.def("cuda_tiles", &cuda_tiles);
  m.def("plan_cuda", &plan_cuda, py::kw_only(), py::arg("adjoint") = false,
        py::arg("dtype") = "float32", py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("leaky") = false, py::arg("tf32") = false, py::arg("regime") = py::none(),
        py::arg("tile") = py::none(), py::arg("split") = py::none(),
        py::arg("fuse_input") = py::none(), py::arg("device"));
#ifdef FUSEDRNN_CUDA
  m.attr("has_cuda") = true;
  m.def("device_properties", &device_properties, py::arg("index"));
  m.def(
      "use_regime",
      [](const std::optional<std::string>& name, std::optional<int> tile, std::optional<int> split,
         std::optional<bool> fuse_input) {
        fusedrnn::cuda::set_overrides({regime_named(name), tile, split, fuse_input});
      },
      py::arg("name"), py::arg("tile") = py::none(), py::arg("split") = py::none(),
      py::arg("fuse_input") = py::none());
#else
  m.attr("has_cuda") = false;
#endif
}
