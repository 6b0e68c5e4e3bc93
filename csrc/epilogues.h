// The arithmetic of a step, defined only here. V is a number or a vector of numbers; each engine
// provides its V with operators, comparisons, select(), fma(), tanh(), exp() and expm1(). Include
// this file after the headers of the engine, so that V's functions are found.
//
// Notation: φ the nonlinearity, z the pre-activation, α the leak, k the state that a step starts
// from (h[t-1], or 0 where keep is false), p = α φ'(z) the gate.
#pragma once

#include "recurrence.h"

#ifdef __CUDACC__
#define FUSEDRNN_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fusedrnn {

// Nonlinearities. The slope φ'(z) is computed from the value that the forward pass saves. That is
// φ(z), which without a leak is the output itself. With saves_z it is z, for nonlinearities whose
// rounded φ(z) loses the slope: elu'(z) = e^z = φ(z) + 1 where φ(z) has become -1; softplus in f16
// where φ(z) has become 0. NaN propagates, as in torch.
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

// h = (1 - α) k + α φ(z), and the value saved for the slope. The form k + α (φ(z) - k) has one
// product less, but cancels where k is large, and overflows.
template <class F, class V>
FUSEDRNN_INLINE void activation(F f, V z, V k, bool leaky, V alpha, V& h, V& saved) {
  const V phi = f.value(z);
  h = leaky ? leftover(alpha, k) + alpha * phi : phi;
  saved = f.saves_z ? z : phi;
}

// p = α φ'(z)
template <class F, class V>
FUSEDRNN_INLINE V gate(F f, V saved, bool leaky, V alpha) {
  return leaky ? alpha * f.slope(saved) : f.slope(saved);
}

// m = w + k Wᵀ,  λ = q + p m + (1 - α) k    (acc is k Wᵀ; here k is λ[t-1], or 0)
template <class V>
FUSEDRNN_INLINE void tangent(V acc, V w, V q, V p, V k, bool leaky, V alpha, V& lambda, V& m) {
  m = w + acc;
  lambda = q + p * m;
  if (leaky) lambda = lambda + leftover(alpha, k);
}

// a = g + carry + δ' W,  δ = d + p a,  carry = (1 - α) a, which is 0 without a leak
// (acc is δ' W; δ' and the carry come from step t+1 and are 0 where its keep is false)
template <class V>
FUSEDRNN_INLINE void adjoint(V acc, V g, V d, V p, V& carry, bool leaky, V alpha, V& a, V& delta) {
  a = g + (carry + acc);
  delta = d + p * a;
  if (leaky) carry = leftover(alpha, a);
}

}  // namespace fusedrnn
