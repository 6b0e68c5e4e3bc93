#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace fusedrnn::cuda {
namespace {

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
constexpr int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }

constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

// Throughput of an SM, from public figures. An architecture without figures uses those of the RTX
// 4090 (8.9).
struct Speeds {
  double fma_f64;  // multiplications per cycle in float64; in float32 they are 128
  double mma;      // cycles of a warp scheduler for an m16n8k16 in 16 bits, or m16n8k8 in TF32
  double gemm;     // multiplications per cycle in a large 16-bit GEMM; half as many in TF32
};

Speeds speeds(int architecture) {
  switch (architecture) {
    case 75: return {2, 16, 350};
    case 80: return {32, 8, 800};
    case 90:
    case 100:
    case 103: return {64, 6.5, 1300};
    default: return {2, 32, 220};  // 86, 89, 120
  }
}

// In cycles, unless a comment gives another unit. Fitted to measurements of our kernels on an H200
// (bench/results/gpu-h200; tests/cuda/test_plan_cuda.py compares). On other GPUs they serve to rank
// plans.

// A step of one group of rows, without the product and the exchange:
constexpr double kFmaStep = 640;
constexpr double kMmaStep = 440;
constexpr double kGeneral = 300;  // added in the general kernel: with inputs or several groups
// Added to kMmaStep:
constexpr double kWarpStep = 50;      // for each further warp of a scheduler
constexpr double kSplitStep = 400;    // if warps add up their partial sums
constexpr double kSplitWarp = 20;     // for each warp that does so
constexpr double kRowsStep = 150;     // if there is more than one row
constexpr double kAdjointStep = 200;  // in backward

constexpr double kFmaChunk = 20;           // a chunk of a product: a load from shared memory,
constexpr double kFma = 2.7;               // and each multiplication of a thread
constexpr double kMmaChunk[] = {90, 240};  // a chunk with tensor cores, by units per warp
constexpr double kSpill = 8;  // for each warp and 16 bytes of a thread's weights in shared memory
constexpr double kPacket = 2.4;      // for each 16 bytes that a block sends to a peer
constexpr double kClusterHop = 100;  // what an exchange adds to a barrier of the block
constexpr double kGridHop = 3500;    // from stores, through a barrier in L2, to all blocks
constexpr double kL2Bytes = 8;       // bytes per cycle and SM
constexpr double kSetUp = 1200;      // loading a chunk of weights, once per launch
constexpr double kLaunch = 4.5;      // µs, from one kernel of a stream to the next
constexpr double kStepBase = 7000;   // step regime: loads of the first weights and states, and
constexpr double kStepRate[] = {32, 12, 80};  // multiplications per cycle: f32, f64, 16 bits
constexpr double kGemmLaunch = 6;             // µs, least cost of a GEMM before the recurrence

bool suits(const Tile& tile, const PlanInput& in, const Device& device) {
  const bool has_mma = device.architecture >= 80 || tile.arithmetic == Arithmetic::mma_f16;
  if (tile.mma() && !has_mma) return false;
  switch (in.storage) {
    case Storage::f32:
      return tile.arithmetic == Arithmetic::fma_f32 ||
             (in.tf32 && tile.arithmetic == Arithmetic::mma_tf32);
    case Storage::f64: return tile.arithmetic == Arithmetic::fma_f64;
    case Storage::bf16: return tile.arithmetic == Arithmetic::mma_bf16;
    case Storage::f16: return tile.arithmetic == Arithmetic::mma_f16;
  }
  return false;
}

