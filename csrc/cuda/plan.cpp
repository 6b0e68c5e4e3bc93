#include "plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace fusedrnn::cuda {
namespace {

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
constexpr int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }

constexpr int kMaxCluster = 16;
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

// What a device does in a cycle. Public figures, and where none is known those of the H100; sources
// in bench/README.md. They need to rank plans; a GPU run tells how well they predict.
struct Speeds {
  double fma_f64;       // multiplications an SM, where float32 has 128
  double mma;           // cycles of a warp scheduler for an m16n8k16 in 16 bits, or m16n8k8 in TF32
  double mma_latency;   // cycles from one mma to the next that adds to its sum
};

Speeds speeds(int architecture) {
  switch (architecture) {
    case 75: return {2, 16, 34};
    case 80: return {64 / 2.0, 8, 25};
    case 86:
    case 89: return {2, 32, 34};
    case 90: return {64, 6.5, 33};
    case 100: return {64, 6.5, 33};
    default: return {2, 32, 34};
  }
}

// Cycles.
constexpr double kLoad = 33;           // shared memory, to the first number
constexpr double kShuffle = 25;
constexpr double kBarrier = 35;        // __syncthreads
constexpr double kEpilogue = 70;       // tanh, and a store into shared memory
constexpr double kItem = 14;           // and for every number a thread owns
constexpr double kPartial = 90;        // warps adding what they found for the same units
constexpr double kClusterHop = 330;    // stores to peers, and the barrier that shows them
constexpr double kGridHop = 2100;      // the same through L2
constexpr double kL2Bytes = 24;        // a cycle and SM
constexpr double kGather = 700;        // to the first byte through L2, and into shared memory
constexpr double kLaunch = 2.2;        // µs, a kernel after another in a stream
constexpr double kGemmLaunch = 6;      // µs, what a GEMM before the chain costs at least

bool suits(const Tile& tile, const PlanInput& in) {
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
  const int64_t padded_k = plan.chunks * tile.chunk();
  const int64_t size = tile.number_size(), wide = tile.computed_size();
  Shared shared;
  // Rows begin in different banks: 16 bytes apart for ldmatrix, 32 for loads of two TF32 numbers.
  shared.e_row = !tile.mma() ? padded_k : size == 2 ? padded_k + 8 : round_up(padded_k, 32) + 8;
  shared.e_rows = plan.regime == Regime::grid ? tile.rows : round_up(plan.rows, tile.rows);
  const int64_t spilled =
      std::max<int64_t>(0, ceil_div(plan.chunks, plan.split) - tile.held()) * tile.chunk_bytes();
  shared.e = spilled;
  shared.carry = shared.e + 2 * shared.e_rows * shared.e_row * size;
  const bool carries = in.leaky || in.pass == Pass::adjoint;
  shared.vectors = shared.carry + round_up(carries ? plan.rows * plan.units * wide : 0, 16);
  shared.partial = shared.vectors + round_up(2 * plan.units * wide, 16);
  shared.arrivals = shared.partial + (plan.split > 1 ? 8192 * tile.units : 0);
  shared.end = shared.arrivals + (plan.regime == Regime::cluster ? 16 : 0);
  return shared;
}

