// Runs one call of the engine, as one parallel region for the whole sequence. Each thread owns some
// rows of the batch and some hidden units, and runs the time loop for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "barrier.h"
#include "gradients.h"
#include "kernels.h"
#include "layout.h"
#include "plan.h"
#include "scratch.h"

namespace fusedrnn::cpu {

template <class C>
class Run {
 public:
  // `gradients` is optional, and allowed only for the adjoint.
  Run(const Problem& problem, const Gradients* gradients, const Kernels<C>& kernels,
      const StorageKernels<C>& stored, int threads)
      : p_(problem),
        k_(kernels),
        stored_(stored),
        layout_(problem),
        widened_(layout_.size() != int64_t(sizeof(C))),
        vectors_(ceil_div(p_.H, k_.lanes)),
        width_(vectors_ * k_.lanes),
        state_row_(spread(width_, sizeof(C))) {
    const bool adjoint = p_.pass == Pass::adjoint, potential = p_.form == Form::potential;
    plan_ = make_plan({k_, p_.pass, p_.storage, p_.T, p_.B, p_.I, p_.H, threads,
                       gradients ? gradients->multiplications(p_.H) : 0});
    steps_uninterrupted_ =
        std::max<int64_t>(1, int64_t(kCyclesUninterrupted / plan_.cycles * double(p_.T)));

    if (plan_.pack || adjoint) w_state_ = scratch_.template take<C>(width_ * p_.H);
    if (plan_.pack && p_.I) w_input_ = scratch_.template take<C>(width_ * p_.I);
    zeros_ = scratch_.template take_zeros<C>(width_);
    state_[0] = scratch_.template take_zeros<C>(p_.B * state_row_);
    state_[1] = scratch_.template take<C>(p_.B * state_row_);
    if (adjoint || potential) carry_ = scratch_.template take_zeros<C>(p_.B * state_row_);
    if (p_.b_ih || p_.b_hh) bias_ = sum(p_.b_ih, p_.b_hh);
    if (p_.alpha.data && !p_.alpha_varies()) alpha_ = sum(p_.alpha.data, nullptr);
    load_states(p_.first, adjoint ? carry_ : state_[0]);
    if (!adjoint && potential) load_states(p_.first_carry, carry_);
    // Packed rows that start later (descending) may read their first state from either buffer.
    if (p_.batch_sizes) std::memcpy(state_[1], state_[0], size_t(p_.B * state_row_) * sizeof(C));

    tile_row_ = plan_.pack ? k_.vectors * k_.lanes : width_;
    groups_.reset(new SpinBarrier[size_t(plan_.batch_groups)]);
    if (gradients) gemms_.emplace(p_, *gradients, k_, stored_, layout_, scratch_, plan_.threads());
    workers_.reserve(size_t(plan_.threads()));
    for (int i = 0; i < plan_.threads(); ++i) workers_.emplace_back(*this, i);
  }

  // Returns false, without doing anything, if the runtime provides fewer threads than planned.
  bool run() {
    const int threads = plan_.threads();
    bool complete = true;
    if (threads == 1) {
      workers_[0].run();
    } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
      {
        if (omp_get_num_threads() == threads) {
          workers_[size_t(omp_get_thread_num())].run();
        } else if (omp_get_thread_num() == 0) {
          complete = false;
        }
      }
#else
      complete = false;
#endif
    }
    if (interruption_) std::rethrow_exception(interruption_);
    return complete;
  }

 private:
  // About 10 ms. On a busy machine, threads that synchronise every step may take 50 times as long.
  static constexpr double kCyclesUninterrupted = 3e7;

  void load_states(const States& from, C* to) {
    if (!from.data) return;
    for (int64_t b = 0; b < p_.B; ++b)
      stored_.load(layout_.at(from.data, b * from.row), p_.H, to + b * state_row_);
  }

  C* sum(const void* a, const void* b) {
    C* total = scratch_.template take_zeros<C>(2 * width_);
    C* part = total + width_;
    for (const void* vector : {a, b}) {
      if (!vector) continue;
      stored_.load(vector, p_.H, part);
      for (int64_t j = 0; j < p_.H; ++j) total[j] += part[j];
    }
    return total;
  }

  struct Panel {
    int64_t column, columns;  // hidden units
    int vectors;
    int64_t width;
    const C* w_state;
    int64_t w_state_stride;
    const C* w_input;
  };

