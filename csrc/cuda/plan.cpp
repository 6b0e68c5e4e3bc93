#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace fusedrnn::cuda {
namespace {

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
constexpr int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }

constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

// Throughput and latency of an SM, from public figures. An architecture without any gets those of
// the RTX 4090 (8.9). They serve to rank plans. How well they predict is measured on a GPU
// (bench/README.md).
struct Speeds {
  double fma_f64;      // multiplications per cycle in float64; in float32 they are 128
  double mma;          // cycles of a warp scheduler for an m16n8k16 in 16 bits, or m16n8k8 in TF32
  double mma_latency;  // cycles until the next mma can add to the same sum
  double gemm;         // multiplications per cycle in a large 16-bit GEMM; half as many in TF32
};

Speeds speeds(int architecture) {
  switch (architecture) {
    case 75: return {2, 16, 34, 350};
    case 80: return {32, 8, 25, 800};
    case 90:
    case 100:
    case 103: return {64, 6.5, 33, 1300};
    default: return {2, 32, 34, 220};  // 86, 89, 120
  }
}

// In cycles, unless a comment gives another unit.
constexpr double kLoad = 33;  // latency of a load from shared memory
constexpr double kFma = 4;    // latency of an FMA
constexpr double kShuffle = 25;
constexpr double kBarrier = 35;       // __syncthreads
constexpr double kEpilogue = 70;      // tanh, and a store into shared memory
constexpr double kItem = 40;          // instructions for each number that a thread owns,
constexpr double kSend = 4;           // and for sending it to one peer
constexpr double kPartial = 90;       // adding the partial sums of warps that share K
constexpr double kClusterHop = 240;   // from a store at a peer until it is visible there
constexpr double kClusterBytes = 14;  // bytes per cycle and SM, from SM to SM
constexpr double kGridHop = 2100;     // from stores, through a barrier in L2, to all blocks,
constexpr double kFlagHop = 1600;     // and to a warp that only polls a flag in L2
constexpr double kL2Latency = 700;    // until the first states of a group are in shared memory
constexpr double kL2Bytes = 24;       // bytes per cycle and SM
constexpr double kSetUp = 700;        // loading a chunk of weights, once per launch
constexpr double kLaunch = 2.2;       // µs, from one kernel of a stream to the next;
constexpr double kNextLaunch = 1.2;   // µs, if the next may begin before the previous one ends
constexpr double kGemmLaunch = 6;     // µs, least cost of a GEMM before the recurrence
constexpr double kCut = 12;           // µs, for a second stream and a second launch of each kernel
constexpr double kQueueForward = 20;  // µs of CPU time to queue an overlapping GEMM,
constexpr double kQueueBackward = 100;  // and those of backward, from Python

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
  const int64_t padded_k = plan.chunks * tile.chunk();
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

// The same for the slices regime.
Shared shared_memory_of_slices(const Tile& tile, const PlanInput& in, const Plan& plan) {
  const int64_t size = tile.number_size(), slab = plan.slab * tile.chunk();
  const int64_t groups = ceil_div(plan.rows, tile.rows);
  Shared shared;
  shared.e_row = size == 2 ? slab + 8 : round_up(slab, 32) + 8;  // banks, as above
  shared.e_size = tile.rows * shared.e_row + tile.overrun(1);
  shared.vectors = std::max<int64_t>(0, plan.chunks - tile.held()) * tile.chunk_bytes();
  shared.arrivals = shared.vectors + 2 * plan.units * 4;
  shared.carry = shared.arrivals + 8 * (2 * kMostSlots + 2 * kMostGroups);
  const bool carries = in.leaky || in.pass == Pass::adjoint;
  shared.partial = shared.carry + (carries ? groups * tile.rows * plan.units * 4 : 0);
  shared.e = shared.partial + groups * tile.rows * plan.units * plan.slices * 4;
  shared.end = shared.e + plan.slots * shared.e_size * size;
  return shared;
}

