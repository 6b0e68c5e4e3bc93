// Plans how the CUDA engine runs a recurrence: a pure function of the problem and the device's
// properties, tested with a table of cases. Depends neither on CUDA nor on torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../recurrence.h"

namespace fusedrnn::cuda {

// Where W_hh is kept during the time loop, and how states are exchanged. The batch is split among
// groups of blocks. The blocks of a batch group share one W_hh: each computes some of the hidden
// units, for the same batch rows.
//   step     in L2 or device memory: one launch per step
//   block    in the registers and shared memory of one SM; the batch is split over SMs
//   cluster  in those of 2 to 16 SMs, which write states into each other's shared memory
//   grid     in those of many SMs, which exchange states through L2
enum class Regime { step, block, cluster, grid };
constexpr const char* kRegimeNames[] = {"step", "block", "cluster", "grid"};

struct Device {
  std::string name;
  int architecture;         // 90 for compute capability 9.0
  int sms;                  // streaming multiprocessors
  int64_t shared_memory;    // bytes available to a block
  double clock;             // GHz
  double memory_bandwidth;  // GB/s
  // How many clusters of 1, 2, 4, 8 and 16 blocks, one block per SM, the device runs at once; 0 if
  // it does not support the size.
  int clusters[5];
  bool cooperative = true;  // supports cooperative launches

  // Below 8.0, neither tensor cores nor ordinary arithmetic support bf16: f32 takes its place.
  Storage computed_as(Storage storage) const {
    return storage == Storage::bf16 && architecture < 80 ? Storage::f32 : storage;
  }
};

struct PlanInput {
  Pass pass;
  Storage storage;
  bool tf32;           // torch's settings allow TF32 in f32 products
  int64_t T, B, I, H;  // I = 0: no input product
  bool leaky = false;
};

// The arithmetic of a product, and how it is divided among a block's 256 threads (products.cuh).
enum class Arithmetic { fma_f32, fma_f64, mma_bf16, mma_f16, mma_tf32 };
struct Tile {
  Arithmetic arithmetic;
  int units;  // fma: per thread (a block has 32 times as many); mma: per warp, in sixteens
  int rows;   // batch rows at once

  constexpr bool mma() const { return arithmetic >= Arithmetic::mma_bf16; }
  constexpr int number_size() const {
    return arithmetic == Arithmetic::fma_f64                                         ? 8
           : arithmetic == Arithmetic::fma_f32 || arithmetic == Arithmetic::mma_tf32 ? 4
                                                                                     : 2;
  }
  constexpr int computed_size() const { return arithmetic == Arithmetic::fma_f64 ? 8 : 4; }
  // K is divided into chunks. A thread holds its part of `held` chunks in registers; the rest is in
  // shared memory.
  constexpr int chunk() const { return mma() ? 64 / number_size() : 128 / number_size(); }
  // As many as fill 128 registers; fewer if the sums of many rows, or float64, need more than the
  // other 127.
  constexpr int held() const {
    if (mma()) return 16 / units;
    return units == 1 ? 27 : number_size() == 8 ? 14 : 32 / units;
  }
  // How many of the chunks in registers are multiplied without a branch between them, so that their
  // loads are in flight together. A row of states is padded with zeros to such a group.
  constexpr int group() const { return !mma() && rows <= 2 && held() % 4 == 0 ? 4 / rows : 1; }
  constexpr int64_t padded_chunks(int64_t chunks) const {
    return chunks < held() ? (chunks + group() - 1) / group() * group() : chunks;
  }
  // The elements after the rows of a buffer that a product loads but ignores: two chunks for each
  // warp that shares K.
  constexpr int overrun(int split) const { return mma() ? 2 * split * chunk() : 0; }
  constexpr int chunk_bytes() const { return (mma() ? 8192 : 4096) * units; }
  // The units of a block if `split` warps share the K of the same units.
  constexpr int block_units(int split) const { return (mma() ? 128 / split : 32) * units; }
};
constexpr Tile kTiles[] = {
    {Arithmetic::fma_f32, 2, 1},  {Arithmetic::fma_f32, 2, 4},  {Arithmetic::fma_f32, 4, 2},
    {Arithmetic::fma_f32, 1, 8},  {Arithmetic::fma_f64, 2, 1},  {Arithmetic::fma_f64, 2, 4},
    {Arithmetic::mma_bf16, 1, 8}, {Arithmetic::mma_bf16, 2, 8}, {Arithmetic::mma_f16, 1, 8},
    {Arithmetic::mma_f16, 2, 8},  {Arithmetic::mma_tf32, 1, 8}, {Arithmetic::mma_tf32, 2, 8},
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

constexpr int kThreads = 256;   // per block
constexpr int kStepUnits = 64;  // step regime: hidden units per block,
constexpr int kStepRows = 32;   // and batch rows

// The layout of a block's shared memory, in byte offsets. The weights that do not fit into
// registers come first.
struct Shared {
  int64_t e, carry, vectors, partial, arrivals, end;
  int64_t e_row, e_size;  // elements per row and per buffer of e; e is two buffers
};

struct Plan {
  Regime regime = Regime::step;
  bool fuse_input = true;  // a step multiplies x by W_ih, too; otherwise GEMMs compute u = x W_ihᵀ
  int tile = 0;            // index into kTiles
  int split = 1;           // mma: warps that share the K of the same units
  int64_t rows = 0;        // batch rows of a batch group
  int64_t units = 0;       // hidden units of a block
  int64_t blocks = 0;      // blocks of a batch group
  int64_t batch_groups = 0;
  int64_t waves = 1;         // the batch groups of a wave run at once
  int64_t chunks = 0;        // of K
  int64_t state_chunks = 0;  // those of `chunks` that belong to states
  Shared shared{};           // memory of a block
  int64_t counters = 0;      // workspace: number of words, which must be zero,
  int64_t carry_bytes = 0;   // and of bytes for the carries of rows between launches
  // Predicted times per step: of the recurrence, and of the GEMM for its inputs.
  double microseconds = 0;
  double input_microseconds = 0;
};

// Overrides for tests and experiments; ignored if no plan that can run the problem satisfies them.
struct Overrides {
  std::optional<Regime> regime;
  std::optional<int> tile, split;
  std::optional<bool> fuse_input;
};

// Returns the plan predicted to be fastest, of those that satisfy the overrides if there are any.
Plan make_plan(const PlanInput& in, const Device& device, const Overrides& overrides = {});

// Describes the plan in a sentence or two, for explain() and for error messages.
std::string in_words(const PlanInput& in, const Plan& plan, const Device& device);

}  // namespace fusedrnn::cuda