Shared shared_memory(const Tile& tile, const PlanInput& in, const Plan& plan) {
  const int64_t padded_k = tile.padded_chunks(plan.chunks) * tile.chunk();
  const int64_t size = tile.number_size(), wide = tile.computed_size();
  Shared shared;
  // Padding makes rows begin in different banks: 16 bytes apart for ldmatrix, 32 for loads of two
  // TF32 numbers.
  shared.e_row = !tile.mma() ? padded_k : size == 2 ? padded_k + 8 : round_up(padded_k, 32) + 8;
  const int64_t rows = plan.regime == Regime::grid ? tile.rows : round_up(plan.rows, tile.rows);
  shared.e_size = rows * shared.e_row + tile.overrun(plan.split);
  const int64_t spilled =
      std::max<int64_t>(0, plan.chunks / plan.split - tile.held()) * tile.chunk_bytes();
  shared.e = spilled;
  shared.carry = shared.e + 2 * shared.e_size * size;
  const bool carries = in.leaky || in.pass == Pass::adjoint;
  shared.vectors = shared.carry + round_up(carries ? plan.rows * plan.units * wide : 0, 16);
  shared.partial = shared.vectors + round_up(2 * plan.units * wide, 16);
  shared.arrivals = shared.partial + (plan.split > 1 ? 8192 * tile.units : 0);
  shared.end = shared.arrivals + (plan.regime == Regime::cluster ? 16 : 0);
  return shared;
}

// Predicted microseconds per step of a batch group, including a share of launching and loading
// weights.
double step_time(const Tile& tile, const PlanInput& in, const Plan& plan, const Device& device) {
  const Speeds speed = speeds(device.architecture);
  const double groups = double(ceil_div(plan.rows, tile.rows));
  // Warps without units are idle: at most 8 warps are busy, on 4 schedulers.
  const double warp_units = (tile.mma() ? 16 : 4) * tile.units;
  const double busy = std::min(8.0, std::ceil(double(plan.units) / warp_units) * plan.split);
  const double per_scheduler = std::ceil(busy / 4);
  const double chunks = double(plan.chunks / plan.split);
  const double spilled = std::max(0.0, chunks - tile.held());
  // A chunk takes as long as one warp needs for it, or as long as it occupies a scheduler if that
  // is longer.
  double step, chunk, issue, vectors;
  if (tile.mma()) {
    step = kMmaStep + (plan.split > 1 ? kSplitStep + kSplitWarp * plan.split : 0) +
           kWarpStep * (per_scheduler - 1) + (plan.rows > 1 ? kRowsStep : 0) +
           (in.pass == Pass::adjoint ? kAdjointStep : 0);
    chunk = kMmaChunk[tile.units - 1];
    issue = 2 * tile.units * speed.mma;
    vectors = 2 * tile.units;
  } else {
    const double multiplications = 16.0 / tile.number_size() * tile.units * tile.rows;
    step = kFmaStep;
    chunk = kFmaChunk + kFma * multiplications;
    issue = multiplications * (tile.number_size() == 8 ? 128 / speed.fma_f64 : 1);
    vectors = tile.units;
  }
  const double product =
      chunks * std::max(chunk, per_scheduler * issue) + spilled * busy * vectors * kSpill;
  const bool grid = plan.regime == Regime::grid;
  const bool general = grid || groups > 1 || (in.I > 0 && plan.fuse_input);
  double group = step + product + (general ? kGeneral : 0), cycles = 0;
  if (grid) {  // the states of a group are loaded while the previous group is multiplied
    const double gather =
        double(tile.rows * (in.H + (plan.fuse_input ? in.I : 0)) * tile.number_size()) / kL2Bytes;
    group = std::max(group, gather);
    cycles = kGridHop + gather;
  } else if (plan.regime == Regime::cluster) {
    const double packets = std::ceil(double(plan.units) * tile.number_size() / 16) *
                           double(plan.rows) * double(plan.blocks);
    cycles = kClusterHop + kPacket * packets;
  }
  cycles += groups * group;
  const double once = kLaunch + chunks * kSetUp / device.clock / 1000;
  return cycles / device.clock / 1000 + once / double(in.T);
}

bool half(const PlanInput& in) { return in.storage == Storage::bf16 || in.storage == Storage::f16; }

