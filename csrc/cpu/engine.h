// The CPU engine. Torch-free.
#pragma once

#include <exception>
#include <string>

#include "../recurrence.h"
#include "kernels.h"

namespace fusedrnn::cpu {

// The instruction set in use; by default the best that this machine supports.
const InstructionSet& instruction_set();

// The instruction set of this name, or null if it was not compiled.
const InstructionSet* find_instruction_set(const std::string& name);

// Selects another instruction set. Returns false if this machine does not support it.
bool use_instruction_set(const std::string& name);

// What BPTT computes from δ besides the adjoint recurrence (gradients.h). Results are dense; those
// whose pointer is null are not computed. If `out[0]` of the recurrence is null, δ is not kept.
struct Gradients {
  int64_t I = 0;  // features of x
  Series x;
  const void* w_ih = nullptr;
  int64_t w_ih_row = 0;
  Series h;               // the state after each step
  States h0;              // the state before the first step; optional (0)
  void* dx = nullptr;     // [T, B, I] or packed
  void* dw_ih = nullptr;  // [H, I]
  void* dw_hh = nullptr;  // [H, H]
  void* db = nullptr;     // [H]

  // The multiplications of the GEMMs per row of δ.
  static constexpr int64_t multiplications(int64_t H, int64_t I, bool dx, bool dw_ih, bool dw_hh) {
    return H * (I * (dx + dw_ih) + H * dw_hh);
  }
  int64_t multiplications(int64_t H) const { return multiplications(H, I, dx, dw_ih, dw_hh); }
};

// Whether the GEMMs of BPTT are at least as fast in the engine as in torch, for matrices of
// `weights` elements in total. torch widens bf16 and f16 slowly. For the other types, its BLAS on
// x86 is MKL, which reaches the full rate of AVX2, but only half the rate of AVX-512 on AMD.
bool multiplies_as_fast(const InstructionSet& set, Storage storage, int64_t weights);

// Allows or forbids calls of this engine that bypass the ops activation and adjoint: BPTT as one
// call, and single steps. Tests forbid them if another engine replaces these ops.
void allow_shortcuts(bool allowed);
bool shortcuts_allowed();

// Sets a function that a long call runs about every 10 ms, on the thread that made the call. If it
// returns an exception, the call ends early and throws it.
void use_interruption(std::exception_ptr (*interruption)());

// Calls that function and returns its result; null if none is set.
std::exception_ptr interruption();

// Runs a problem on at most `threads` threads and returns when it is done. B, T and H must be at
// least 1.
void run(const Problem& problem, int threads);

// The same for an adjoint, which also computes the gradients that follow from it.
void run(const Problem& problem, const Gradients& gradients, int threads);

// Whether a single time step of `activation` takes least time on one thread, without packed
// weights.
bool step_takes_one_thread(Storage storage, int64_t B, int64_t I, int64_t H, int threads);

// Runs a single time step of `activation` in that way, with less overhead than `run`. T must be 1,
// I at least 1, and `first` and `last` given, with the form potential also `first_carry`. alpha is
// one [H], or one number for all units if `alphas` is 1. There is no `in`, no reset and no second
// output. out[0] may be x if their rows are equal.
void step(const Problem& problem, int64_t alphas);

}  // namespace fusedrnn::cpu
