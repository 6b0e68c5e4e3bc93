// The schemas of all ops. The kernels are registered next to their code (bptt.cpp, cpu/, cuda/);
// fake kernels and derivatives are in fusedrnn/ops.
#include <torch/library.h>

// T time steps, B batch rows, H hidden units; [T, B, *] is [N, *] if batch_sizes [T] is given.
//   activation: x [T, B, I] (without w_ih: u [T, B, H])      -> h [T, B, H], last [B, H], saved
//   tangent:    w, q, r [T, B, H], s0, v0 [B, H]             -> e [T, B, H], last [B, H], m, s
//   adjoint:    g, d, f [T, B, H], g_n [B, H], all optional  -> δ [T, B, H], ∂h0, ∂v0 [B, H], a, y
// epilogues.h has the formulas and defines `saved`: [T, B, H], or empty if h is the value of φ and
// saves_z is false for the nonlinearity. Tangent and adjoint take, as `saved`, what the slope is
// computed from: the value of φ, or its argument if saves_z is true. alpha is [H], or [T, B, H]
// with a value for each step and row. The state before the first step is h0; with the form
// potential it is v0, and h0 is φ(v0). r, f, s and y are not used with the form rate; v0 is used
// only with potential. m, s, a and y are empty unless `full`, ∂h0 and ∂v0 unless `to_h0`.
// With grad_clip, adjoint clips the gradient that a state receives from the step after it and from
// g_n; activation only keeps the value for it.
TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "activation(Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor? b_hh, Tensor? h0, Tensor? v0, "
      "Tensor w_hh, Tensor? alpha, Tensor? q, Tensor? reset, Tensor? batch_sizes, "
      "str nonlinearity, str form, bool reverse, float? grad_clip) -> (Tensor, Tensor, Tensor)");
  m.def(
      "tangent(Tensor? w, Tensor? q, Tensor? r, Tensor? s0, Tensor? v0, Tensor saved, "
      "Tensor w_hh, Tensor? alpha, Tensor? reset, Tensor? batch_sizes, str nonlinearity, "
      "str form, bool reverse, bool full) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adjoint(Tensor? g, Tensor? d, Tensor? f, Tensor? g_n, Tensor saved, Tensor w_hh, "
      "Tensor? alpha, Tensor? reset, Tensor? batch_sizes, str nonlinearity, str form, "
      "bool reverse, float? grad_clip, bool to_h0, bool full) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // One time step of a stack of layers: x [B, I], h0, v0 [L, B, H] -> output [B, H], state [L, B,
  // H]; or all without B. `weights` holds w_ih, w_hh and, with biases, b_ih and b_hh of each layer;
  // then, with a leak, alpha of each layer ([H] or []). Composite: see step.cpp.
  m.def(
      "step(Tensor x, Tensor h0, Tensor[] weights, str nonlinearity=\"tanh\", "
      "str form=\"rate\", Tensor? v0=None) -> (Tensor, Tensor)");

  // The parts of the derivatives outside the recurrences (bptt.cpp).
  m.def(
      "bptt(Tensor? g, Tensor? d, Tensor? f, Tensor? g_n, Tensor x, Tensor? w_ih, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? h0, Tensor? v0, Tensor w_hh, Tensor? alpha, Tensor? reset, "
      "Tensor? batch_sizes, Tensor h, Tensor? saved, str nonlinearity, str form, bool reverse, "
      "float? grad_clip, bool[9] wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "previous(Tensor series, Tensor? first, Tensor? reset, Tensor? batch_sizes, bool reverse) "
      "-> Tensor");
  m.def("following(Tensor series, Tensor? reset, Tensor? batch_sizes, bool reverse) -> Tensor");
  m.def(
      "following_first(Tensor series, Tensor? reset, Tensor? batch_sizes, bool reverse, "
      "SymInt batch) -> Tensor");
  m.def(
      "recurrent_product(Tensor delta, Tensor series, Tensor? first, Tensor? reset, "
      "Tensor? batch_sizes, bool reverse) -> Tensor");
}
