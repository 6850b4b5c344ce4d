// The base updates on one element: the only place of per-element mathematics, for host and device, in float or double.
//
// A base is a struct, and its place in the list Bases; nothing else has to know it. The struct holds the base's names,
// its states, the hyper-parameters that it reads, and update(w, d, states ..., h), which returns the new weight and
// changes the states; w is the weight at which the step is taken, d the direction. What a row lacks of the states is
// scratch memory, whose values mean nothing. An update chooses between values, never between statements: a loop over
// elements then stays one of vectors. Orders of operations follow torch.optim, so that results agree within a few ulps.
// The host is built without contraction to fused multiply-adds, so that every instruction set gives the same bits.
#pragma once

#include <cmath>

#include "dtype.h"

namespace looksam {

inline constexpr int kMaxStates = 4;

// The base's hyper-parameters of one group.
struct BaseHyper {
  double lr, weight_decay;
  double momentum, dampening;
  double beta1,
      beta2;  // beta2 is the weight of the old mean square: also rmsprop's alpha, adadelta's rho, adan's third beta
  double beta_diff;  // adan's second beta: the weight of the old mean difference
  double eps, lr_decay;
  bool nesterov, centered, always_adapt, trust_clip, no_prox;
  bool bias_correction = true;
};

// One of them: its name in torch.optim, and the number or flag that it sets; index: its place where the value is a
// tuple.
struct Option {
  const char* name;
  double BaseHyper::* number = nullptr;
  bool BaseHyper::* flag = nullptr;
  int index = -1;
};

namespace option {

inline constexpr Option weight_decay = {"weight_decay", &BaseHyper::weight_decay};
inline constexpr Option momentum = {"momentum", &BaseHyper::momentum};
inline constexpr Option dampening = {"dampening", &BaseHyper::dampening};
inline constexpr Option nesterov = {"nesterov", nullptr, &BaseHyper::nesterov};
inline constexpr Option beta1 = {"betas", &BaseHyper::beta1, nullptr, 0};
inline constexpr Option beta2 = {"betas", &BaseHyper::beta2, nullptr, 1};
inline constexpr Option beta_diff = {"betas", &BaseHyper::beta_diff, nullptr, 1};
inline constexpr Option beta3 = {"betas", &BaseHyper::beta2, nullptr, 2};
inline constexpr Option alpha = {"alpha", &BaseHyper::beta2};
inline constexpr Option rho = {"rho", &BaseHyper::beta2};
inline constexpr Option eps = {"eps", &BaseHyper::eps};
inline constexpr Option lr_decay = {"lr_decay", &BaseHyper::lr_decay};
inline constexpr Option centered = {"centered", nullptr, &BaseHyper::centered};
inline constexpr Option always_adapt = {"always_adapt", nullptr, &BaseHyper::always_adapt};
inline constexpr Option trust_clip = {"trust_clip", nullptr, &BaseHyper::trust_clip};
inline constexpr Option bias_correction = {"bias_correction", nullptr, &BaseHyper::bias_correction};
inline constexpr Option no_prox = {"no_prox", nullptr, &BaseHyper::no_prox};

}  // namespace option

// Which groups have a state.
enum class When : std::uint8_t { always, momentum, centered, never };

struct State {
  const char* name;
  When when;
};

// What the updates of one row need, made once a step from its group's hyper-parameters and its update count. A base
// reads only its own fields.
template <class T>
struct UpdateScalars {
  T lr;  // adagrad: lr / (1 + (count - 1) lr_decay)
  T weight_decay;
  T decay_factor;  // adamw, lion, adan with no_prox: 1 - lr weight_decay
  T shrink;        // adan: 1 / (1 + lr weight_decay)
  T momentum;
  T direction_weight;  // sgd: 1 - dampening; 1 in the first update
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T beta_diff, one_minus_beta_diff;
  T eps;
  T inv_bias_correction1;       // 1 / (1 - beta1^count)
  T inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^count)
  T inv_bias_correction_diff;   // 1 / (1 - beta_diff^count)
  bool nesterov, centered, no_prox, is_first;

  template <class U>
  LOOKSAM_HD UpdateScalars<U> to() const {
    return {U(lr),
            U(weight_decay),
            U(decay_factor),
            U(shrink),
            U(momentum),
            U(direction_weight),
            U(beta1),
            U(one_minus_beta1),
            U(beta2),
            U(one_minus_beta2),
            U(beta_diff),
            U(one_minus_beta_diff),
            U(eps),
            U(inv_bias_correction1),
            U(inv_sqrt_bias_correction2),
            U(inv_bias_correction_diff),
            nesterov,
            centered,
            no_prox,
            is_first};
  }
};

