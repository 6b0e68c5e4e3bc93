// The table of kernels that each instruction set provides. Torch-free. The engine (engine.cpp) is
// compiled once and calls through these pointers; each kernels_*.cpp fills one table.
#pragma once

#include <cstdint>

#include "../recurrence.h"

namespace fusedrnn::cpu {

constexpr int kMaxRows = 6;     // rows of the register tile, at most
constexpr int kMaxVectors = 4;  // vectors across the register tile, at most
constexpr int kMaxDotRows = 4;  // rows of the tile of `dot`, at most

// tile[i][:] = state[i] · w_state + init[i] + input[i] · w_input
// for the rows i of a register tile and one panel. A panel holds some neighbouring columns of the
// weights, as many as fill whole vectors; its row k multiplies element k of a state or an input.
// States and inputs are passed as one pointer per row, so that a reset row can point to zeros.
template <class C>
struct Product {
  const C* const* state;
  int64_t state_size;  // may be 0
  const C* w_state;
  const C* const* input;
  int64_t input_size;  // may be 0
  const C* w_input;
  int64_t w_stride;  // elements between rows of the panels
  const C* init;     // optional
  int64_t init_row;  // 0: the same for every row
  C* tile;
  int64_t tile_row;
};

// The same product with unpacked weights: tile[i][j] = state[i] · w_state[j] + ..., j < columns.
template <class C>
struct DotProduct {
  const C* const* state;
  int64_t state_size;
  const void* w_state;
  int64_t w_state_row;
  const C* const* input;
  int64_t input_size;
  const void* w_input;
  int64_t w_input_row;
  const C* init;  // [columns], optional
  int64_t rows, columns;
  C* tile;
  int64_t tile_row;
};

// The epilogue of one step, for the rows of a tile and one panel of columns. `in`, `gate`, `out`
// and a varying alpha are those of Problem, offset to the first row and column of the tile.
template <class C>
struct StepEpilogue {
  int64_t rows, columns;
  const C* tile;
  int64_t tile_row;
  Form form;
  bool leaky;
  const C* const* state;  // k of each row (adjoint: the carry), at the panel's first column
  C* next;                // what the next step multiplies, at the panel's first row and column
  C* carry;               // where to store the new carry, if not in `next`; optional
  int64_t state_row;      // of next and carry
  const C* alpha;         // of each column, or null if it varies
  const void* varying_alpha;
  int64_t varying_alpha_row;
  const void* in[3];
  int64_t in_row[3];
  const void* gate;
  int64_t gate_row;
  bool clips;   // adjoint
  C grad_clip;  // if it clips
  void* out[3];
  int64_t out_row[3];
};

// Kernels for one storage type. C is the compute type.
template <class C>
struct StorageKernels {
  // panel[k * width + j] = w[k * k_stride + j * j_stride] for j < columns, and 0 for columns <= j <
  // width. width is a multiple of the lanes. One of the strides is 1.
  void (*pack)(const void* w, int64_t k_stride, int64_t j_stride, int64_t size, int64_t columns,
               int64_t width, C* panel);
  void (*load)(const void* from, int64_t n, C* to);
  void (*store)(const C* from, int64_t n, void* to);
  void (*dot)(const DotProduct<C>&);
  void (*step[kPasses][kNonlinearities])(const StepEpilogue<C>&);
};

template <class C>
struct Kernels {
  int lanes;                                                  // elements per vector
  int rows;                                                   // rows of the register tile
  int vectors;                                                // vectors across it
  void (*product[kMaxRows][kMaxVectors])(const Product<C>&);  // by rows - 1, vectors - 1
  C (*sum)(const C* from, int64_t n);                         // n is a multiple of the lanes
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const StorageKernels<float>* stored_f32;
  const StorageKernels<double>* stored_f64;
  const StorageKernels<float>* stored_bf16;
  const StorageKernels<float>* stored_f16;
};

extern const InstructionSet kBaseline;
#ifdef __x86_64__
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace fusedrnn::cpu
