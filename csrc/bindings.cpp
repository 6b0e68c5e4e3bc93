// What this library exports: the op schemas, the one list of them, and the module _C, which tells
// how it was built and what the planner decides. The kernels register themselves beside their code
// (cpu/); fake kernels and derivatives are in fusedrnn/_ops.py and fusedrnn/autograd.py.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/engine.h"
#include "cpu/plan.h"

// T time steps, B batch rows, H hidden units; [T, B, *] is [N, *] where batch_sizes [T] is given.
//   activation: x [T, B, I] (without w_ih: u [T, B, H])      -> h [T, B, H], h_n [B, H], phi
//   tangent:    w, q [T, B, H], s0 [B, H]                    -> λ [T, B, H], λ_n [B, H], m
//   adjoint:    g, d [T, B, H], g_n [B, H], all optional     -> δ [T, B, H], ∂h0 [B, H], a
// The formulas are in epilogues.h. The third result of each is empty unless wanted: phi with alpha,
// m and a where `full` is set; so is ∂h0 unless `to_h0`.
TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "activation(Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor? b_hh, Tensor? h0, Tensor w_hh, "
      "Tensor? alpha, Tensor? keep, Tensor? batch_sizes, str nonlinearity, bool reverse) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "tangent(Tensor? w, Tensor? q, Tensor? s0, Tensor phi, Tensor w_hh, Tensor? alpha, "
      "Tensor? keep, Tensor? batch_sizes, str nonlinearity, bool reverse, bool full) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "adjoint(Tensor? g, Tensor? d, Tensor? g_n, Tensor phi, Tensor w_hh, Tensor? alpha, "
      "Tensor? keep, Tensor? batch_sizes, str nonlinearity, bool reverse, bool to_h0, bool full) "
      "-> (Tensor, Tensor, Tensor)");

  // What surrounds the recurrences in their derivatives (bptt.cpp).
  m.def(
      "bptt(Tensor? g, Tensor? d, Tensor? g_n, Tensor x, Tensor? w_ih, Tensor? h0, Tensor w_hh, "
      "Tensor? alpha, Tensor? keep, Tensor? batch_sizes, Tensor h, Tensor? phi, "
      "str nonlinearity, bool reverse, bool[7] wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "previous(Tensor series, Tensor? first, Tensor? keep, Tensor? batch_sizes, bool reverse) "
      "-> Tensor");
  m.def("following(Tensor series, Tensor? keep, Tensor? batch_sizes, bool reverse) -> Tensor");
  m.def(
      "following_first(Tensor series, Tensor? keep, Tensor? batch_sizes, bool reverse, "
      "SymInt batch) -> Tensor");
  m.def(
      "recurrent_product(Tensor delta, Tensor series, Tensor? first, Tensor? keep, "
      "Tensor? batch_sizes, bool reverse) -> Tensor");
}

namespace {

namespace py = pybind11;

// The CPU planner's decision, for tests and for the curious.
py::dict plan_cpu(int64_t T, int64_t B, int64_t I, int64_t H, int64_t number_size, int lanes,
                  int tile_rows, int tile_vectors, int threads, int64_t rows_to_pack) {
  const auto plan = fusedrnn::cpu::make_plan(
      {T, B, I, H, number_size, lanes, tile_rows, tile_vectors, threads, rows_to_pack});
  py::dict result;
  result["batch_groups"] = plan.batch_groups;
  result["hidden_groups"] = plan.hidden_groups;
  result["pack"] = plan.pack;
  result["project_ahead"] = plan.project_ahead;
  result["chunk"] = plan.chunk;
  return result;
}

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("use_isa", &fusedrnn::cpu::use_instruction_set, py::arg("name"));
  m.def("plan_cpu", &plan_cpu, py::kw_only(), py::arg("T"), py::arg("B"), py::arg("I"),
        py::arg("H"), py::arg("number_size") = 4, py::arg("lanes") = 16, py::arg("tile_rows") = 6,
        py::arg("tile_vectors") = 4, py::arg("threads"), py::arg("rows_to_pack") = 16);
}