// x^n for a whole n >= 0. 1 - beta^n cancels, so agreement with torch within ulps takes the host's pow(); a GPU's takes
// a thousand instructions and a stack frame, and there squaring is exact enough for float states.
LOOKSAM_HD double power(double x, double n) {
#ifdef __CUDA_ARCH__
  double result = 1;
  for (auto bits = static_cast<std::uint64_t>(n); bits != 0; bits >>= 1) {
    if (bits & 1) result *= x;
    x *= x;
  }
  return result;
#else
  return pow(x, n);
#endif
}

// count: how many updates this row has had, this one included; trust: lars' ratio.
LOOKSAM_HD UpdateScalars<double> base_scalars(const BaseHyper& h, double count, double trust = 1) {
  return {h.lr / (1 + (count - 1) * h.lr_decay),
          h.weight_decay * trust,
          1 - h.lr * h.weight_decay,
          1 / (1 + h.lr * h.weight_decay),
          h.momentum,
          count == 1 ? 1 : 1 - h.dampening,
          h.beta1,
          1 - h.beta1,
          h.beta2,
          1 - h.beta2,
          h.beta_diff,
          1 - h.beta_diff,
          h.eps,
          h.bias_correction ? 1 / (1 - power(h.beta1, count)) : 1,
          h.bias_correction ? 1 / sqrt(1 - power(h.beta2, count)) : 1,
          1 / (1 - power(h.beta_diff, count)),
          h.nesterov,
          h.centered,
          h.no_prox,
          count == 1};
}

// ||w_p|| / ||u_p||; 1 where either is 0, and without weight decay unless always_adapt; at most 1 with trust_clip.
LOOKSAM_HD double trust_ratio(double w_norm_sq, double u_norm_sq, const BaseHyper& h) {
  if (h.weight_decay == 0 && !h.always_adapt) return 1;
  const double r = w_norm_sq > 0 && u_norm_sq > 0 ? sqrt(w_norm_sq / u_norm_sq) : 1;
  return h.trust_clip && r > 1 ? 1 : r;
}

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

// A base whose update() returns the new weight. One in two phases returns a direction, whose norm over the row must be
// known before w changes; its apply() then does that.
struct OnePhase {
  static constexpr bool two_phases = false;
};

// buf = momentum buf + (1 - dampening) d; w - lr buf, or w - lr (d + momentum buf) with nesterov; without momentum w -
// lr d. LARS is SGD with a d and a weight decay that hold the trust ratio.
struct Sgd : OnePhase {
  static constexpr const char* name[] = {"sgd", "lars"};
  static constexpr State state[] = {{"momentum_buffer", When::momentum}};
  static constexpr Option reads[] = {option::weight_decay, option::momentum, option::dampening, option::nesterov};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& buf, const UpdateScalars<T>& h) {
    d = d + h.weight_decay * w;
    buf = h.momentum * buf + h.direction_weight * d;
    const T moved = h.nesterov ? d + h.momentum * buf : buf;
    return w - h.lr * (h.momentum == 0 ? d : moved);
  }
};

// sqrt(v / bc2) + eps
template <class T>
LOOKSAM_HD T adam_root(T v, T inv_sqrt_bias_correction2, T eps) {
  return square_root(v) * inv_sqrt_bias_correction2 + eps;
}

// (m / bc1) / (sqrt(v / bc2) + eps)
template <class T>
LOOKSAM_HD T adam_direction(T m, T v, const UpdateScalars<T>& h) {
  return m * h.inv_bias_correction1 / adam_root(v, h.inv_sqrt_bias_correction2, h.eps);
}

// m = beta1 m + (1 - beta1) d; v = beta2 v + (1 - beta2) d^2
template <class T>
LOOKSAM_HD void adam_moments(T d, T& m, T& v, const UpdateScalars<T>& h) {
  m = h.beta1 * m + h.one_minus_beta1 * d;
  v = h.beta2 * v + h.one_minus_beta2 * d * d;
}

// Adam, weight decay added to the direction. Kingma & Ba 2015.
struct Adam : OnePhase {
  static constexpr const char* name[] = {"adam"};
  static constexpr State state[] = {{"exp_avg", When::always}, {"exp_avg_sq", When::always}};
  static constexpr Option reads[] = {option::weight_decay, option::beta1, option::beta2, option::eps};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& m, T& v, const UpdateScalars<T>& h) {
    adam_moments(d + h.weight_decay * w, m, v, h);
    return w - h.lr * adam_direction(m, v, h);
  }
};

