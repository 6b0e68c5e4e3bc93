// The interface to the engines: every pass of an RNN, forward or backward, is a recurrence
//
//   acc = e[prev] M,    (state, e[t]) = epilogue(acc, state, inputs of step t)
//
// with a matrix M that stays in cache, or on the chip, for all steps. Torch-free: raw pointers,
// sizes and strides in elements. Included by both engines.
#pragma once

#include <cstdint>

namespace fusedrnn {

// Which recurrence runs (the formulas: epilogues.h).
//   activation  h    from x (or u): the forward pass
//   tangent     λ    from w, q: the derivative of activation in a direction
//   adjoint     a, δ from g, d: BPTT, the transpose of tangent
enum class Pass { activation, tangent, adjoint };
constexpr int kPasses = 3;

// In the order of kNonlinearityNames (checks.h) and of the list in epilogues.h.
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
  Storage storage;
  int64_t T, B, I, H;                    // I = 0: no input product
  bool descending;                       // t runs from T-1 down to 0
  const int64_t* batch_sizes = nullptr;  // [T], never rising; optional
  const bool* keep = nullptr;            // [T, B] or packed [N], dense; optional. false: step t
                                         // starts from 0 instead of from step t-1

  const void* w_hh;
  int64_t w_hh_row;
  const void* w_ih = nullptr;  // activation only, with I > 0
  int64_t w_ih_row = 0;
  const void* b_ih = nullptr;   // [H], optional
  const void* b_hh = nullptr;   // [H], optional
  const void* alpha = nullptr;  // [H], the leak, optional (1)

  Series x;       // activation: [T, B, I], with I > 0
  Series in[2];   // activation: u, -    tangent: w, q    adjoint: g, d     optional
  Series gate;    // tangent, adjoint: `saved` of activation, or h if `saved` is empty
  Series out[2];  // activation: h, saved   tangent: λ, m         adjoint: δ, a   second optional
  States first;   // state before the first step: h0, λ0; adjoint: ∂L/∂h_n      optional (0)
  States last;    // each row's state after its last step; adjoint: ∂L/∂h0      optional
};

}  // namespace fusedrnn
