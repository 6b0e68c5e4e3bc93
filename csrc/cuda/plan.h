// How the CUDA engine runs a recurrence: a pure function of the problem and the device's
// properties, tested as a table. Knows neither CUDA nor torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../recurrence.h"

namespace fusedrnn::cuda {

// Where W_hh lives while time passes, and how far its parts are from each other.
//   step     in L2 or device memory: one launch a step
//   block    in the registers and shared memory of one SM; the batch is split over SMs
//   cluster  in those of 2 to 16 SMs, which write states into each other's shared memory
//   grid     in those of many SMs, which exchange states through L2
//   slices   likewise, and cut along K too: the SMs of a cluster each have a slice, and add up what
//            they found in their shared memory; groups of rows take turns, so that the
//            multiplication of one hides the exchange of the others
enum class Regime { step, block, cluster, grid, slices };
constexpr const char* kRegimeNames[] = {"step", "block", "cluster", "grid", "slices"};

struct Device {
  std::string name;
  int architecture;         // 90 for compute capability 9.0
  int sms;                  // streaming multiprocessors
  int64_t shared_memory;    // bytes that a block may have
  double clock;             // GHz
  double memory_bandwidth;  // GB/s
  // How many clusters of 1, 2, 4, 8 and 16 blocks, each block with an SM of its own, the device
  // holds at once; 0 where it cannot.
  int clusters[5];
  bool cooperative = true;  // whether it can have all blocks of a launch run at once
};

struct PlanInput {
  Pass pass;
  Storage storage;
  bool tf32;           // f32 products may be rounded to TF32: torch's settings say so
  int64_t T, B, I, H;  // I = 0: no input product
  bool leaky = false;
  bool packed = false;
  // Adjoint: multiplications that follow for every row and unit, once what the steps left is known:
  // I, I and H for the gradients of x, W_ih and W_hh. They need not wait for all steps.
  int64_t products = 0;
};

// What multiplies, and how a block's 256 threads lie over the product (products.cuh).
enum class Arithmetic { fma_f32, fma_f64, mma_bf16, mma_f16, mma_tf32 };
struct Tile {
  Arithmetic arithmetic;
  int units;  // fma: of a thread, which are 32 times as many of a block; mma: 16 of a warp
  int rows;   // of the batch at once