// AdamW, weight decay apart from the direction. Loshchilov & Hutter 2019.
struct AdamW : OnePhase {
  static constexpr const char* name[] = {"adamw"};
  static constexpr State state[] = {{"exp_avg", When::always}, {"exp_avg_sq", When::always}};
  static constexpr Option reads[] = {option::weight_decay, option::beta1, option::beta2, option::eps};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& m, T& v, const UpdateScalars<T>& h) {
    adam_moments(d, m, v, h);
    return w * h.decay_factor - h.lr * adam_direction(m, v, h);
  }
};

// LAMB. You et al. 2020.
struct Lamb {
  static constexpr const char* name[] = {"lamb"};
  static constexpr State state[] = {{"exp_avg", When::always}, {"exp_avg_sq", When::always}};
  static constexpr Option reads[] = {option::weight_decay, option::beta1,      option::beta2,          option::eps,
                                     option::always_adapt, option::trust_clip, option::bias_correction};
  static constexpr bool two_phases = true;

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

  // w - lr r u; r = ||w_p|| / ||u_p|| is the row's trust_ratio().
  template <class T>
  static LOOKSAM_HD T apply(T w, T u, T trust_ratio, const UpdateScalars<T>& h) {
    return w - h.lr * trust_ratio * u;
  }
};

// Lion. Chen et al. 2023.
struct Lion : OnePhase {
  static constexpr const char* name[] = {"lion"};
  static constexpr State state[] = {{"exp_avg", When::always}};
  static constexpr Option reads[] = {option::weight_decay, option::beta1, option::beta2};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& m, const UpdateScalars<T>& h) {
    const T u = sign(h.beta1 * m + h.one_minus_beta1 * d);
    m = h.beta2 * m + h.one_minus_beta2 * d;
    return w * h.decay_factor - h.lr * u;
  }
};

// Adagrad. Duchi et al. 2011.
struct Adagrad : OnePhase {
  static constexpr const char* name[] = {"adagrad"};
  static constexpr State state[] = {{"sum", When::always}};
  static constexpr Option reads[] = {option::weight_decay, option::eps, option::lr_decay};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& sum, const UpdateScalars<T>& h) {
    d = d + h.weight_decay * w;
    sum = sum + d * d;
    return w - h.lr * (d / (square_root(sum) + h.eps));
  }
};

// RMSprop. Hinton 2012. A variance that rounding leaves below 0 counts as 0.
struct Rmsprop : OnePhase {
  static constexpr const char* name[] = {"rmsprop"};
  static constexpr State state[] = {
      {"square_avg", When::always}, {"grad_avg", When::centered}, {"momentum_buffer", When::momentum}};
  static constexpr Option reads[] = {option::weight_decay, option::alpha, option::eps, option::momentum,
                                     option::centered};

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
struct Adadelta : OnePhase {
  static constexpr const char* name[] = {"adadelta"};
  static constexpr State state[] = {{"square_avg", When::always}, {"acc_delta", When::always}};
  static constexpr Option reads[] = {option::weight_decay, option::rho, option::eps};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& square_avg, T& acc_delta, const UpdateScalars<T>& h) {
    d = d + h.weight_decay * w;
    square_avg = h.beta2 * square_avg + h.one_minus_beta2 * d * d;
    const T u = square_root(acc_delta + h.eps) / square_root(square_avg + h.eps) * d;
    acc_delta = h.beta2 * acc_delta + h.one_minus_beta2 * u * u;
    return w - h.lr * u;
  }
};

// Adan: m, a, v are the means of d, of its difference from the direction before, and of (d + beta2 difference)^2. Xie
// et al. 2022. The weight decay is proximal, or with no_prox as AdamW's.
struct Adan : OnePhase {
  static constexpr const char* name[] = {"adan"};
  static constexpr State state[] = {{"exp_avg", When::always},
                                    {"exp_avg_diff", When::always},
                                    {"exp_avg_sq", When::always},
                                    {"neg_pre_grad", When::always}};
  static constexpr Option reads[] = {option::weight_decay, option::beta1, option::beta_diff,
                                     option::beta3,        option::eps,   option::no_prox};

