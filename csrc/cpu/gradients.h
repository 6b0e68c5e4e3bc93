// Computes the gradients of the weights, the bias and the inputs by GEMMs. After the adjoint
// recurrence of a chunk of steps, all threads of the call multiply the chunk's δ, which is still in
// cache.
//
//   dx = δ W_ih      dW_ih = Σ δᵀ x      dW_hh = Σ δᵀ h'      db = Σ δ
//
// where the sums run over all rows and h' is the state that a step starts from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "engine.h"
#include "kernels.h"
#include "layout.h"
#include "plan.h"
#include "scratch.h"

namespace fusedrnn::cpu {

// out[i][:] = Σ_k rows[i * row + k] · w[k], plus the old value if `add`, for i < n and the columns
// of one panel. The panel is divided into pieces that stay in the L1 or L2 cache while all rows are
// multiplied.
template <class C>
void gemm(const Kernels<C>& kernels, const C* rows, int64_t row, int64_t n, int64_t size,
          const C* w, int64_t w_stride, int vectors, C* out, int64_t out_row, bool add) {
  constexpr int64_t kPiece = 512;
  const int64_t pieces = std::max<int64_t>(1, ceil_div(size, kPiece));
  const int64_t blocks = ceil_div(n, kernels.rows);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t k0 = split_at(size, pieces, piece), k1 = split_at(size, pieces, piece + 1);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = split_at(n, blocks, block);
      const int64_t count = split_at(n, blocks, block + 1) - first;
      const C* list[kMaxRows];
      for (int64_t i = 0; i < count; ++i) list[i] = rows + (first + i) * row + k0;
      Product<C> product{};
      product.state = list;
      product.state_size = k1 - k0;
      product.w_state = w + k0 * w_stride;
      product.w_stride = w_stride;
      product.tile = out + first * out_row;
      product.tile_row = out_row;
      product.init = add || piece > 0 ? product.tile : nullptr;
      product.init_row = out_row;
      kernels.product[count - 1][vectors - 1](product);
    }
  }
}

template <class C>
class GradientGemms {
 public:
  // δ is kept for all steps in `p.out[0]`, if that is given, and otherwise for one chunk at a time.
  GradientGemms(const Problem& p, const Gradients& gradients, const Kernels<C>& kernels,
                const StorageKernels<C>& stored, const Layout& layout, Scratch& scratch,
                int threads)
      : p_(p),
        g_(gradients),
        k_(kernels),
        stored_(stored),
        layout_(layout),
        widened_(layout.size() != int64_t(sizeof(C))),
        threads_(threads) {
    steps_ = std::clamp<int64_t>(kChunkRows / p.B, 1, p.T);
    const int64_t all_rows = layout.rows_before(p.T), rows = std::min(steps_ * p.B, all_rows);
    keeps_all_ = p.out[0].data != nullptr;
    if (keeps_all_) {
      delta_row_ = p.H;
      delta_ = p.out[0].data;
    } else {
      delta_row_ = spread(p.H, layout.size());
      delta_ = scratch.take<char>(rows * delta_row_ * layout.size());
    }
    if (g_.dw_hh) factors_.push_back(factor(true, g_.dw_hh, p.H, scratch, rows));
    if (g_.dw_ih) factors_.push_back(factor(false, g_.dw_ih, g_.I, scratch, rows));
    if (g_.db) sums_ = scratch.take_zeros<double>(p.H);
    if (g_.db || !factors_.empty()) {
      transposed_row_ = spread(padded(rows), sizeof(C));
      transposed_ = scratch.take<C>(p.H * transposed_row_);
    }
    if (!g_.dx) return;
    rows_per_thread_ = ceil_div(rows, threads);
    reads_w_ih_ = !widened_ && all_rows <= kPanelRowsToPack;
    w_ih_ = scratch.take<C>(padded(g_.I) * p.H);
    if (!writes_directly(g_.I)) tiles_ = scratch.take<C>(threads * rows_per_thread_ * width());
    if (widened_) wide_delta_ = scratch.take<C>(threads * rows_per_thread_ * p.H);
  }

