// The base updates on one element: the only place of per-element mathematics, for host and device, in float or double.
//
// A base is a struct: the names of its states, and update(w, d, states ..., h), which returns the new weight and changes the
// states; w is the weight at which the step is taken, d the direction. A state that the row lacks is anybody's memory. An
// update chooses between values, never between statements: a loop over elements then stays one of vectors. Orders of
// operations follow torch.optim, so that results agree within a few ulps. The host is built without contraction to fused
// multiply-adds, so that every instruction set gives the same bits.
#pragma once

#include <cmath>

#include "dtype.h"

namespace looksam {

enum class Base : std::uint8_t { sgd, adam, adamw, lamb, lion, adagrad, rmsprop, adadelta, grad };

inline constexpr int kMaxStates = 3;

// Which groups have a state.
enum class When : std::uint8_t { always, momentum, centered, never };

struct State {
  const char* name;
  When when;
};

// What the updates of one row need, made once a step from its group's hyper-parameters and its update count
// (base_scalars in scalars.h). A base reads only its own fields.
template <class T>
struct UpdateScalars {
  T lr;  // adagrad: lr / (1 + (count - 1) lr_decay)
  T weight_decay;
  T decay_factor;  // adamw, lion: 1 - lr weight_decay
  T momentum;
  T direction_weight;  // sgd: 1 - dampening; 1 in the first update
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;  // rmsprop: alpha, adadelta: rho
  T eps;
  T inv_bias_correction1;       // 1 / (1 - beta1^count)
  T inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^count)
  bool nesterov, centered;

  template <class U>
  LOOKSAM_HD UpdateScalars<U> to() const {
    return {U(lr),    U(weight_decay),    U(decay_factor), U(momentum),
            U(direction_weight), U(beta1), U(one_minus_beta1), U(beta2),
            U(one_minus_beta2), U(eps), U(inv_bias_correction1), U(inv_sqrt_bias_correction2),
            nesterov, centered};
  }
};

template <class Scalars>
LOOKSAM_HD bool is_there(When when, const Scalars& h) {
  return when == When::always || (when == When::momentum && h.momentum != 0) || (when == When::centered && h.centered);
}

LOOKSAM_HD float square_root(float x) { return sqrtf(x); }
LOOKSAM_HD double square_root(double x) { return sqrt(x); }
LOOKSAM_HD float absolute(float x) { return fabsf(x); }
LOOKSAM_HD double absolute(double x) { return fabs(x); }

template <class T>
LOOKSAM_HD T sign(T x) {
  return T(x > 0) - T(x < 0);
}

// buf = momentum buf + (1 - dampening) d; w - lr buf, or w - lr (d + momentum buf) with nesterov; without momentum w - lr d.
struct Sgd {
  static constexpr Base base = Base::sgd;
  static constexpr State state[] = {{"momentum_buffer", When::momentum}};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& buf, const UpdateScalars<T>& h) {
    d = d + h.weight_decay * w;
    buf = h.momentum * buf + h.direction_weight * d;
    const T moved = h.nesterov ? d + h.momentum * buf : buf;
    return w - h.lr * (h.momentum == 0 ? d : moved);
  }
};

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
struct Adam {
  static constexpr Base base = Base::adam;
  static constexpr State state[] = {{"exp_avg", When::always}, {"exp_avg_sq", When::always}};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& m, T& v, const UpdateScalars<T>& h) {
    adam_moments(d + h.weight_decay * w, m, v, h);
    return w - h.lr * adam_direction(m, v, h);
  }
};

// AdamW, weight decay apart from the direction. Loshchilov & Hutter 2019.
struct AdamW {
  static constexpr Base base = Base::adamw;
  static constexpr State state[] = {{"exp_avg", When::always}, {"exp_avg_sq", When::always}};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& m, T& v, const UpdateScalars<T>& h) {
    adam_moments(d, m, v, h);
    return w * h.decay_factor - h.lr * adam_direction(m, v, h);
  }
};

// LAMB. You et al. 2020. Its update returns u, whose norm must be known before w changes; apply() then does that.
struct Lamb {
  static constexpr Base base = Base::lamb;
  static constexpr State state[] = {{"exp_avg", When::always}, {"exp_avg_sq", When::always}};