// Predicted microseconds per step of a team, including a share of launching and loading weights.
double step_time(const Tile& tile, const PlanInput& in, const Plan& plan, const Device& device) {
  const Speeds speed = speeds(device.architecture);
  const double groups = double(ceil_div(plan.rows, tile.rows));
  // Warps without units are idle: at most 8 warps are busy, on 4 schedulers.
  const double warp_units = (tile.mma() ? 16 : 4) * tile.units;
  const double busy = std::min(8.0, std::ceil(double(plan.units) / warp_units) * plan.split);
  const double per_scheduler = std::ceil(busy / 4);
  const double chunks = double(plan.chunks / plan.split);
  const double spilled = std::max(0.0, chunks - tile.held());
  const double items = tile.mma() ? 2.0 * tile.units / std::min(plan.split, 2) : 1;
  const double peers = plan.regime == Regime::cluster ? double(plan.blocks) : 0;
  // A group of rows takes as long as it occupies the busiest resource, or as long as one warp takes
  // from its first load to its last store, whichever is longer.
  double issue, feed, latency;
  if (tile.mma()) {
    issue = chunks * 2 * tile.units * speed.mma;
    feed = busy * (chunks * 4 + spilled * 2 * tile.units * 4);
    latency = chunks * speed.mma_latency + (plan.split > 1 ? kPartial : 0);
  } else {
    const double numbers = 16.0 / tile.number_size();
    const double rate = tile.number_size() == 8 ? speed.fma_f64 / 128 : 1;
    issue = chunks * numbers * tile.units * tile.rows / rate;
    feed = busy * (chunks * tile.rows * 2 + spilled * tile.units * 4);  // an LDS.128 takes 2, or 4
    latency = chunks * numbers * std::max(kFma, tile.units * tile.rows / rate) + 3 * kShuffle;
  }
  issue = per_scheduler * (issue + items * (kItem * (tile.mma() ? 2 : 1) + peers * kSend));
  latency += kLoad + kEpilogue;
  double gather = 0;
  if (plan.regime == Regime::grid)
    gather =
        double(tile.rows * (in.H + (plan.fuse_input ? in.I : 0)) * tile.number_size()) / kL2Bytes;
  double cycles = groups * std::max({issue, feed, latency, gather});
  switch (plan.regime) {
    case Regime::block: cycles += kBarrier; break;
    case Regime::cluster: cycles += kClusterHop; break;
    case Regime::grid: cycles += kGridHop + kL2Latency + gather; break;
    case Regime::step:
    case Regime::slices: break;  // have cost models of their own
  }
  const double once = kLaunch + chunks * kSetUp / device.clock / 1000;
  return cycles / device.clock / 1000 + once / double(in.T);
}

// The same for the slices regime, where K is split into slices and groups of rows take turns.
double slices_time(const Tile& tile, const PlanInput& in, const Plan& plan, const Device& device) {
  const double groups = double(ceil_div(plan.rows, tile.rows)), chunks = double(plan.chunks);
  const double K = chunks * tile.chunk(), cluster_units = double(plan.slices * plan.units);
  const double spilled = std::max(0.0, chunks - tile.held());
  const double busy = std::min(8.0, std::ceil(cluster_units / 32) * (tile.mma() ? 1 : 2));
  const double per_scheduler = std::ceil(busy / 4);
  // Cycles for a group of rows: arithmetic, shared memory, and the two exchanges (partial sums from
  // SM to SM, states through L2).
  double products, feed;
  if (tile.mma()) {
    products = per_scheduler * chunks * 2 * tile.units * speeds(device.architecture).mma;
    feed = busy * (chunks * 4 + spilled * 2 * tile.units * 4);
  } else {  // per thread 32 sums over half of K, with 12 loads for 128 multiplications
    products = per_scheduler * 32 * K / 2 * 1.1;
    feed = busy * 12 * K / 8;
  }
  const double sums = tile.rows * cluster_units * 4 * (plan.slices - 1) / plan.slices;
  const double sends = sums / kClusterBytes;
  const double gather = tile.rows * K * tile.number_size() / kL2Bytes;
  // While one warp sends and finishes, another warp of the same scheduler multiplies.
  const double others = 2 * kItem + 8 * kSend;
  const double turn = std::max({products + others, feed, sends, gather});
  const double trip =
      products + others + sends + kClusterHop + kEpilogue + kFlagHop + kL2Latency + gather;
  const double once = kLaunch + chunks * kSetUp / device.clock / 1000;
  return std::max(groups * turn, trip) / device.clock / 1000 + once / double(in.T);
}