// Predicted microseconds per step of the GEMM u = x W_ihᵀ over all steps.
double gemm_time(const PlanInput& in, const Device& device) {
  const Speeds speed = speeds(device.architecture);
  const double rate = half(in)                     ? speed.gemm
                      : in.tf32                    ? speed.gemm / 2
                      : in.storage == Storage::f64 ? speed.fma_f64 * 0.8
                                                   : 128 * 0.75;
  const double cycles = double(in.B) * double(in.I) * double(in.H) / rate / device.sms;
  const double bytes =
      double(in.B) * double(in.I + 2 * in.H) * double(size_of(in.storage));  // write and read u
  return std::max(cycles / device.clock, bytes / device.memory_bandwidth) / 1000 +
         kGemmLaunch / double(in.T);
}

// One launch per step: every tile of the result loads its weights and states through L2 each time.
Plan step_plan(const PlanInput& in, const Device& device, bool fuse) {
  Plan plan;
  plan.regime = Regime::step;
  plan.fuse_input = fuse;
  plan.rows = kStepRows;
  plan.units = kStepUnits;
  plan.blocks = ceil_div(in.H, kStepUnits);
  plan.batch_groups = ceil_div(in.B, kStepRows);
  if (in.leaky) plan.carry_bytes = in.B * in.H * (in.storage == Storage::f64 ? 8 : 4);
  const double K = double(in.H + (fuse ? in.I : 0));
  const double rate = kStepRate[half(in) ? 2 : in.storage == Storage::f64 ? 1 : 0];
  const double waves = std::ceil(double(plan.blocks * plan.batch_groups) / device.sms);
  const double cycles = waves * kStepUnits * kStepRows * K / rate + kStepBase;
  plan.microseconds = std::max(kLaunch, cycles / device.clock / 1000);
  return plan;
}

}  // namespace

Plan make_plan(const PlanInput& in, const Device& device, const Overrides& overrides) {
  const double gemm = in.I > 0 ? gemm_time(in, device) : 0;
  Plan best;
  bool found = false, best_satisfies = false;
  const auto consider = [&](Plan plan, bool satisfies) {
    if (!plan.fuse_input) plan.input_microseconds = gemm;
    const double time = plan.microseconds + plan.input_microseconds;
    if (!found || (satisfies && !best_satisfies) ||
        (satisfies == best_satisfies && time < best.microseconds + best.input_microseconds)) {
      best = plan;
      found = true;
      best_satisfies = satisfies;
    }
  };
  const auto agrees = [](const auto& wanted, auto value) { return !wanted || *wanted == value; };
  const auto agrees_on_input = [&](bool fuse) {
    return in.I == 0 || agrees(overrides.fuse_input, fuse);
  };

  for (const bool fuse : {true, false})
    if (fuse || in.I > 0)
      consider(step_plan(in, device, fuse),
               agrees(overrides.regime, Regime::step) && agrees_on_input(fuse));
  if (in.B == 0 || in.H == 0) best.microseconds = best.input_microseconds = 0;  // nothing runs
  if (in.B == 0 || in.H == 0 || overrides.regime == Regime::step) return best;

  for (int t = 0; t < kTileCount; ++t) {
    const Tile& tile = kTiles[t];
    if (!suits(tile, in, device)) continue;
    for (int split = 1; split <= (tile.mma() ? 8 : 1); split *= 2)
      for (const bool fuse : {true, false}) {
        if (!fuse && in.I == 0) continue;
        Plan plan;
        plan.tile = t;
        plan.split = split;
        plan.fuse_input = fuse;
        plan.state_chunks = ceil_div(in.H, tile.chunk());
        plan.chunks =
            round_up(plan.state_chunks + (fuse ? ceil_div(in.I, tile.chunk()) : 0), split);
        const int64_t max_units = tile.block_units(split);
        const auto try_groups = [&](Regime regime, int64_t blocks, int64_t at_once) {
          if (at_once == 0) return;
          plan.regime = regime;
          plan.blocks = blocks;
          // Spread units evenly, in multiples of the 16 bytes that are sent at once.
          plan.units =
              std::min(max_units, round_up(ceil_div(in.H, blocks), 16 / tile.number_size()));
          const bool satisfies = agrees(overrides.regime, regime) && agrees(overrides.tile, t) &&
                                 agrees(overrides.split, split) && agrees_on_input(fuse);
          // Try the rows per group that let all groups run at once, then half as many in two waves,
          // and so on.
          for (int64_t waves = 1;; waves *= 2) {
            plan.rows = std::min(in.B, round_up(ceil_div(in.B, waves * at_once), tile.rows));
            plan.batch_groups = ceil_div(in.B, plan.rows);
            plan.waves = ceil_div(plan.batch_groups, at_once);
            plan.shared = shared_memory(tile, in, plan);
            if (plan.shared.end <= device.shared_memory &&
                blocks * plan.batch_groups <= kMaxBlocks) {
              plan.counters = regime == Regime::grid ? plan.batch_groups : 0;
              plan.microseconds = double(plan.waves) * step_time(tile, in, plan, device);
              consider(plan, satisfies);
            }
            if (plan.rows <= tile.rows) break;
          }
        };
        // Also try groups with more blocks than necessary: then each has fewer units, which is
        // faster if a block's schedulers are the limit (mostly in float64).
        const int64_t fewest = ceil_div(in.H, max_units);
        if (fewest == 1) try_groups(Regime::block, 1, device.clusters[0]);
        const auto useful = [&](int64_t blocks) { return 2 * blocks <= in.H; };
        for (int log2 = 1; log2 < 5; ++log2) {
          const int64_t blocks = int64_t(1) << log2;
          if (blocks >= fewest && (blocks / 2 < std::max<int64_t>(fewest, 2) || useful(blocks)))
            try_groups(Regime::cluster, blocks, device.clusters[log2]);
        }
        for (int64_t blocks = fewest; blocks <= device.sms && device.cooperative; blocks *= 2)
          if (blocks == fewest || useful(blocks))
            try_groups(Regime::grid, blocks, device.sms / blocks);
      }
  }
  return best;
}

