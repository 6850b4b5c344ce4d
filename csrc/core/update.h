// The base updates on one element: the only place of per-element mathematics, for host and device, in float or double.
//
// w is the weight at which the step is taken, d the direction, m, v, buf the states (updated in place); each function
// returns the new weight. Orders of operations follow torch.optim, so that results agree within a few ulps. The host is
// built without contraction to fused multiply-adds, so that every instruction set gives the same bits.
#pragma once

#include <cmath>

#include "dtype.h"

namespace looksam {

enum class Base : std::uint8_t { sgd, adam, adamw, lamb, grad };

// What the updates of one row need, made once a step from its group's hyper-parameters and its update count
// (base_scalars in scalars.h). A base reads only its own fields.
template <class T>
struct UpdateScalars {
  T lr;
  T weight_decay;
  T decay_factor;  // adamw: 1 - lr weight_decay
  // sgd
  T momentum;
  T direction_weight;  // 1 - dampening; 1 in the first update
  bool nesterov;
  // adam, adamw, lamb
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T eps;
  T inv_bias_correction1;       // 1 / (1 - beta1^count)
  T inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^count)

  template <class U>
  LOOKSAM_HD UpdateScalars<U> to() const {
    return {U(lr),      U(weight_decay),    U(decay_factor), U(momentum),        U(direction_weight),
            nesterov,   U(beta1),           U(one_minus_beta1), U(beta2),        U(one_minus_beta2),
            U(eps),     U(inv_bias_correction1), U(inv_sqrt_bias_correction2)};
  }
};

LOOKSAM_HD float square_root(float x) { return sqrtf(x); }
LOOKSAM_HD double square_root(double x) { return sqrt(x); }
LOOKSAM_HD float absolute(float x) { return fabsf(x); }
LOOKSAM_HD double absolute(double x) { return fabs(x); }

// w - lr d for a plain step; buf is not read.
template <class T>
LOOKSAM_HD T sgd(T w, T d, const UpdateScalars<T>& h) {
  return w - h.lr * (d + h.weight_decay * w);
}

// buf = momentum buf + (1 - dampening) d; w - lr buf, or w - lr (d + momentum buf) with nesterov.
template <class T>
LOOKSAM_HD T sgd_momentum(T w, T d, T& buf, const UpdateScalars<T>& h) {
  d = d + h.weight_decay * w;
  buf = h.momentum * buf + h.direction_weight * d;
  return w - h.lr * (h.nesterov ? d + h.momentum * buf : buf);
}

// (m / bc1) / (sqrt(v / bc2) + eps)
template <class T>
LOOKSAM_HD T adam_direction(T m, T v, const UpdateScalars<T>& h) {
  return m * h.inv_bias_correction1 / (square_root(v) * h.inv_sqrt_bias_correction2 + h.eps);
}

// m = beta1 m + (1 - beta1) d; v = beta2 v + (1 - beta2) d^2
template <class T>
LOOKSAM_HD void adam_moments(T d, T& m, T& v, const UpdateScalars<T>& h) {
  m = h.beta1 * m + h.one_minus_beta1 * d;
  v = h.beta2 * v + h.one_minus_beta2 * d * d;
}

// Adam, weight decay added to the direction. Kingma & Ba 2015.
template <class T>
LOOKSAM_HD T adam(T w, T d, T& m, T& v, const UpdateScalars<T>& h) {
  adam_moments(d + h.weight_decay * w, m, v, h);
  return w - h.lr * adam_direction(m, v, h);
}

// AdamW, weight decay apart from the direction. Loshchilov & Hutter 2019.
template <class T>
LOOKSAM_HD T adamw(T w, T d, T& m, T& v, const UpdateScalars<T>& h) {
  adam_moments(d, m, v, h);
  return w * h.decay_factor - h.lr * adam_direction(m, v, h);
}

// LAMB's u = adam_direction + weight_decay w, from moments that already hold this step's d. You et al. 2020.
template <class T>
LOOKSAM_HD T lamb_direction(T w, T m, T v, const UpdateScalars<T>& h) {
  return adam_direction(m, v, h) + h.weight_decay * w;
}

// w - lr r u; r = ||w_p|| / ||u_p|| is the row's trust ratio (trust_ratio in scalars.h).
template <class T>
LOOKSAM_HD T lamb(T w, T m, T v, T trust_ratio, const UpdateScalars<T>& h) {
  return w - h.lr * trust_ratio * lamb_direction(w, m, v, h);
}

// ASAM's T = |w| + eta. Kwon et al. 2021.
template <class T>
LOOKSAM_HD T adaptive_scale(T w, T eta) {
  return absolute(w) + eta;
}

// w + T^2 e
template <class T>
LOOKSAM_HD T perturbed(T w, T scale, T e) {
  return w + scale * scale * e;
}

}  // namespace looksam
