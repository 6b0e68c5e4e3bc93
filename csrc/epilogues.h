// The arithmetic of a step, defined only here. V is a number or a vector of numbers; each engine
// provides its own V with operators, comparisons, select(), fma(), tanh(), exp(), expm1() and
// log1p_of_at_most_one(). Include this file after the headers of the engine, so that V's functions
// are found.
//
// Notation: φ is the nonlinearity, α the leak, k the state that a step starts from (that of step
// t-1, or 0 where reset is true), and z = u + e Wᵀ the pre-activation, where e is the output that
// belongs to k.
//
//   form       state                             output
//   rate       h = (1 - α) k + α φ(z) + q        h
//   potential  v = (1 - α) k + α z + q           h = φ(v)
//   inside     h = φ((1 - α) k + α z + q)        h
//
// The derivatives of all forms are one linear recurrence and its transpose:
//
//   tangent    m = w + e' Wᵀ       s = q + (1 - α) k + P m       e = r + R s
//   adjoint    y = g + δ' W        a = f + (1 - α) a' + R y      δ = d + P a
//
// A prime marks the values of the step that ran before. k is s', except in the form inside: there k
// is e', and the adjoint adds (1 - α) a' to y instead of to a. With the form rate, P = α φ'(z) and
// R = 1, so s = e, and r = f = 0; with the other forms, P = α and R = φ'.
#pragma once

#include "recurrence.h"

#ifdef __CUDACC__
#define FUSEDRNN_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fusedrnn {

// Nonlinearities. The slope φ' is computed from the value of φ. That is the output h, except with
// the form rate and a leak or q: then the forward pass saves φ(z). If saves_z, the argument of φ is
// saved instead and the slope is computed from it, because the rounded value of φ does not
// determine the slope: elu'(z) = e^z = φ(z) + 1 if φ(z) has become -1; softplus in f16 if φ(z) has
// become 0. NaN propagates, as in torch.
struct Tanh {
  static constexpr bool saves_z = false;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return tanh(z);
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return V(1) - h * h;
  }
};

struct Relu {
  static constexpr bool saves_z = false;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return select(z < V(0), V(0), z);
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return select(h <= V(0), V(0), V(1));
  }
};

struct Identity {
  static constexpr bool saves_z = false;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return z;
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V) {
    return V(1);
  }
};

template <class V>
FUSEDRNN_INLINE V exp_of_minus_magnitude(V z) {
  return exp(select(z < V(0), z, V(0) - z));
}

struct Sigmoid {
  static constexpr bool saves_z = false;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    const V e = exp_of_minus_magnitude(z);
    return select(z < V(0), e, V(1)) / (V(1) + e);
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return h * (V(1) - h);
  }
};

struct Softplus {
  static constexpr bool saves_z = true;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    // log(1 + e^z) = max(z, 0) + log(1 + e^-|z|)
    return select(z < V(0), V(0), z) + log1p_of_at_most_one(exp_of_minus_magnitude(z));
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V z) {
    return Sigmoid::value(z);
  }
};

struct Retanh {  // rectified tanh
  static constexpr bool saves_z = false;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return Relu::value(tanh(z));
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return select(h <= V(0), V(0), V(1) - h * h);
  }
};

struct Hardtanh {
  static constexpr bool saves_z = false;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return select(z < V(-1), V(-1), select(z > V(1), V(1), z));
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return select(h <= V(-1), V(0), select(h >= V(1), V(0), V(1)));
  }
};

struct LeakyRelu {
  static constexpr bool saves_z = false;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return select(z < V(0), V(0.01) * z, z);
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return select(h > V(0), V(1), V(0.01));
  }
};

struct Elu {
  static constexpr bool saves_z = true;
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return select(z < V(0), expm1(select(z < V(0), z, V(0))), z);
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V z) {
    return select(z < V(0), exp(select(z < V(0), z, V(0))), V(1));
  }
};