  // The number of steps whose δ is kept until the GEMMs.
  int64_t steps() const { return steps_; }

  // Where the recurrence stores δ of row b at step t; the chunk of that step begins at step t0.
  void* delta(int64_t t, int64_t b, int64_t t0) const {
    const int64_t row = layout_.rows_before(t) + b - (keeps_all_ ? 0 : layout_.rows_before(t0));
    return layout_.at(delta_, row * delta_row_);
  }
  int64_t delta_row() const { return delta_row_; }

  // All threads call each of the following functions. Every thread must have returned from one
  // function before any thread enters the next one.

  void pack_weights(int thread) {
    if (!g_.dx) return;
    for_share(panels(g_.I), thread, [&](int64_t panel) {
      if (!reads_in_place(panel))
        stored_.pack(layout_.at(g_.w_ih, column(panel)), g_.w_ih_row, 1, p_.H, columns(g_.I, panel),
                     vectors(g_.I, panel) * k_.lanes, w_ih_ + column(panel) * p_.H);
    });
  }

  // Computes dx and db of the steps [t0, t1), and prepares the factors of the other products.
  void prepare(int thread, int64_t t0, int64_t t1) {
    const int64_t first_row = layout_.rows_before(t0);
    const int64_t rows = layout_.rows_before(t1) - first_row;
    if (g_.dx) inputs(thread, t0, first_row, rows);
    if (transposed_) transpose(thread, t0, rows);
    for (const Factor& f : factors_) {
      std::vector<Rows> runs;
      for_share(panels(f.columns), thread, [&](int64_t panel) {
        if (runs.empty()) runs = f.is_state ? states(t0, t1) : series(g_.x, t0, t1);
        pack_panel(f, panel, runs, first_row, rows);
      });
    }
  }

  // Stores the products of the steps [t0, t1) as the gradients of the weights, or adds them if
  // `add`.
  void add_to_weights(int thread, int64_t t0, int64_t t1, bool add) {
    const int64_t rows = layout_.rows_before(t1) - layout_.rows_before(t0);
    const int64_t row = transposed_row_, blocks = ceil_div(p_.H, k_.rows);
    int64_t items = 0;
    for (const Factor& f : factors_) items += panels(f.columns) * blocks;
    int64_t begin = split_at(items, threads_, thread), end = split_at(items, threads_, thread + 1);
    for (const Factor& f : factors_) {
      for (int64_t panel = 0; panel < panels(f.columns); ++panel) {
        const int64_t block0 = std::clamp<int64_t>(begin, 0, blocks);
        const int64_t block1 = std::clamp<int64_t>(end, 0, blocks);
        begin -= blocks;
        end -= blocks;
        if (block0 >= block1) continue;
        const int64_t unit0 = split_at(p_.H, blocks, block0);
        const int64_t unit1 = split_at(p_.H, blocks, block1);
        const int count = vectors(f.columns, panel);
        gemm(k_, transposed_ + unit0 * row, row, unit1 - unit0, rows,
             f.packed + column(panel) * f.rows, count * k_.lanes, count,
             f.sum + unit0 * f.sum_row + column(panel), f.sum_row, add);
      }
    }
  }

  // Stores the gradients that were not summed in place.
  void finish(int thread) {
    const int64_t unit0 = split_at(p_.H, threads_, thread);
    const int64_t unit1 = split_at(p_.H, threads_, thread + 1);
    for (const Factor& f : factors_)
      if (f.sum != f.gradient)
        for (int64_t unit = unit0; unit < unit1; ++unit)
          stored_.store(f.sum + unit * f.sum_row, f.columns,
                        layout_.at(f.gradient, unit * f.columns));
    if (g_.db)
      for (int64_t unit = unit0; unit < unit1; ++unit) {
        const C sum = C(sums_[unit]);
        stored_.store(&sum, 1, layout_.at(g_.db, unit));
      }
  }

