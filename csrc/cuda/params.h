// The arguments of the kernels.
#pragma once

#include <cstdint>

#include "../recurrence.h"
#include "plan.h"

namespace fusedrnn::cuda {

struct Params {
  Problem problem;
  const int64_t* offsets;  // packed: number of rows before each step, on the device
  unsigned* counters;      // grid: one per batch group
  void* carry;             // step, with a leak: the carries of the rows, [B, H]
  Regime regime;
  int first_batch_group;    // index of the first batch group of this launch
  int blocks, rows, units;  // blocks and batch rows of a batch group, hidden units of a block
  int receivers;            // blocks of a batch group that have units
  int split_log2;           // log2 of the number of warps that share the K of the same units
  int state_k;              // where in K the inputs begin, after the states
  int chunks;               // of K
  int e_row, e_size;        // elements of a row and of a buffer of e; below: offsets, in bytes
  int e_offset, carry_offset, vectors_offset, partial_offset, arrivals_offset;
  int x_copy;         // bytes of x copied at a time; 0: element by element
  bool state_copies;  // rows of out[0] can be copied 16 bytes at a time
  bool packs;         // all series can be loaded and stored two elements at a time
  bool plain;         // plain.cuh can run the problem
  int64_t in_step, gate_step, out_step;  // plain.cuh: bytes from one step to the next
};

// The kernels of a tile (plan.h) and those of the step regime, one per pass.
using PersistentKernel = void (*)(Params);
struct TileKernels {
  PersistentKernel of_pass[kPasses];
  PersistentKernel plain[kPasses], plain_cluster[kPasses];  // plain.cuh; none for tangent
};
using StepKernel = void (*)(Params, int64_t);
struct StepKernels {
  StepKernel of_pass[kPasses];
};

// Defined in kernels_*.cu, in the order of kTiles.
extern const TileKernels kFmaF32[4], kFmaF64[2], kMmaBf16[2], kMmaF16[2], kMmaTf32[2];
extern const StepKernels kStepF32, kStepF64, kStepBf16, kStepF16;

}  // namespace fusedrnn::cuda