  template <class T>
  static LOOKSAM_HD T update(T w, T d, T& m, T& a, T& v, T& neg_before, const UpdateScalars<T>& h) {
    const T difference = h.is_first ? T(0) : d + neg_before;
    neg_before = -d;
    m = h.beta1 * m + h.one_minus_beta1 * d;
    a = h.beta_diff * a + h.one_minus_beta_diff * difference;
    const T ahead = d + h.beta_diff * difference;
    v = h.beta2 * v + h.one_minus_beta2 * ahead * ahead;
    const T mean = m * h.inv_bias_correction1 + h.beta_diff * a * h.inv_bias_correction_diff;
    const T moved = h.lr * (mean / (square_root(v) * h.inv_sqrt_bias_correction2 + h.eps));
    return h.no_prox ? w * h.decay_factor - moved : (w - moved) * h.shrink;
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
  constexpr When when[kMaxStates] = {when_of<Update, 0>(), when_of<Update, 1>(), when_of<Update, 2>(),
                                     when_of<Update, 3>()};
  return is_there(k == 0 ? when[0] : k == 1 ? when[1] : k == 2 ? when[2] : when[3], h);
}

// The update of one element with as many of four states as it has.
template <class Update, class T>
LOOKSAM_HD T update_of(T w, T d, T& x0, T& x1, T& x2, T& x3, const UpdateScalars<T>& h) {
  if constexpr (states_of<Update> == 1) {
    return Update::update(w, d, x0, h);
  } else if constexpr (states_of<Update> == 2) {
    return Update::update(w, d, x0, x1, h);
  } else if constexpr (states_of<Update> == 3) {
    return Update::update(w, d, x0, x1, x2, h);
  } else {
    return Update::update(w, d, x0, x1, x2, x3, h);
  }
}

template <class... Updates>
struct List {};

// All bases. A new one is a struct above and its name here.
using Bases = List<Sgd, Adam, AdamW, Lamb, Lion, Adagrad, Rmsprop, Adadelta, Adan>;

// A base known at run time: its place in the list; or grad, which updates nothing.
enum class Base : std::uint8_t { grad = 255 };

template <class First, class... Rest>
First first_of(List<First, Rest...>);

// What runs for grad, and must not update then.
using GradRunsAs = decltype(first_of(Bases{}));

// run(Update{}) for a base known at run time.
template <int place = 0, class Run, class First, class... Rest>
auto with_update(Base base, const Run& run, List<First, Rest...>) {
  if constexpr (sizeof...(Rest) > 0)
    if (base != Base(place) && base != Base::grad) return with_update<place + 1>(base, run, List<Rest...>{});
  return run(First{});
}

template <class Run>
auto with_update(Base base, const Run& run) {
  return with_update(base, run, Bases{});
}

// visit(name, base) for every base by every name that it has, grad the last.
template <int place = 0, class Visit, class First, class... Rest>
void for_each_base(const Visit& visit, List<First, Rest...>) {
  for (const char* name : First::name) visit(name, Base(place));
  if constexpr (sizeof...(Rest) > 0) {
    for_each_base<place + 1>(visit, List<Rest...>{});
  } else {
    visit("grad", Base::grad);
  }
}

template <class Visit>
void for_each_base(const Visit& visit) {
  for_each_base(visit, Bases{});
}

inline bool in_two_phases(Base base) {
  return with_update(base, [](auto update) { return decltype(update)::two_phases; });
}

// ASAM's T = |w| + eta. Kwon et al. 2021.
template <class T>
LOOKSAM_HD T adaptive_scale(T w, T eta) {
  return absolute(w) + eta;
}

// w + factor e; the factor is ASAM's T^2
template <class T>
LOOKSAM_HD T perturbed(T w, T factor, T e) {
  return w + factor * e;
}

// The T = 1 / (sqrt(v') + eps) of a preconditioned ascent, v' the base's second moment as a step with g would make it;
// the numbers of a row, as looksam_kernels/preconditioning.py makes them.
template <class T>
struct Preconditioner {
  T of_v, of_g, correction, eps;

  // numbers: [4, rows]
  LOOKSAM_HD Preconditioner(const double* numbers, std::int64_t rows, std::int64_t row)
      : of_v(static_cast<T>(numbers[row])),
        of_g(static_cast<T>(numbers[rows + row])),
        correction(static_cast<T>(numbers[2 * rows + row])),
        eps(static_cast<T>(numbers[3 * rows + row])) {}

  // 1 / T
  LOOKSAM_HD T root(T g, T v) const { return adam_root(of_v * v + of_g * g * g, correction, eps); }
};

// T x; where the root is 0, as g and v are, -0.0, which changes no bit of what it is added to.
template <class T>
LOOKSAM_HD T over_root(T x, T root) {
  return root > 0 ? x / root : T(-0.0);
}

}  // namespace looksam