  // slices.cuh: one of float32 for that alone, and the larger ones of tensor cores
  constexpr bool only_slices() const { return rows == 32; }
  constexpr bool slices() const { return only_slices() || (mma() && units == 2); }
  constexpr bool mma() const { return arithmetic >= Arithmetic::mma_bf16; }
  constexpr int number_size() const {
    return arithmetic == Arithmetic::fma_f64                                         ? 8
           : arithmetic == Arithmetic::fma_f32 || arithmetic == Arithmetic::mma_tf32 ? 4
                                                                                     : 2;
  }
  constexpr int computed_size() const { return arithmetic == Arithmetic::fma_f64 ? 8 : 4; }
  // K is cut into chunks; a thread holds its part of `held` of them, and more lie in shared memory.
  constexpr int chunk() const { return mma() ? 64 / number_size() : 128 / number_size(); }
  // As many as fill 128 registers; fewer where the sums of many rows, or float64, need more of
  // the other 127.
  constexpr int held() const {
    if (only_slices()) return 0;
    if (mma()) return 16 / units;
    return units == 1 ? 28 : number_size() == 8 ? 14 : 32 / units;
  }
  // Numbers behind the rows of a buffer that a product loads and ignores: two chunks for each warp
  // that shares K.
  constexpr int overrun(int split) const { return mma() ? 2 * split * chunk() : 0; }
  constexpr int chunk_bytes() const { return (mma() ? 8192 : 4096) * units; }
  // of a block, where `split` warps share the K of their units
  constexpr int block_units(int split) const { return (mma() ? 128 / split : 32) * units; }
};
constexpr Tile kTiles[] = {
    {Arithmetic::fma_f32, 2, 1},  {Arithmetic::fma_f32, 2, 4},  {Arithmetic::fma_f32, 4, 2},
    {Arithmetic::fma_f32, 1, 8},  {Arithmetic::fma_f64, 2, 1},  {Arithmetic::fma_f64, 2, 4},
    {Arithmetic::mma_bf16, 1, 8}, {Arithmetic::mma_bf16, 2, 8}, {Arithmetic::mma_f16, 1, 8},
    {Arithmetic::mma_f16, 2, 8},  {Arithmetic::mma_tf32, 1, 8}, {Arithmetic::mma_tf32, 2, 8},
    {Arithmetic::fma_f32, 4, 32},
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

constexpr int kThreads = 256;   // of a block, that multiply
constexpr int kStepUnits = 64;  // of a block in the step regime,
constexpr int kStepRows = 32;   // and its batch rows

// In the slices regime: threads of a block, with four warps (registers can only be given away by
// as many) that fetch states and tell of new ones; and the units of a tile that are a block's own,
// once all slices are added: two for each thread that multiplies, or for half of them.
constexpr int kSliceThreads = kThreads + 128;
constexpr int own_units(const Tile& tile) { return tile.mma() ? 32 : 16; }
constexpr int kMostGroups = 32;  // of rows, of a team
constexpr int kMostSlots = 4;    // for states that are being fetched,
constexpr int kSliceSlab = 2;    // each for so many chunks where tensor cores do not take them all

// Where a block's shared memory has what, in bytes, after the weights that registers do not hold.
struct Shared {
  int64_t e, carry, vectors, partial, arrivals, end;
  int64_t e_row,
      e_size;  // e is 2 buffers, or the slots of slices, of e_size numbers: rows of e_row
};

struct Plan {
  Regime regime = Regime::step;
  bool fuse_input = true;  // W_ih beside W_hh; otherwise one GEMM makes u before the chain
  int tile = 0;            // index into kTiles
  int split = 1;           // mma: warps that share the K of their units
  int64_t rows = 0;        // of the batch, that a team owns
  int64_t units = 0;       // hidden units that a block owns
  int64_t blocks = 0;      // of a team, which shares a W_hh
  int64_t teams = 0;
  int64_t waves = 1;         // of teams that run at once
  int slices = 1;            // of K, each with a block of its own
  int slots = 0;             // slices: buffers for states,
  int64_t slab = 0;          // and the chunks that one has of a slice
  int64_t chunks = 0;        // of K, or of a slice
  int64_t state_chunks = 0;  // of these, of the states
  Shared shared{};           // memory of a block
  int64_t counters = 0;      // words of zeros that the workspace must have,
  int64_t carry_bytes = 0;   // and memory for what rows carry from launch to launch
  // Where that pays, products of all rows run on SMs that the chain leaves idle, which is then cut
  // in two: after so many steps of the walk, or at 0 not at all. Activation: inputs of the steps
  // before the cut are multiplied before the chain begins, and the others' beside it. Adjoint: what
  // the steps before the cut left is multiplied beside those after it.
  int64_t cut = 0;
  // As the cost model has it: a step of the chain, and its share of the GEMM before the chain, of
  // which a cut hides a part.
  double microseconds = 0;
  double input_microseconds = 0;
};

// What tests and the curious ask for, so far as it can run the problem.
struct Wish {
  std::optional<Regime> regime;
  std::optional<int> tile, split;
  std::optional<bool> fuse_input;
  std::optional<int64_t> cut;
};

// The best plan, the best of those wished for if there is one.
Plan make_plan(const PlanInput& in, const Device& device, const Wish& wish = {});

// The plan in a sentence or two, for explain() and for errors.
std::string in_words(const PlanInput& in, const Plan& plan, const Device& device);

}  // namespace fusedrnn::cuda