// No std::ostringstream: if g++ links the C++ library statically (seen on the machine with the
// H200), writing a double to one crashes once torch has loaded the shared library.
std::string in_words(const PlanInput& in, const Plan& plan, const Device& device) {
  const auto number = [](double value) {
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%.3g", value);
    return std::string(digits);
  };
  const auto count = [](int64_t n, const std::string& what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
  };
  std::string words;
  if (plan.regime == Regime::step) {
    words = "step regime: one fused kernel a step, which reads the weights through L2";
  } else {
    const Tile& tile = kTiles[plan.tile];
    const char* arithmetic[] = {"float32 FMA", "float64 FMA", "bfloat16 tensor cores",
                                "float16 tensor cores", "TF32 tensor cores"};
    words = std::string(kRegimeNames[int(plan.regime)]) + " regime, one launch for " +
            std::to_string(in.T) + " steps, by " + arithmetic[int(tile.arithmetic)] + ": ";
    words += count(plan.batch_groups, plan.regime == Regime::block     ? "block"
                                      : plan.regime == Regime::cluster ? "cluster"
                                                                       : "group");
    if (plan.regime != Regime::block) words += " of " + count(plan.blocks, "block");
    words += ", each with " + count(plan.rows, "batch row") + "; a block keeps the weights of " +
             count(plan.units, "hidden unit");
    const bool spills = plan.chunks / plan.split > tile.held();
    words += std::string(spills ? " in registers and shared memory" : " in registers") +
             " and uses " + number(double(plan.shared.end) / 1024) + " KB of shared memory";
  }
  if (in.I > 0 && plan.fuse_input) {
    words += "; the input product is part of the step";
  } else if (in.I > 0) {
    words += "; one GEMM multiplies the inputs of all steps before";
  }
  words += "; about " + number(plan.microseconds) + " µs a step";
  if (plan.input_microseconds > 0)
    words += " and " + number(plan.input_microseconds) + " µs for its input";
  return words + " on " + device.name;
}

}  // namespace fusedrnn::cuda
