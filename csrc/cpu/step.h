// One time step on the calling thread, with the weights where they are. It computes what a Run of
// one step computes, without its plan, its threads and its memory. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "scratch.h"

namespace fusedrnn::cpu {

// `alphas` is the number of alphas: H, or 1 for all units.
template <class C>
void run_step(const Problem& p, int64_t alphas, const Kernels<C>& kernels,
              const StorageKernels<C>& stored) {
  const int64_t size = size_of(p.storage), width = ceil_div(p.H, kernels.lanes) * kernels.lanes;
  const bool widened = size != int64_t(sizeof(C)), potential = p.form == Form::potential;
  const auto at = [size](void* data, int64_t offset) {
    return static_cast<char*>(data) + offset * size;
  };
  Scratch scratch;
  const auto take = [&](const void* from, int64_t n) {
    C* numbers = scratch.take_zeros<C>(width);
    if (from) stored.load(from, n, numbers);
    return numbers;
  };
  C* bias = take(p.b_ih, p.H);
  if (p.b_hh) {
    const C* other = take(p.b_hh, p.H);
    for (int64_t j = 0; j < p.H; ++j) bias[j] += other[j];
  }
  C* alpha = nullptr;
  if (p.alpha.data) {
    alpha = take(p.alpha.data, alphas);
    std::fill(alpha + alphas, alpha + p.H, alpha[0]);
  }
  C* tile = scratch.take_zeros<C>(kMaxDotRows * width);
  C* states = scratch.take_zeros<C>(kMaxDotRows * width);
  C* carries = potential ? scratch.take_zeros<C>(kMaxDotRows * width) : nullptr;
  C* inputs = widened ? scratch.take<C>(kMaxDotRows * p.I) : nullptr;

  for (int64_t first = 0; first < p.B; first += kMaxDotRows) {
    const C *input[kMaxDotRows], *state[kMaxDotRows], *carry[kMaxDotRows];
    const int64_t rows = std::min<int64_t>(kMaxDotRows, p.B - first);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = first + i;
      const void* x = at(p.x.data, b * p.x.row);
      if (widened) stored.load(x, p.I, inputs + i * p.I);
      input[i] = widened ? inputs + i * p.I : static_cast<const C*>(x);
      stored.load(at(p.first.data, b * p.first.row), p.H, states + i * width);
      state[i] = carry[i] = states + i * width;
      if (!potential) continue;
      stored.load(at(p.first_carry.data, b * p.first_carry.row), p.H, carries + i * width);
      carry[i] = carries + i * width;
    }
    DotProduct<C> dot{};
    dot.state = state;
    dot.state_size = p.H;
    dot.w_state = p.w_hh;
    dot.w_state_row = p.w_hh_row;
    dot.input = input;
    dot.input_size = p.I;
    dot.w_input = p.w_ih;
    dot.w_input_row = p.w_ih_row;
    dot.init = bias;
    dot.rows = rows;
    dot.columns = p.H;
    dot.tile = tile;
    dot.tile_row = width;
    stored.dot(dot);

    StepEpilogue<C> step{};
    step.form = p.form;
    step.leaky = alpha;
    step.rows = rows;
    step.columns = p.H;
    step.tile = tile;
    step.tile_row = width;
    step.state = carry;
    step.next = states;  // overwrites the old states, which have been multiplied
    step.carry = carries;
    step.state_row = width;
    step.alpha = alpha;
    step.out[0] = at(p.out[0].data, first * p.out[0].row);
    step.out_row[0] = p.out[0].row;
    stored.step[int(Pass::activation)][int(p.nonlinearity)](step);
    for (int64_t i = 0; i < rows; ++i)
      stored.store(carry[i], p.H, at(p.last.data, (first + i) * p.last.row));
  }
}

}  // namespace fusedrnn::cpu
