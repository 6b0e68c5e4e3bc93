// The interface to the engines: every pass of an RNN, forward or backward, is a recurrence
//
//   acc = e[prev] M,    (state, e[t]) = epilogue(acc, state, inputs of step t)
//
// with a matrix M that stays in cache, or on the chip, for all steps. Torch-free: raw pointers,
// sizes and strides in elements. Included by both engines.
#pragma once

#include <cstdint>
#include <limits>

namespace fusedrnn {

// Which recurrence runs (the formulas: epilogues.h).
//   activation  h        from x (or u), q: the forward pass
//   tangent     e, m, s  from w, q, r: the derivative of activation in a direction
//   adjoint     δ, a, y  from g, d, f: BPTT, the transpose of tangent
enum class Pass { activation, tangent, adjoint };
constexpr int kPasses = 3;

// What the state is, and where the leak acts (epilogues.h).
enum class Form { rate, potential, inside };
constexpr int kForms = 3;
constexpr const char* kFormNames[kForms] = {"rate", "potential", "inside"};

// In the order of the list in epilogues.h.
enum class Nonlinearity {
  tanh,
  relu,
  identity,
  sigmoid,
  softplus,
  retanh,
  hardtanh,
  leaky_relu,
  elu
};
constexpr int kNonlinearities = 9;
constexpr const char* kNonlinearityNames[kNonlinearities] = {
    "tanh", "relu", "identity", "sigmoid", "softplus", "retanh", "hardtanh", "leaky_relu", "elu"};

// How tensors are stored. bf16 and f16 are widened on load: arithmetic and carries are f32.
enum class Storage { f32, f64, bf16, f16 };
constexpr int64_t size_of(Storage storage) {
  return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A [T, B, *] tensor whose last dimension is dense: (t, b, j) lies at data[t * step + b * row + j].
// If packed (Problem::batch_sizes given), the rows of all steps are consecutive, `row` elements
// apart.
struct Series {
  void* data = nullptr;
  int64_t step = 0;
  int64_t row = 0;
};

// A [B, H] tensor, one state for each batch row.
struct States {
  void* data = nullptr;
  int64_t row = 0;
};

// Pointers marked "optional" may be null. W_ih [H, I] and W_hh [H, H] are dense in the last
// dimension; their rows are `*_row` elements apart.
struct Problem {
  Pass pass;
  Nonlinearity nonlinearity;
  Form form;
  Storage storage;
  int64_t T, B, I, H;                    // I = 0: no input product
  bool descending;                       // t runs from T-1 down to 0
  const int64_t* batch_sizes = nullptr;  // [T], non-increasing; optional
  const bool* reset = nullptr;           // [T, B] or packed [N], dense; optional. true: step t
                                         // starts from 0 instead of from step t-1

  const void* w_hh;
  int64_t w_hh_row;
  const void* w_ih = nullptr;  // activation only, with I > 0
  int64_t w_ih_row = 0;
  const void* b_ih = nullptr;  // [H], optional
  const void* b_hh = nullptr;  // [H], optional

  Series x;       // activation: [T, B, I], with I > 0
  Series in[3];   // activation: u, q, -     tangent: w, q, r   adjoint: g, d, f   optional
  Series gate;    // tangent, adjoint: `saved` of activation, or h if `saved` is empty
  Series alpha;   // the leak, optional (1); `step` and `row` 0: one [H] for all
  Series out[3];  // activation: h, saved, - tangent: e, m, s   adjoint: δ, a, y
                  // optional, except out[0]
  // What the first step multiplies: h0 (potential: φ(v0)); for tangent, its tangent. Optional (0).
  // Adjoint: the gradient of `last`.
  States first;
  States first_carry;  // potential, activation and tangent: v0. Optional (0)
  // Each row's state after its last step (potential: v). Adjoint: the gradient of `first`. Optional
  States last;
  States last_carry;  // potential, adjoint: the gradient of `first_carry`. Optional
  // Adjoint: the limit of the gradient that a state receives from the step after it.
  double grad_clip = std::numeric_limits<double>::infinity();

  // Whether each step and row has an alpha of its own.
  constexpr bool alpha_varies() const { return alpha.data && alpha.row != 0; }
  constexpr bool clips() const { return grad_clip < std::numeric_limits<double>::infinity(); }
};

}  // namespace fusedrnn
