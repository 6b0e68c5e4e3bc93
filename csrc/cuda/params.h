// What a kernel is launched with.
#pragma once

#include <cstdint>

#include "../recurrence.h"
#include "plan.h"

namespace fusedrnn::cuda {

struct Params {
  Problem problem;
  const int64_t* offsets;  // packed: rows before each step, on the device
  unsigned* counters;      // grid: one for each team; slices: for each group of its rows
  void* carry;             // step, with a leak: what rows carry, [B, H]
  Regime regime;
  int first_team;           // of this launch
  int blocks, rows, units;  // of a team, of a team, of a block
  int receivers;            // blocks of a team that have units
  int split_log2;           // of the warps that share the K of their units
  int slices, groups;       // slices: of K, of which one has `chunks`; and of a team's rows
  int slots, slab, slabs;   // buffers for states; chunks that one has of a slice; and how many do
  int state_k;              // where inputs follow the states in K
  int chunks;               // of K
  int e_row, e_size;        // shared memory: numbers of a row and of a buffer of e, and what begins
  int e_offset, carry_offset, vectors_offset, partial_offset, arrivals_offset;
  int x_copy;         // bytes by which x can be copied; 0: number by number
  bool state_copies;  // rows of out[0] are whole multiples of 16 bytes
  bool packs;         // all series can be loaded and stored by two numbers
  bool plain;         // plain.cuh can run it;
  int64_t x_step, in_step, gate_step, out_step;  // there, bytes from a step to the next
};

// The kernels of a tile (plan.h), and those of a step, one for each pass.
using PersistentKernel = void (*)(Params);
struct TileKernels {
  PersistentKernel of_pass[kPasses];
  PersistentKernel plain[kPasses], plain_cluster[kPasses];  // plain.cuh; none for tangent
};
using StepKernel = void (*)(Params, int64_t);
struct StepKernels {
  StepKernel of_pass[kPasses];
};

// kernels_*.cu; in the order of kTiles
extern const TileKernels kFmaF32[4], kFmaF64[2], kMmaBf16[2], kMmaF16[2], kMmaTf32[2];
extern const TileKernels kSlicesF32, kSlicesBf16, kSlicesF16, kSlicesTf32;
extern const StepKernels kStepF32, kStepF64, kStepBf16, kStepF16;

}  // namespace fusedrnn::cuda