bool half(const PlanInput& in) { return in.storage == Storage::bf16 || in.storage == Storage::f16; }

// Predicted microseconds per step of a GEMM over all steps, with `products` multiplications per row
// and unit: I for u = x W_ihᵀ.
double gemm_time(const PlanInput& in, int64_t products, const Device& device) {
  const Speeds speed = speeds(device.architecture);
  const double rate = half(in)                     ? speed.gemm
                      : in.tf32                    ? speed.gemm / 2
                      : in.storage == Storage::f64 ? speed.fma_f64 * 0.8
                                                   : 128 * 0.75;
  const double cycles = double(in.B) * double(products) * double(in.H) / rate / device.sms;
  const double bytes =
      double(in.B) * double(products + 2 * in.H) * double(size_of(in.storage));  // write and read u
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
  plan.teams = ceil_div(in.B, kStepRows);
  if (in.leaky) plan.carry_bytes = in.B * in.H * (in.storage == Storage::f64 ? 8 : 4);
  const Speeds speed = speeds(device.architecture);
  const double K = double(in.H + (fuse ? in.I : 0));
  const double rate = half(in)                     ? 4 * 2048 / speed.mma * 0.5
                      : in.storage == Storage::f64 ? speed.fma_f64 * 0.7
                                                   : 128 * 0.7;
  const double waves = std::ceil(double(plan.blocks * plan.teams) / device.sms);
  const double products = kStepUnits * kStepRows * K / rate;
  const double bytes = (kStepUnits + kStepRows) * K * double(size_of(in.storage)) / kL2Bytes;
  plan.microseconds =
      (device.architecture >= 90 ? kNextLaunch + (kLaunch - kNextLaunch) / double(in.T) : kLaunch) +
      (waves * std::max(products, bytes) + kL2Latency) / device.clock / 1000;
  return plan;
}

// A plan that splits K into 2^log2_slices slices, or none if that is impossible. The inputs are
// multiplied beforehand, because K is large without them.
std::optional<Plan> slices_plan(const PlanInput& in, const Device& device, int t, int log2_slices) {
  const Tile& tile = kTiles[t];
  Plan plan;
  plan.regime = Regime::slices;
  plan.tile = t;
  plan.slices = 1 << log2_slices;
  plan.units = own_units(tile);
  const int64_t cluster_units = plan.slices * plan.units;
  if (!tile.slices() || cluster_units > tile.block_units(1)) return std::nullopt;
  if (tile.mma() && device.architecture != 90) return std::nullopt;  // registers: slices.cuh
  const int64_t clusters = ceil_div(in.H, cluster_units);            // per team
  const int64_t at_once = device.clusters[log2_slices] / clusters;
  if (at_once == 0) return std::nullopt;
  plan.blocks = clusters * plan.slices;
  plan.state_chunks = plan.chunks = ceil_div(ceil_div(in.H, tile.chunk()), plan.slices);
  plan.slab = tile.mma() ? plan.chunks : std::min<int64_t>(kSliceSlab, plan.chunks);
  const auto fits = [&](int64_t rows, int slots) {
    plan.rows = rows;
    plan.slots = slots;
    plan.shared = shared_memory_of_slices(tile, in, plan);
    return plan.shared.end <= device.shared_memory;
  };
  // As many rows per team as let all teams run at once; or as many as there is room for, in several
  // waves. Then as many buffers as there is room for.
  int64_t groups = std::min(ceil_div(ceil_div(in.B, at_once), tile.rows), int64_t(kMostGroups));
  while (groups > 0 && !fits(groups * tile.rows, 2)) --groups;
  if (groups == 0) return std::nullopt;
  plan.waves = ceil_div(ceil_div(in.B, at_once), groups * tile.rows);
  const int64_t rows = std::min(in.B, round_up(ceil_div(in.B, plan.waves * at_once), tile.rows));
  for (int slots = kMostSlots; !fits(rows, slots); --slots) continue;
  plan.teams = ceil_div(in.B, plan.rows);
  plan.waves = ceil_div(plan.teams, at_once);
  plan.counters = plan.teams * ceil_div(plan.rows, tile.rows);
  plan.microseconds = double(plan.waves) * slices_time(tile, in, plan, device);
  plan.fuse_input = in.I == 0;
  return plan;
}