 private:
  static constexpr int64_t kChunkRows = 256;

  // x or h': its product with δᵀ is the gradient of a weight matrix.
  struct Factor {
    bool is_state;  // h'
    void* gradient;
    int64_t columns;
    int64_t rows;  // of a panel
    C* packed;     // panels of one chunk
    C* sum;        // of the chunks; `gradient` itself if possible
    int64_t sum_row;
  };

  // Consecutive rows of a factor, `row` elements apart, or zeros.
  struct Rows {
    const void* data;
    int64_t row, count;
  };

  // The panels of a matrix of `columns` columns: all but the last are `width()` wide.
  int64_t width() const { return k_.vectors * k_.lanes; }
  int64_t padded(int64_t columns) const { return ceil_div(columns, k_.lanes) * k_.lanes; }
  int64_t panels(int64_t columns) const { return ceil_div(columns, width()); }
  int64_t column(int64_t panel) const { return panel * width(); }
  int64_t columns(int64_t of, int64_t panel) const { return std::min(width(), of - column(panel)); }
  int vectors(int64_t of, int64_t panel) const {
    return int(ceil_div(columns(of, panel), k_.lanes));
  }

  // Whether the GEMMs can write a result in place: each row consists of whole vectors of the
  // compute type.
  bool writes_directly(int64_t columns) const { return !widened_ && columns % k_.lanes == 0; }

  // Whether a panel of W_ih is used where it lies, without packing.
  bool reads_in_place(int64_t panel) const {
    return reads_w_ih_ && columns(g_.I, panel) % k_.lanes == 0;
  }

  Factor factor(bool is_state, void* gradient, int64_t columns, Scratch& scratch,
                int64_t rows) const {
    Factor f{is_state, gradient, columns, rows, scratch.take<C>(padded(columns) * rows),
             nullptr,  columns};
    if (writes_directly(columns)) {
      f.sum = static_cast<C*>(gradient);
    } else {
      f.sum_row = padded(columns);
      f.sum = scratch.take<C>(p_.H * f.sum_row);
    }
    return f;
  }

  template <class F>
  void for_share(int64_t n, int thread, const F& f) const {
    for (int64_t i = split_at(n, threads_, thread); i < split_at(n, threads_, thread + 1); ++i)
      f(i);
  }

  void inputs(int thread, int64_t t0, int64_t first_row, int64_t rows) {
    const int64_t row0 = split_at(rows, threads_, thread);
    const int64_t count = split_at(rows, threads_, thread + 1) - row0;
    if (count == 0) return;
    const void* stored = layout_.at(delta(t0, 0, t0), row0 * delta_row_);
    const C* from = static_cast<const C*>(stored);
    int64_t from_row = delta_row_;
    if (widened_) {
      C* wide = wide_delta_ + thread * rows_per_thread_ * p_.H;
      for (int64_t i = 0; i < count; ++i)
        stored_.load(layout_.at(stored, i * delta_row_), p_.H, wide + i * p_.H);
      from = wide;
      from_row = p_.H;
    }
    void* to = layout_.at(g_.dx, (first_row + row0) * g_.I);
    for (int64_t panel = 0; panel < panels(g_.I); ++panel) {
      const int count_of_vectors = vectors(g_.I, panel);
      const C* w = w_ih_ + column(panel) * p_.H;
      int64_t w_stride = count_of_vectors * k_.lanes;
      if (reads_in_place(panel)) {
        w = static_cast<const C*>(g_.w_ih) + column(panel);
        w_stride = g_.w_ih_row;
      }
      C* tiles = tiles_ + thread * rows_per_thread_ * width();
      int64_t tiles_row = width();
      if (!tiles_) {
        tiles = static_cast<C*>(layout_.at(to, column(panel)));
        tiles_row = g_.I;
      }
      gemm(k_, from, from_row, count, p_.H, w, w_stride, count_of_vectors, tiles, tiles_row, false);
      if (tiles_)
        for (int64_t i = 0; i < count; ++i)
          stored_.store(tiles + i * width(), columns(g_.I, panel),
                        layout_.at(to, i * g_.I + column(panel)));
    }
  }