  // The work of one thread.
  class Worker {
   public:
    Worker(Run& run, int index)
        : r_(run),
          p_(run.p_),
          plan_(run.plan_),
          layout_(run.layout_),
          index_(index),
          group_(index / plan_.hidden_groups),
          row0_(split_at(p_.B, plan_.batch_groups, group_)),
          row1_(split_at(p_.B, plan_.batch_groups, group_ + 1)) {
      if (!steps()) return;
      const int member = index % plan_.hidden_groups;
      const int64_t vector0 = split_at(r_.vectors_, plan_.hidden_groups, member);
      const int64_t vector1 = split_at(r_.vectors_, plan_.hidden_groups, member + 1);
      column0_ = vector0 * r_.k_.lanes;
      column1_ = vector1 * r_.k_.lanes;
      const int64_t count = multiplies_by_dot() ? 0 : ceil_div(vector1 - vector0, r_.k_.vectors);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t v0 = vector0 + split_at(vector1 - vector0, count, i);
        const int64_t v1 = vector0 + split_at(vector1 - vector0, count, i + 1);
        Panel panel{};
        panel.column = v0 * r_.k_.lanes;
        panel.vectors = int(v1 - v0);
        panel.width = panel.vectors * r_.k_.lanes;
        panel.columns = std::min(panel.width, p_.H - panel.column);
        if (lies_in_panels(panel)) {
          panel.w_state = static_cast<const C*>(p_.w_hh) + panel.column;
          panel.w_state_stride = p_.w_hh_row;
        } else {
          panel.w_state = r_.w_state_ + panel.column * p_.H;
          panel.w_state_stride = panel.width;
        }
        panel.w_input = r_.w_input_ + panel.column * p_.I;
        panels_.push_back(panel);
      }

      const int64_t rows = plan_.chunk * (row1_ - row0_);
      tile_ = r_.scratch_.template take_zeros<C>(kMaxRows * r_.tile_row_);
      if (p_.I) inputs_.resize(size_t(rows));
      if (p_.I && r_.widened_) widened_ = r_.scratch_.template take<C>(rows * p_.I);
      if (plan_.project_ahead)
        projected_ = r_.scratch_.template take<C>(rows * (column1_ - column0_));
    }

    void run() {
      std::optional<GradientGemms<C>>& gemms = r_.gemms_;
      if (steps()) pack();
      if (gemms) gemms->pack_weights(index_);
      synchronise_all();
      const int64_t length = gemms ? gemms->steps() : std::min(p_.T, r_.steps_uninterrupted_);
      int64_t uninterrupted = 0;
      for (int64_t s0 = 0; s0 < p_.T; s0 += length) {
        const int64_t s1 = std::min(s0 + length, p_.T);
        t0_ = p_.descending ? p_.T - s1 : s0;
        if (steps())
          for (int64_t s = s0; s < s1; ++s) {
            if (p_.I && s % plan_.chunk == 0) prepare_inputs(s);
            step(s);
          }
        if (gemms) {
          const int64_t t1 = t0_ + (s1 - s0);
          synchronise_all();
          gemms->prepare(index_, t0_, t1);
          synchronise_all();
          gemms->add_to_weights(index_, t0_, t1, s0 > 0);
        }
        uninterrupted += s1 - s0;
        if (uninterrupted < r_.steps_uninterrupted_ || s1 == p_.T) continue;
        uninterrupted = 0;
        if (interrupted()) return;
      }
      if (steps()) finish();
      if (!gemms) return;
      synchronise_all();
      gemms->finish(index_);
    }

   private:
    // Whether this thread takes part in the recurrence. The other threads take part only in the
    // gradient GEMMs.
    bool steps() const { return index_ < plan_.batch_groups * plan_.hidden_groups; }

    // The t of the s-th step.
    int64_t time(int64_t s) const { return p_.descending ? p_.T - 1 - s : s; }

    int64_t rows_at(int64_t t) const {
      return std::max<int64_t>(0, std::min(row1_, layout_.active(t)) - row0_);
    }

    bool lies_in_panels(const Panel& panel) const {
      return p_.pass == Pass::adjoint && !plan_.pack && panel.columns == panel.width;
    }
    bool multiplies_by_dot() const { return p_.pass != Pass::adjoint && !plan_.pack; }