// The plan predicted to be the fastest, of those that satisfy the overrides if there are any.
Plan choose(const PlanInput& in, const Device& device, const Wish& wish) {
  const double gemm = in.I > 0 ? gemm_time(in, in.I, device) : 0;
  Plan best;
  bool found = false, as_wished = false;
  const auto consider = [&](Plan plan, bool wished) {
    if (!plan.fuse_input) plan.input_microseconds = gemm;
    const double time = plan.microseconds + plan.input_microseconds;
    if (!found || (wished && !as_wished) ||
        (wished == as_wished && time < best.microseconds + best.input_microseconds)) {
      best = plan;
      found = true;
      as_wished = wished;
    }
  };
  const auto agrees = [](const auto& wanted, auto value) { return !wanted || *wanted == value; };
  const auto agrees_on_input = [&](bool fuse) {
    return in.I == 0 || agrees(wish.fuse_input, fuse);
  };

  for (const bool fuse : {true, false})
    if (fuse || in.I > 0)
      consider(step_plan(in, device, fuse),
               agrees(wish.regime, Regime::step) && agrees_on_input(fuse));
  if (in.B == 0 || in.H == 0) best.microseconds = best.input_microseconds = 0;  // nothing runs
  if (in.B == 0 || in.H == 0 || wish.regime == Regime::step) return best;

  for (int t = 0; t < kTileCount; ++t) {
    const Tile& tile = kTiles[t];
    if (!suits(tile, in, device)) continue;
    for (int log2 = 1; log2 < 4 && device.cooperative; ++log2)
      if (const std::optional<Plan> plan = slices_plan(in, device, t, log2))
        consider(*plan, agrees(wish.regime, Regime::slices) && agrees(wish.tile, t) &&
                            agrees(wish.split, 1) && agrees_on_input(false));
    if (tile.only_slices()) continue;
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
        const int64_t most_units = tile.block_units(split);
        const auto try_teams = [&](Regime regime, int64_t blocks, int64_t at_once) {
          if (at_once == 0) return;
          plan.regime = regime;
          plan.blocks = blocks;
          // Spread units evenly, in multiples of the 16 bytes that are sent at once.
          plan.units =
              std::min(most_units, round_up(ceil_div(in.H, blocks), 16 / tile.number_size()));
          const bool wished = agrees(wish.regime, regime) && agrees(wish.tile, t) &&
                              agrees(wish.split, split) && agrees_on_input(fuse);
          // As many rows per team as let all teams run at once; or half as many, in two waves; etc.
          for (int64_t waves = 1;; waves *= 2) {
            plan.rows = std::min(in.B, round_up(ceil_div(in.B, waves * at_once), tile.rows));
            plan.teams = ceil_div(in.B, plan.rows);
            plan.waves = ceil_div(plan.teams, at_once);
            plan.shared = shared_memory(tile, in, plan);
            if (plan.shared.end <= device.shared_memory && blocks * plan.teams <= kMostBlocks) {
              plan.counters = regime == Regime::grid ? plan.teams : 0;
              plan.microseconds = double(plan.waves) * step_time(tile, in, plan, device);
              consider(plan, wished);
            }
            if (plan.rows <= tile.rows) break;
          }
        };
        // Teams of as few blocks as possible, and larger ones: with more blocks each has fewer
        // units, which is faster if a block's schedulers are the limit (mostly in float64).
        const int64_t fewest = ceil_div(in.H, most_units);
        if (fewest == 1) try_teams(Regime::block, 1, device.clusters[0]);
        const auto useful = [&](int64_t blocks) { return 2 * blocks <= in.H; };
        for (int log2 = 1; log2 < 5; ++log2) {
          const int64_t blocks = int64_t(1) << log2;
          if (blocks >= fewest && (blocks / 2 < std::max<int64_t>(fewest, 2) || useful(blocks)))
            try_teams(Regime::cluster, blocks, device.clusters[log2]);
        }
        for (int64_t blocks = fewest; blocks <= device.sms && device.cooperative; blocks *= 2)
          if (blocks == fewest || useful(blocks))
            try_teams(Regime::grid, blocks, device.sms / blocks);
      }
  }
  return best;
}