// Microseconds of one step of a team's walk.
double step_time(const Tile& tile, const PlanInput& in, const Plan& plan, const Device& device) {
  const Speeds speed = speeds(device.architecture);
  const double groups = double(ceil_div(plan.rows, tile.rows));
  // Warps without units wait: 8 warps on 4 schedulers, or fewer.
  const double warp_units = double(tile.block_units(plan.split)) / (tile.mma() ? 8.0 / plan.split : 8);
  const double busy = std::min(8.0, std::ceil(double(plan.units) / warp_units) * plan.split);
  const double per_scheduler = std::ceil(busy / 4);
  const double chunks = double(ceil_div(plan.chunks, plan.split));
  const double spilled = std::max(0.0, chunks - tile.held());
  double product;
  if (tile.mma()) {
    const double mmas = chunks * 2 * tile.units;
    const double issue = mmas * speed.mma * per_scheduler;
    const double feed = busy * (chunks * 4 + spilled * 2 * tile.units * 4);
    product = std::max({issue, feed, chunks * speed.mma_latency}) + kLoad + speed.mma_latency +
              (plan.split > 1 ? kPartial : 0);
  } else {
    const double numbers = 16.0 / tile.number_size();
    const double rate = tile.number_size() == 8 ? speed.fma_f64 / 128 : 1;
    const double issue = chunks * numbers * tile.units * tile.rows * per_scheduler / rate;
    const double feed = busy * (chunks * tile.rows + spilled * tile.units * 4);
    product = std::max(issue, feed) + kLoad + 3 * kShuffle;
  }
  const double items = tile.mma() ? 4 * tile.units / std::min(plan.split, 2) : 1;
  double cycles = groups * (product + items * kItem * per_scheduler) + kEpilogue;
  switch (plan.regime) {
    case Regime::block: cycles += kBarrier; break;
    case Regime::cluster: cycles += kClusterHop; break;
    case Regime::grid:
      cycles += kGridHop + kGather + double(plan.rows * in.H * tile.number_size()) / kL2Bytes;
      break;
    case Regime::step: break;
  }
  return cycles / device.clock / 1000;
}

// µs a step for u = x W_ihᵀ, made for all steps at once.
double gemm_time(const PlanInput& in, const Device& device) {
  if (in.I == 0) return 0;
  const bool half = in.storage == Storage::bf16 || in.storage == Storage::f16;
  const double per_cycle = half || in.tf32 ? 4 * 2048 / speeds(device.architecture).mma * 0.6
                           : in.storage == Storage::f64
                               ? speeds(device.architecture).fma_f64 * 0.8
                               : 128 * 0.7;
  const double products = double(in.B) * double(in.I) * double(in.H);
  const double size = in.storage == Storage::f64 ? 8 : half ? 2 : 4;
  const double bytes = double(in.B) * double(in.I + 2 * in.H) * size;  // u is written and read
  return std::max(products / per_cycle / device.sms / device.clock / 1000,
                  bytes / device.memory_bandwidth / 1000) +
         kGemmLaunch / double(in.T);
}

// One launch a step: the weights come through L2 each time.
Plan step_plan(const PlanInput& in, const Device& device) {
  Plan plan;
  plan.regime = Regime::step;
  plan.rows = kStepRows;
  plan.units = kStepUnits;
  plan.blocks = ceil_div(in.H, kStepUnits);
  plan.teams = ceil_div(in.B, kStepRows);
  if (in.leaky) plan.carry_bytes = in.B * in.H * (in.storage == Storage::f64 ? 8 : 4);
  const double size = in.storage == Storage::f64 ? 8 : in.storage == Storage::f32 ? 4 : 2;
  const double products = double(in.B) * double(in.H) * double(in.H + in.I);
  const double rate = in.storage == Storage::f64 ? speeds(device.architecture).fma_f64 : 128;
  const double weights = double(in.H) * double(in.H + in.I) * size;
  plan.microseconds = kLaunch + std::max(products / rate / 0.6 / device.sms / device.clock / 1000,
                                         weights / (kL2Bytes * device.sms) / device.clock / 1000);
  return plan;
}

}  // namespace