    // Threads with the same hidden units share panels and divide the packing among themselves.
    void pack() {
      const bool adjoint = p_.pass == Pass::adjoint;
      const bool state =
          p_.T > 1 || p_.pass == Pass::activation || (adjoint ? p_.last.data : p_.first.data);
      for (size_t i = size_t(group_); i < panels_.size(); i += size_t(plan_.batch_groups)) {
        const Panel& panel = panels_[i];
        if (state && !lies_in_panels(panel))
          r_.stored_.pack(layout_.at(p_.w_hh, panel.column * (adjoint ? 1 : p_.w_hh_row)),
                          adjoint ? p_.w_hh_row : 1, adjoint ? 1 : p_.w_hh_row, p_.H, panel.columns,
                          panel.width, r_.w_state_ + panel.column * p_.H);
        if (p_.I)
          r_.stored_.pack(layout_.at(p_.w_ih, panel.column * p_.w_ih_row), 1, p_.w_ih_row, p_.I,
                          panel.columns, panel.width, r_.w_input_ + panel.column * p_.I);
      }
    }

    // Collects the input rows of the next chunk of steps, widened if needed, and multiplies them if
    // project_ahead is set.
    void prepare_inputs(int64_t s0) {
      const int64_t s1 = std::min(s0 + plan_.chunk, p_.T);
      int64_t n = 0;
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t t = time(s), rows = rows_at(t);
        for (int64_t i = 0; i < rows; ++i, ++n) {
          const void* x = layout_.at(p_.x, t, row0_ + i);
          if (widened_) r_.stored_.load(x, p_.I, widened_ + n * p_.I);
          inputs_[size_t(n)] = widened_ ? widened_ + n * p_.I : static_cast<const C*>(x);
        }
      }
      chunk_row_ = 0;
      if (!plan_.project_ahead) return;
      for (const Panel& panel : panels_)
        for_blocks(n, r_.k_.rows, [&](int64_t first, int64_t count) {
          Product<C> product{};
          product.input = inputs_.data() + first;
          product.input_size = p_.I;
          product.w_input = panel.w_input;
          product.w_stride = panel.width;
          product.init = r_.bias_ ? r_.bias_ + panel.column : nullptr;
          product.tile_row = column1_ - column0_;
          product.tile = projected_ + first * product.tile_row + (panel.column - column0_);
          r_.k_.product[count - 1][panel.vectors - 1](product);
        });
    }

    // Divides [0, n) into nearly equal blocks of at most `most` and calls f(first, count) for each.
    template <class F>
    static void for_blocks(int64_t n, int64_t most, const F& f) {
      const int64_t blocks = ceil_div(n, most);
      for (int64_t i = 0; i < blocks; ++i)
        f(split_at(n, blocks, i), split_at(n, blocks, i + 1) - split_at(n, blocks, i));
    }

    // Whether row b carries its state into the s-th step.
    bool keeps(int64_t s, int64_t b) const {
      if (!p_.reset) return true;
      if (p_.pass != Pass::adjoint) return !layout_.resets(time(s), b);
      // In the adjoint, row b is reset between the two steps if the step that ran before resets it.
      return s == 0 || b >= layout_.active(time(s - 1)) || !layout_.resets(time(s - 1), b);
    }

    void step(int64_t s) {
      const int64_t t = time(s), rows = rows_at(t);
      const C* from = r_.state_[s & 1];
      C* to = r_.state_[(s + 1) & 1];
      // Rows that have ended are not written again, so copy their last state into the other buffer.
      if (p_.batch_sizes && s > 0) {
        const int64_t ended = std::min(row1_, layout_.active(time(s - 1)));
        for (int64_t b = row0_ + rows; b < ended; ++b)
          std::memcpy(to + b * r_.state_row_ + column0_, from + b * r_.state_row_ + column0_,
                      size_t(column1_ - column0_) * sizeof(C));
      }
      // At the first step of a derivative there is nothing to multiply, unless an initial state was
      // given (that of the adjoint is in carry_). The forward pass multiplies zeros like any state,
      // so that NaN and Inf in W_hh propagate.
      const bool zero_state =
          s == 0 && (p_.pass == Pass::adjoint || (p_.pass == Pass::tangent && !p_.first.data));
      const auto states_of = [&](const C* states, int64_t first, int64_t count, const C** list) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t b = row0_ + first + i;
          list[i] = keeps(s, b) ? states + b * r_.state_row_ : r_.zeros_;
        }
      };
      const C* states[kMaxRows];
      if (multiplies_by_dot()) {
        for_blocks(rows, kMaxDotRows, [&](int64_t first, int64_t count) {
          states_of(from, first, count, states);
          DotProduct<C> dot{};
          dot.state = states;
          dot.state_size = zero_state ? 0 : p_.H;
          dot.w_state = layout_.at(p_.w_hh, column0_ * p_.w_hh_row);
          dot.w_state_row = p_.w_hh_row;
          dot.input = inputs_.data() + chunk_row_ + first;
          dot.input_size = p_.I;
          dot.w_input = layout_.at(p_.w_ih, column0_ * p_.w_ih_row);
          dot.w_input_row = p_.w_ih_row;
          dot.init = r_.bias_ ? r_.bias_ + column0_ : nullptr;
          dot.rows = count;
          dot.columns = std::min(column1_, p_.H) - column0_;
          dot.tile = tile_;
          dot.tile_row = r_.tile_row_;
          r_.stored_.dot(dot);
          epilogue(s, first, count, column0_, dot.columns, states, to);
        });
      } else {
        for (const Panel& panel : panels_)
          for_blocks(rows, r_.k_.rows, [&](int64_t first, int64_t count) {
            states_of(from, first, count, states);
            Product<C> product{};
            product.state = states;
            product.state_size = zero_state ? 0 : p_.H;
            product.w_state = panel.w_state;
            product.w_stride = panel.w_state_stride;
            if (plan_.project_ahead) {
              product.init_row = column1_ - column0_;
              product.init =
                  projected_ + (chunk_row_ + first) * product.init_row + (panel.column - column0_);
            } else {
              product.input = inputs_.data() + chunk_row_ + first;
              product.input_size = p_.I;
              product.w_input = panel.w_input;
              product.init = r_.bias_ ? r_.bias_ + panel.column : nullptr;
            }
            product.tile = tile_;
            product.tile_row = r_.tile_row_;
            r_.k_.product[count - 1][panel.vectors - 1](product);
            epilogue(s, first, count, panel.column, panel.columns, states, to);
          });
      }
      chunk_row_ += rows;

      synchronise_group();
    }

    void epilogue(int64_t s, int64_t first, int64_t count, int64_t column, int64_t columns,
                  const C* const* states, C* to) {
      const int64_t t = time(s), b = row0_ + first;
      const C* at_column[kMaxRows];
      for (int64_t i = 0; i < count; ++i) {
        const C* state = states[i];
        if (r_.carry_) {
          // Without a leak, only the adjoint carries something, and only into a row's first step:
          // the gradient of its last state.
          const bool begins = s == 0 || b + i >= layout_.active(time(s - 1));
          const bool carries = (begins && p_.pass == Pass::adjoint) || (leaky() && keeps(s, b + i));
          state = carries ? r_.carry_ + (b + i) * r_.state_row_ : r_.zeros_;
        }
        at_column[i] = state + column;
      }
      const auto locate = [&](const Series& series) {
        return series.data ? layout_.at(series, t, b, column) : nullptr;
      };
      StepEpilogue<C> step{};
      step.form = p_.form;
      step.leaky = leaky();
      step.rows = count;
      step.columns = columns;
      step.tile = tile_;
      step.tile_row = r_.tile_row_;
      step.state = at_column;
      step.next = to + b * r_.state_row_ + column;
      // Forward, the form potential needs the carry even without a leak: `last` is read from it.
      if (r_.carry_ && (leaky() || p_.pass != Pass::adjoint))
        step.carry = r_.carry_ + b * r_.state_row_ + column;
      step.state_row = r_.state_row_;
      if (r_.alpha_) step.alpha = r_.alpha_ + column;
      if (p_.alpha_varies()) {
        step.varying_alpha = locate(p_.alpha);
        step.varying_alpha_row = p_.alpha.row;
      }
      for (int i = 0; i < 3; ++i) {
        step.in[i] = locate(p_.in[i]);
        step.in_row[i] = p_.in[i].row;
        step.out[i] = locate(p_.out[i]);
        step.out_row[i] = p_.out[i].row;
      }
      if (r_.gemms_) {
        step.out[0] = layout_.at(r_.gemms_->delta(t, b, t0_), column);
        step.out_row[0] = r_.gemms_->delta_row();
      }
      step.gate = locate(p_.gate);
      step.gate_row = p_.gate.row;
      step.clips = p_.clips();
      step.grad_clip = C(p_.grad_clip);
      r_.stored_.step[int(p_.pass)][int(p_.nonlinearity)](step);
    }

    bool leaky() const { return p_.alpha.data != nullptr; }

    void synchronise_all() { r_.all_.wait(plan_.threads(), all_visitor_); }

    // Whether this call must end. All threads call this after the same step. Thread 0, the
    // caller's, writes the result after all threads have read the previous one.
    bool interrupted() {
      synchronise_all();
      if (index_ == 0) r_.interruption_ = interruption();
      synchronise_all();
      return r_.interruption_ != nullptr;
    }

    // Waits for the threads that own other hidden units of these rows.
    void synchronise_group() { r_.groups_[group_].wait(plan_.hidden_groups, group_visitor_); }

    // Stores `last` of each row. In the adjoint, that is the gradient of the initial state, which
    // takes one more product.
    void finish() {
      if (!p_.last.data) return;
      const bool potential = p_.form == Form::potential;
      const C* last = r_.state_[p_.T & 1];
      if (p_.pass != Pass::adjoint) {
        if (potential) last = r_.carry_;
        for (int64_t b = row0_; b < row1_; ++b)
          r_.stored_.store(last + b * r_.state_row_ + column0_, std::min(column1_, p_.H) - column0_,
                           layout_.at(p_.last.data, b * p_.last.row + column0_));
        return;
      }
      for (const Panel& panel : panels_)
        for_blocks(row1_ - row0_, r_.k_.rows, [&](int64_t first, int64_t count) {
          const C* states[kMaxRows];
          for (int64_t i = 0; i < count; ++i)
            states[i] = last + (row0_ + first + i) * r_.state_row_;
          Product<C> product{};
          product.state = states;
          product.state_size = p_.H;
          product.w_state = panel.w_state;
          product.w_stride = panel.w_state_stride;
          product.tile = tile_;
          product.tile_row = r_.tile_row_;
          r_.k_.product[count - 1][panel.vectors - 1](product);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t b = row0_ + first + i;
            C* row = tile_ + i * r_.tile_row_;
            const bool keep = !p_.reset || !layout_.resets(last_time(b), b);
            const C* carry =
                (leaky() && keep ? r_.carry_ + b * r_.state_row_ : r_.zeros_) + panel.column;
            for (int64_t j = 0; j < panel.columns; ++j)
              row[j] = !keep ? C(0) : potential ? row[j] : row[j] + carry[j];
            r_.stored_.store(row, panel.columns,
                             layout_.at(p_.last.data, b * p_.last.row + panel.column));
            if (p_.last_carry.data)
              r_.stored_.store(
                  carry, panel.columns,
                  layout_.at(p_.last_carry.data, b * p_.last_carry.row + panel.column));
          }
        });
    }

    // The t of row b's last step.
    int64_t last_time(int64_t b) const {
      int64_t t = time(p_.T - 1);
      while (layout_.active(t) <= b) --t;
      return t;
    }

    Run& r_;
    const Problem& p_;
    const Plan& plan_;
    const Layout& layout_;
    int index_;
    int group_;
    int64_t row0_, row1_;                // of the batch
    int64_t column0_ = 0, column1_ = 0;  // hidden units, the last ones padded
    std::vector<Panel> panels_;
    C* tile_ = nullptr;
    std::vector<const C*> inputs_;  // x of the steps of a chunk, row by row
    C* widened_ = nullptr;
    C* projected_ = nullptr;
    int64_t chunk_row_ = 0;  // rows of the chunk before this step
    int64_t t0_ = 0;         // the first t of the chunk of steps whose δ is kept
    SpinBarrier::Visitor all_visitor_, group_visitor_;
  };

  const Problem& p_;
  const Kernels<C>& k_;
  const StorageKernels<C>& stored_;
  const Layout layout_;
  const bool widened_;       // the compute type is wider than the storage type
  const int64_t vectors_;    // across H
  const int64_t width_;      // H, padded to vectors
  const int64_t state_row_;  // elements between rows of state_ and carry_
  int64_t tile_row_;
  Plan plan_;
  Scratch scratch_;
  C *w_state_ = nullptr, *w_input_ = nullptr;
  C *bias_ = nullptr, *alpha_ = nullptr;
  C* zeros_;
  C* state_[2];         // what a step multiplies and what it writes; swapped every step
  C* carry_ = nullptr;  // what a row carries, if that differs from what is multiplied
  std::optional<GradientGemms<C>> gemms_;
  int64_t steps_uninterrupted_;
  std::exception_ptr interruption_;
  std::vector<Worker> workers_;
  SpinBarrier all_;                        // all threads
  std::unique_ptr<SpinBarrier[]> groups_;  // the threads of each batch group
};

}  // namespace fusedrnn::cpu