  // Transposes the δ of a chunk, and sums it over rows for db.
  void transpose(int thread, int64_t t0, int64_t rows) {
    const int64_t groups = ceil_div(p_.H, k_.lanes), row = transposed_row_;
    const int64_t unit0 = split_at(groups, threads_, thread) * k_.lanes;
    const int64_t unit1 = std::min(p_.H, split_at(groups, threads_, thread + 1) * k_.lanes);
    if (unit0 >= unit1) return;
    stored_.pack(layout_.at(delta(t0, 0, t0), unit0), 1, delta_row_, unit1 - unit0, rows, row,
                 transposed_ + unit0 * row);
    if (g_.db)
      for (int64_t unit = unit0; unit < unit1; ++unit)
        sums_[unit] += k_.sum(transposed_ + unit * row, row);
  }

  void append(std::vector<Rows>& runs, const Rows& next) const {
    if (next.count == 0) return;
    if (!runs.empty()) {
      Rows& last = runs.back();
      if (last.data && last.row == next.row &&
          layout_.at(last.data, last.count * last.row) == next.data) {
        last.count += next.count;
        return;
      }
    }
    runs.push_back(next);
  }

  std::vector<Rows> series(const Series& s, int64_t t0, int64_t t1) const {
    std::vector<Rows> runs;
    for (int64_t t = t0; t < t1; ++t) append(runs, {layout_.at(s, t, 0), s.row, layout_.active(t)});
    return runs;
  }

  // The states that the steps start from, regardless of resets.
  std::vector<Rows> states(int64_t t0, int64_t t1) const {
    std::vector<Rows> runs;
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t before = p_.descending ? t - 1 : t + 1;
      const int64_t count = std::min(layout_.active(before), layout_.active(t));
      if (count > 0) append(runs, {layout_.at(g_.h, before, 0), g_.h.row, count});
      const void* first = g_.h0.data ? layout_.at(g_.h0.data, count * g_.h0.row) : nullptr;
      append(runs, {first, g_.h0.row, layout_.active(t) - count});
    }
    return runs;
  }

  void pack_panel(const Factor& f, int64_t panel, const std::vector<Rows>& runs, int64_t first_row,
                  int64_t rows) const {
    const int64_t width = vectors(f.columns, panel) * k_.lanes;
    C* const packed = f.packed + column(panel) * f.rows;
    C* to = packed;
    for (const Rows& run : runs) {
      if (run.data) {
        stored_.pack(layout_.at(run.data, column(panel)), run.row, 1, run.count,
                     columns(f.columns, panel), width, to);
      } else {
        std::memset(to, 0, size_t(run.count * width) * sizeof(C));
      }
      to += run.count * width;
    }
    if (f.is_state && p_.reset)
      for (int64_t i = 0; i < rows; ++i)
        if (p_.reset[first_row + i]) std::memset(packed + i * width, 0, size_t(width) * sizeof(C));
  }

  const Problem& p_;
  const Gradients& g_;
  const Kernels<C>& k_;
  const StorageKernels<C>& stored_;
  const Layout& layout_;
  const bool widened_;
  const int threads_;
  int64_t steps_;
  bool keeps_all_;
  void* delta_;
  int64_t delta_row_;
  std::vector<Factor> factors_;
  double* sums_ = nullptr;   // of δ; in float, the error would grow with the number of chunks
  C* transposed_ = nullptr;  // δ of a chunk, [H, rows], zero after the last row
  int64_t transposed_row_ = 0;
  int64_t rows_per_thread_ = 0;
  bool reads_w_ih_ = false;
  C* w_ih_ = nullptr;  // panels
  C* tiles_ = nullptr;
  C* wide_delta_ = nullptr;
};

}  // namespace fusedrnn::cpu
