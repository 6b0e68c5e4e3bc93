// The arithmetic of a step, and the only place where it stands. V is one number or a vector of
// them; each engine brings its V with operators, comparisons, select(), fma(), tanh(), exp() and
// expm1(). After the includes of an engine, so that V's functions are found.
//
// Notation: φ the nonlinearity, α the leak, k the state that a step starts from (h[t-1], or 0
// where keep is false), p = α φ'(z) the gate.
#pragma once

#ifdef __CUDACC__
#define FUSEDRNN_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fusedrnn {

// Nonlinearities whose slope is a function of their value: φ'(z) = slope(φ(z)). So the backward
// pass needs no z. Written so that NaN passes through, as in torch.
struct Tanh {
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
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return z;
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V) {
    return V(1);
  }
};

struct Sigmoid {
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return V(1) / (V(1) + exp(V(0) - z));
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return h * (V(1) - h);
  }
};

struct Softplus {
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    // log(1 + e^z) = max(z, 0) + log(1 + e^-|z|)
    const V magnitude = select(z < V(0), V(0) - z, z);
    return select(z < V(0), V(0), z) + log1p_of_at_most_one(exp(V(0) - magnitude));
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return V(0) - expm1(V(0) - h);
  }
};

struct Retanh {  // rectified tanh
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
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return select(z < V(0), V(0.01) * z, z);
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return select(h <= V(0), V(0.01), V(1));
  }
};

struct Elu {
  template <class V>
  static FUSEDRNN_INLINE V value(V z) {
    return select(z < V(0), expm1(select(z < V(0), z, V(0))), z);
  }
  template <class V>
  static FUSEDRNN_INLINE V slope(V h) {
    return select(h <= V(0), h + V(1), V(1));
  }
};

// Calls f with the nonlinearities in the order of the enum.
#define FUSEDRNN_FOR_EACH_NONLINEARITY(f) \
  f(Tanh) f(Relu) f(Identity) f(Sigmoid) f(Softplus) f(Retanh) f(Hardtanh) f(LeakyRelu) f(Elu)

// h = (1 - α) k + α φ(z)
template <class F, class V>
FUSEDRNN_INLINE void activation(F f, V z, V k, bool leaky, V alpha, V& h, V& phi) {
  phi = f.value(z);
  h = leaky ? k + alpha * (phi - k) : phi;
}

// p = α φ'(z)
template <class F, class V>
FUSEDRNN_INLINE V gate(F f, V phi, bool leaky, V alpha) {
  return leaky ? alpha * f.slope(phi) : f.slope(phi);
}

// m = w + k Wᵀ,  λ = q + p m + (1 - α) k    (acc is k Wᵀ, k the tangent carried over)
template <class V>
FUSEDRNN_INLINE void tangent(V acc, V w, V q, V p, V k, bool leaky, V alpha, V& lambda, V& m) {
  m = w + acc;
  lambda = q + p * m;
  if (leaky) lambda = lambda + (V(1) - alpha) * k;
}

// a = g + carry + δ' W,  δ = d + p a,  carry = (1 - α) a, which is 0 without a leak
// (acc is δ' W; δ' and the carry come from the step after, 0 where its keep is false)
template <class V>
FUSEDRNN_INLINE void adjoint(V acc, V g, V d, V p, V& carry, bool leaky, V alpha, V& a, V& delta) {
  a = g + (carry + acc);
  delta = d + p * a;
  if (leaky) carry = (V(1) - alpha) * a;
}

}  // namespace fusedrnn
