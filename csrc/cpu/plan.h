// Plans how the CPU engine divides a recurrence among threads: a pure function, tested with a
// table.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace fusedrnn::cpu {

// The number of (t, b) rows above which packing pays off, if the unpacked matrix can be used as
// panels (kernels.h).
constexpr int64_t kPanelRowsToPack = 48;

struct PlanInput {
  int64_t T, B, I, H;   // I = 0: no input product
  int64_t number_size;  // bytes of the compute type
  int lanes, tile_rows, tile_vectors;
  int threads;
  bool adjoint = false;
  bool widened = false;  // the compute type is wider than the storage type
  int64_t gemms = 0;     // multiplications per (t, b) row of the gradient GEMMs (gradients.h)

  template <class C>
  PlanInput(const Kernels<C>& kernels, Pass pass, Storage storage, int64_t T, int64_t B, int64_t I,
            int64_t H, int threads, int64_t gemms)
      : T(T),
        B(B),
        I(I),
        H(H),
        number_size(sizeof(C)),
        lanes(kernels.lanes),
        tile_rows(kernels.rows),
        tile_vectors(kernels.vectors),
        threads(threads),
        adjoint(pass == Pass::adjoint),
        widened(size_of(storage) != number_size),
        gemms(gemms) {}

  // Measured number of rows above which packing pays off. Unpacked, the adjoint uses the rows of
  // W_hh as panels, which is possible only without widening; the other passes compute dot products.
  int64_t rows_to_pack() const {
    if (adjoint) return widened ? 0 : kPanelRowsToPack;
    return H * (H + I) * number_size > (1 << 20) ? 24 : 12;
  }
};

struct Plan {
  // Each batch group takes some of the batch rows; the groups do not synchronise with each other in
  // the time loop. The threads of a group split the hidden units and wait at a barrier after each
  // step.
  int batch_groups = 1;
  int hidden_groups = 1;
  int idle = 0;                // threads that take part only in the gradient GEMMs
  bool pack = true;            // copy the weights into panels first
  bool project_ahead = false;  // compute the input products of several steps in one GEMM, before
                               // those steps
  int64_t chunk = 1;           // steps per GEMM, if project_ahead
  double cycles = 0;           // predicted

  int threads() const { return batch_groups * hidden_groups + idle; }
};

// Costs in cycles, for a core that does two vector FMAs and two vector loads per cycle. The figures
// need only rank plans, not predict times. They were fitted on AVX-512 machines with 1 or 2 MB of
// L2.
struct CostModel {
  static constexpr double kRegion = 12000;   // waking and joining a pool of two threads
  static constexpr double kBarrier = 800;    // one barrier of two threads
  static constexpr double kImbalance = 1.1;  // factor: waiting for the slower thread
  // Every thread that arrives moves the counter's cache line to its core. This takes about 17 ns
  // between cores that share an L3 cache (8 on common servers) and 80 ns otherwise.
  static constexpr int kNear = 8;
  static constexpr double kArriveNear = 60, kArriveFar = 300;
  static constexpr double kCall = 60;      // one tile: two calls through pointers
  static constexpr double kEpilogue = 12;  // nonlinearity, loads and stores of one vector
  static constexpr double kL1 = 32 << 10, kL2 = 768 << 10;
  static constexpr double kL2Bytes = 40, kL3Bytes = 20;  // per cycle and core

  // The extra cost of a barrier of more than two threads.
  static double more_threads(int threads) {
    return kArriveNear * std::max(std::min(threads, kNear) - 2, 0) +
           kArriveFar * std::max(threads - kNear, 0);
  }

  static double step(const PlanInput& in, int batch_groups, int hidden_groups) {
    const auto parts = [](int64_t n, int64_t d) { return double((n + d - 1) / d); };
    const double rows = parts(in.B, batch_groups);
    const double vectors = parts(parts(in.H, in.lanes), hidden_groups);
    const double blocks = parts(int64_t(rows), in.tile_rows);
    const double panels = parts(int64_t(vectors), in.tile_vectors);
    const double size = double(in.I + in.H);
    const double multiplications = rows * vectors * size / 2;
    const double loads = (blocks * vectors + rows * panels) * size / 2;
    const double bytes = vectors * in.lanes * double(in.H) * in.number_size;  // read each step
    const double weights = bytes <= kL1   ? 0
                           : bytes <= kL2 ? blocks * bytes / kL2Bytes
                                          : blocks * bytes / kL3Bytes;
    const double alone = std::max({multiplications, loads, weights}) + rows * vectors * kEpilogue +
                         blocks * panels * kCall;
    if (hidden_groups == 1) return alone;
    return alone * kImbalance + kBarrier + more_threads(hidden_groups);
  }

  static double total(const PlanInput& in, int batch_groups, int hidden_groups, int idle) {
    const int threads = batch_groups * hidden_groups + idle;
    const double rows = double(in.T) * double(in.B);
    return (threads > 1 ? kRegion + more_threads(threads) : 0) +
           double(in.T) * step(in, batch_groups, hidden_groups) +
           rows * double(in.gemms) / (2 * in.lanes * threads);
  }
};

inline Plan make_plan(const PlanInput& in) {
  Plan plan;
  plan.cycles = CostModel::total(in, 1, 1, 0);
  const auto consider = [&](int64_t batch_groups, int64_t hidden_groups, int64_t idle) {
    const double cost = CostModel::total(in, int(batch_groups), int(hidden_groups), int(idle));
    if (cost < plan.cycles) {
      plan.cycles = cost;
      plan.batch_groups = int(batch_groups);
      plan.hidden_groups = int(hidden_groups);
      plan.idle = int(idle);
    }
  };
  const int64_t vectors = (in.H + in.lanes - 1) / in.lanes;
  // Try only halvings: fine enough, and much faster than every number on many cores.
  for (int64_t batch_groups = std::min<int64_t>(in.threads, in.B); batch_groups > 0;
       batch_groups /= 2)
    for (int64_t hidden_groups = std::min(in.threads / batch_groups, vectors); hidden_groups > 0;
         hidden_groups /= 2) {
      consider(batch_groups, hidden_groups, 0);
      const int64_t idle = in.threads - batch_groups * hidden_groups;
      if (in.gemms && idle > 0) consider(batch_groups, hidden_groups, idle);
    }

  plan.pack = in.T * in.B > in.rows_to_pack();

  // One GEMM over several steps fills the register tile if a step has too few rows, and it keeps
  // input products out of the time between barriers.
  const int64_t rows = (in.B + plan.batch_groups - 1) / plan.batch_groups;
  if (in.I > 0 && plan.pack && in.T > 1 && (rows < 4 || plan.hidden_groups > 1)) {
    plan.project_ahead = true;
    const int64_t columns = (vectors + plan.hidden_groups - 1) / plan.hidden_groups * in.lanes;
    plan.chunk = std::clamp<int64_t>(8192 / (rows * columns), 1, std::min<int64_t>(in.T, 64));
  }
  return plan;
}

}  // namespace fusedrnn::cpu