// After how many steps to split the sequence so that GEMMs overlap the recurrence; 0: not at all.
// The share of the GEMMs that overlaps is chosen so that, on the idle SMs, it takes as long as the
// part of the recurrence that it overlaps.
int64_t where_to_cut(const PlanInput& in, const Plan& plan, const Device& device,
                     const std::optional<int64_t>& wanted) {
  const bool forward = in.pass == Pass::activation;
  const int64_t products = !forward ? in.products : plan.fuse_input ? 0 : in.I;
  // No split if rows carry more precision than the dtype in which states are stored.
  if (products == 0 || in.T < 2 || in.B == 0 || in.H == 0 || in.packed || (in.leaky && half(in)))
    return 0;
  if (wanted) return std::min(*wanted, in.T - 1);
  if (plan.regime == Regime::step) return 0;  // the CPU is busy launching and would be too late
  const double T = double(in.T), gemm = gemm_time(in, products, device);
  const double busy = double(plan.blocks * ceil_div(plan.teams, plan.waves)) / device.sms;
  const double idle = std::max(0.0, 1 - busy);
  const double chain = plan.microseconds;
  // The GEMMs must also be queued before the part of the recurrence that they overlap has ended.
  const double queued = forward ? kQueueForward : kQueueBackward;
  const double share = std::min(idle * chain / (idle * chain + gemm), 1 - queued / (chain * T));
  const double cost = kCut + double(plan.chunks) * kSetUp / device.clock / 1000;
  const double saved = share * gemm - cost / T;
  if (saved < std::max(kCut / T, 0.05 * (chain + gemm))) return 0;
  return std::clamp<int64_t>(std::llround((forward ? 1 - share : share) * T), 1, in.T - 1);
}

}  // namespace

Plan make_plan(const PlanInput& in, const Device& device, const Wish& wish) {
  Plan plan = choose(in, device, wish);
  plan.cut = where_to_cut(in, plan, device, wish.cut);
  return plan;
}

// No std::ostringstream: where g++ links the C++ library statically (seen beside an H200), writing a
// double to one crashes once torch has loaded the shared library.
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
    words += count(plan.teams, plan.regime == Regime::block     ? "block"
                               : plan.regime == Regime::cluster ? "cluster"
                                                                : "team");
    if (plan.regime != Regime::block) words += " of " + count(plan.blocks, "block");
    if (plan.regime == Regime::slices) words += " in clusters of " + std::to_string(plan.slices);
    words += ", each with " + count(plan.rows, "batch row") + "; a block keeps " +
             (plan.slices > 1 ? "a slice of " : "") + "the weights of " +
             count(plan.slices * plan.units, "hidden unit");
    const bool spills = plan.chunks / plan.split > tile.held();
    words += std::string(spills ? " in registers and shared memory" : " in registers") +
             " and uses " + number(double(plan.shared.end) / 1024) + " KB of shared memory";
  }
  if (in.I > 0 && plan.fuse_input) {
    words += "; the input product is part of the step";
  } else if (in.I > 0) {
    words += "; one GEMM multiplies the inputs of ";
    words += plan.cut == 0 ? "all steps before"
                           : std::to_string(plan.cut) +
                                 " steps before, and one those of the others on idle SMs meanwhile";
  } else if (plan.cut > 0) {
    words += "; what " + std::to_string(plan.cut) +
             " steps left is multiplied on idle SMs during the others, for the gradients";
  }
  words += "; about " + number(plan.microseconds) + " µs a step";
  if (plan.input_microseconds > 0)
    words += " and " + number(plan.input_microseconds) + " µs for its input";
  return words + " on " + device.name;
}

}  // namespace fusedrnn::cuda