Plan make_plan(const PlanInput& in, const Device& device, std::optional<Regime> only) {
  Plan best = step_plan(in, device);
  // RNNCell, and whatever else has nothing to keep weights for.
  if (only == Regime::step || in.B == 0 || in.H == 0) return best;
  bool found = false;

  const auto consider = [&](Plan plan, const Tile& tile) {
    if (only && plan.regime != *only) return;
    plan.shared = shared_memory(tile, in, plan);
    if (plan.shared.end > device.shared_memory) return;
    int64_t waves = 1;
    if (plan.regime == Regime::grid) {
      if (plan.blocks * plan.teams > device.sms) return;
      plan.counters = plan.teams;
    } else {
      const int log2 = plan.regime == Regime::block ? 0 : int(std::log2(double(plan.blocks)));
      const int at_once = device.clusters[log2];
      if (at_once == 0 || plan.blocks * plan.teams > kMostBlocks) return;
      waves = ceil_div(plan.teams, at_once);
    }
    plan.microseconds = double(waves) * step_time(tile, in, plan, device) +
                        (plan.fuse_input ? 0 : gemm_time(in, device));
    if (!found && only) best = plan, found = true;
    if (plan.microseconds < best.microseconds) best = plan;
  };

  for (int t = 0; t < kTileCount; ++t) {
    const Tile& tile = kTiles[t];
    if (!suits(tile, in) || (tile.mma() && device.architecture < 80 &&
                             tile.arithmetic != Arithmetic::mma_f16))
      continue;
    for (int split = 1; split <= (tile.mma() ? 8 : 1); split *= 2)
      for (const bool fuse : {true, false}) {
        if (!fuse && in.I == 0) continue;
        Plan plan;
        plan.tile = t;
        plan.split = split;
        plan.fuse_input = fuse;
        plan.state_chunks = ceil_div(in.H, tile.chunk());
        plan.chunks = plan.state_chunks + (fuse ? ceil_div(in.I, tile.chunk()) : 0);
        const int64_t most_units = tile.block_units(split);
        const int64_t fewest_blocks = ceil_div(in.H, most_units);

        for (const Regime regime : {Regime::block, Regime::cluster, Regime::grid}) {
          plan.regime = regime;
          if (regime == Regime::block) {
            if (fewest_blocks > 1) continue;
            plan.blocks = 1;
          } else if (regime == Regime::cluster) {
            plan.blocks = 2;
            while (plan.blocks < fewest_blocks) plan.blocks *= 2;
            if (plan.blocks > kMaxCluster) continue;
          } else {
            plan.blocks = fewest_blocks;
          }
          // Spread evenly; in pairs, since a thread owns neighbours.
          plan.units = std::min(most_units, round_up(ceil_div(in.H, plan.blocks), 2));
          for (int64_t groups = 1;; groups *= 2) {
            plan.rows = std::min(in.B, groups * tile.rows);
            plan.teams = ceil_div(in.B, plan.rows);
            consider(plan, tile);
            if (plan.rows == in.B || plan.rows >= 4096) break;
          }
        }
      }
  }
  return best;
}

std::string in_words(const PlanInput& in, const Plan& plan, const Device& device) {
  std::ostringstream words;
  words.precision(3);
  const auto count = [&](int64_t n, const char* what) {
    words << n << " " << what << (n == 1 ? "" : "s");
  };
  if (plan.regime == Regime::step) {
    words << "step regime: one fused kernel a step, which reads the weights through L2";
  } else {
    const Tile& tile = kTiles[plan.tile];
    const char* arithmetic[] = {"float32 FMA", "float64 FMA", "bfloat16 tensor cores",
                                "float16 tensor cores", "TF32 tensor cores"};
    words << kRegimeNames[int(plan.regime)] << " regime, one launch for " << in.T << " steps, by "
          << arithmetic[int(tile.arithmetic)] << ": ";
    count(plan.teams, plan.regime == Regime::block     ? "block"
                      : plan.regime == Regime::cluster ? "cluster"
                                                       : "team");
    if (plan.regime != Regime::block) words << " of " << plan.blocks << " blocks";
    words << ", each with ";
    count(plan.rows, "batch row");
    words << "; a block keeps the weights of ";
    count(plan.units, "hidden unit");
    const bool spills = (plan.chunks + plan.split - 1) / plan.split > tile.held();
    words << (spills ? " in registers and shared memory" : " in registers") << " and uses "
          << plan.shared.end / 1024.0 << " KB of shared memory";
  }
  if (in.I > 0)
    words << (plan.fuse_input ? "; the input product is part of the step"
                              : "; one GEMM multiplies the inputs of all steps before");
  words << "; about " << plan.microseconds << " µs a step on " << device.name;
  return words.str();
}

}  // namespace fusedrnn::cuda