  // u = adam_direction + weight_decay w, from moments that already hold this step's d.
  template <class T>
  static LOOKSAM_HD T direction(T w, T m, T v, const UpdateScalars<T>& h) {
    return adam_direction(m, v, h) + h.weight_decay * w;
  }

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& m, T& v, const UpdateScalars<T>& h) {
    adam_moments(d, m, v, h);
    return direction(w, m, v, h);
  }

  // w - lr r u; r = ||w_p|| / ||u_p|| is the row's trust ratio (trust_ratio in scalars.h).
  template <class T>
  static LOOKSAM_HD T apply(T w, T u, T trust_ratio, const UpdateScalars<T>& h) {
    return w - h.lr * trust_ratio * u;
  }
};

// Lion. Chen et al. 2023.
struct Lion {
  static constexpr Base base = Base::lion;
  static constexpr State state[] = {{"exp_avg", When::always}};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& m, const UpdateScalars<T>& h) {
    const T u = sign(h.beta1 * m + h.one_minus_beta1 * d);
    m = h.beta2 * m + h.one_minus_beta2 * d;
    return w * h.decay_factor - h.lr * u;
  }
};

// Adagrad. Duchi et al. 2011.
struct Adagrad {
  static constexpr Base base = Base::adagrad;
  static constexpr State state[] = {{"sum", When::always}};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& sum, const UpdateScalars<T>& h) {
    d = d + h.weight_decay * w;
    sum = sum + d * d;
    return w - h.lr * (d / (square_root(sum) + h.eps));
  }
};

// RMSprop. Hinton 2012. A variance that rounding leaves below 0 counts as 0.
struct Rmsprop {
  static constexpr Base base = Base::rmsprop;
  static constexpr State state[] = {
      {"square_avg", When::always}, {"grad_avg", When::centered}, {"momentum_buffer", When::momentum}};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& square_avg, T& grad_avg, T& buf, const UpdateScalars<T>& h) {
    d = d + h.weight_decay * w;
    square_avg = h.beta2 * square_avg + h.one_minus_beta2 * d * d;
    grad_avg = h.beta2 * grad_avg + h.one_minus_beta2 * d;
    const T centered = square_avg - grad_avg * grad_avg;
    const T variance = h.centered ? T(0.5) * (centered + absolute(centered)) : square_avg;
    const T u = d / (square_root(variance) + h.eps);
    buf = h.momentum * buf + u;
    return w - h.lr * (h.momentum == 0 ? u : buf);
  }
};

// Adadelta. Zeiler 2012.
struct Adadelta {
  static constexpr Base base = Base::adadelta;
  static constexpr State state[] = {{"square_avg", When::always}, {"acc_delta", When::always}};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& square_avg, T& acc_delta, const UpdateScalars<T>& h) {
    d = d + h.weight_decay * w;
    square_avg = h.beta2 * square_avg + h.one_minus_beta2 * d * d;
    const T u = square_root(acc_delta + h.eps) / square_root(square_avg + h.eps) * d;
    acc_delta = h.beta2 * acc_delta + h.one_minus_beta2 * u * u;
    return w - h.lr * u;
  }
};

template <class Update>
inline constexpr int states_of = static_cast<int>(sizeof(Update::state) / sizeof(State));

template <class Update, int k>
LOOKSAM_HD constexpr When when_of() {
  if constexpr (k < states_of<Update>) {
    return Update::state[k].when;
  } else {
    return When::never;
  }
}

// Does a row have the k-th state? A constant where the base alone decides.
template <class Update, class Scalars>
LOOKSAM_HD bool has_state(int k, const Scalars& h) {
  constexpr When when[kMaxStates] = {when_of<Update, 0>(), when_of<Update, 1>(), when_of<Update, 2>()};
  return is_there(k == 0 ? when[0] : k == 1 ? when[1] : when[2], h);
}

// The update of one element with as many of three states as it has.
template <class Update, class T>
LOOKSAM_HD T update_of(T w, T d, T& x0, T& x1, T& x2, const UpdateScalars<T>& h) {
  if constexpr (states_of<Update> == 1) {
    return Update::update(w, d, x0, h);
  } else if constexpr (states_of<Update> == 2) {
    return Update::update(w, d, x0, x1, h);
  } else {
    return Update::update(w, d, x0, x1, x2, h);
  }
}

// run(Update{}) for a base known at run time. `grad`, which updates nothing, runs as sgd.
template <class Run>
auto with_update(Base base, const Run& run) {
  switch (base) {
    case Base::adam: return run(Adam{});
    case Base::adamw: return run(AdamW{});
    case Base::lamb: return run(Lamb{});
    case Base::lion: return run(Lion{});
    case Base::adagrad: return run(Adagrad{});
    case Base::rmsprop: return run(Rmsprop{});
    case Base::adadelta: return run(Adadelta{});
    default: return run(Sgd{});
  }
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