// Calls f with each nonlinearity, in the order of the enum.
#define FUSEDRNN_FOR_EACH_NONLINEARITY(f) \
  f(Tanh) f(Relu) f(Identity) f(Sigmoid) f(Softplus) f(Retanh) f(Hardtanh) f(LeakyRelu) f(Elu)

constexpr unsigned set_of_those_that_save_z() {
  unsigned set = 0, bit = 1;
#define FUSEDRNN_ADD(F)        \
  set |= F::saves_z ? bit : 0; \
  bit <<= 1;
  FUSEDRNN_FOR_EACH_NONLINEARITY(FUSEDRNN_ADD)
#undef FUSEDRNN_ADD
  return set;
}
constexpr unsigned kSaveZ = set_of_those_that_save_z();

FUSEDRNN_INLINE constexpr bool saves_z(Nonlinearity nonlinearity) {
  return kSaveZ >> unsigned(nonlinearity) & 1;
}

// (1 - α) k. If α is 1, it is -0.0 whatever k is. Adding -0.0 never changes a sum, so nothing is
// carried and the results are bitwise those without a leak.
template <class V>
FUSEDRNN_INLINE V leftover(V alpha, V k) {
  return select(alpha == V(1), V(-0.0), (V(1) - alpha) * k);
}

// Computes the state, the output h, and the value saved for the slope. `rate` is whether the form
// is rate; the two others are selected at run time. The expression k + α (φ(z) - k) needs one
// multiplication fewer, but cancels if k is large, and overflows.
template <bool rate, class F, class V>
FUSEDRNN_INLINE void activation(F f, bool potential, V z, V q, V k, bool leaky, V alpha, V& state,
                                V& h, V& saved) {
  if constexpr (rate) {
    const V value = f.value(z);
    state = h = (leaky ? leftover(alpha, k) + alpha * value : value) + q;
    saved = f.saves_z ? z : value;
  } else {
    saved = (leaky ? leftover(alpha, k) + alpha * z : z) + q;
    h = f.value(saved);
    state = potential ? saved : h;
  }
}

// acc is e' Wᵀ.
template <bool rate, class F, class V>
FUSEDRNN_INLINE void tangent(F f, bool potential, V acc, V w, V q, V r, V saved, V k, bool leaky,
                             V alpha, V& state, V& e, V& m, V& s) {
  const V slope = f.slope(saved);
  m = w + acc;
  s = q + (rate ? (leaky ? alpha * slope : slope) * m : leaky ? alpha * m : m);
  if (leaky) s = s + leftover(alpha, k);
  e = rate ? s : r + slope * s;
  state = potential ? s : e;
}

template <class V>
FUSEDRNN_INLINE V clipped(V v, V limit) {
  return select(v > limit, limit, select(v < V(0) - limit, V(0) - limit, v));
}

// acc is δ' W. The carry is (1 - α) a', which is 0 without a leak; in a row's first step it is the
// gradient of the row's last state. Both are 0 if the step that ran before is a reset. If `clips`,
// what they add to the gradient of the state is clipped to [-limit, limit].
template <bool rate, class F, class V>
FUSEDRNN_INLINE void adjoint(F f, bool potential, V acc, V g, V d, V from, V saved, V& carry,
                             bool leaky, V alpha, bool clips, V limit, V& delta, V& a, V& y) {
  const V slope = f.slope(saved);
  if (!rate && potential) {
    y = g + acc;
    a = clips ? from + slope * g + clipped(slope * acc + carry, limit) : from + slope * y + carry;
  } else {
    const V received = carry + acc;
    y = g + (clips ? clipped(received, limit) : received);
    a = rate ? y : from + slope * y;
  }
  delta = d + (rate ? (leaky ? alpha * slope : slope) * a : leaky ? alpha * a : a);
  if (leaky) carry = leftover(alpha, a);
}

}  // namespace fusedrnn
