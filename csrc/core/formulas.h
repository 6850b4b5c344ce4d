// Sums -> coefficients of every rule, in double, with all zero rules in one place: the twin of formulas.py.
//
// All functions work on one row and the totals over all rows, so that a host loop and a thread block can both drive
// them. `row` and `total` are Sums, or whatever else has of(x, y):
//   1. unscale() each row's sums and add them up to the total
//   2. direction() of each row; add up its direction_sq() over the rows
//   3. finish() each row's direction
// A new rule is a name in Rule, a line in kRules and a case in direction(); an ascent that is not divided by the norm
// of its own direction also has a case in length().
#pragma once

#include "updates.h"

namespace looksam {

inline constexpr int kMaxInputs = 3;

// Columns by what they hold: g gradient at w, s at w + e, r at a third point; q LookSAM's orthogonal component, m a
// momentum of gradients, y a gradient kept for the next step. Tg and Tm are ASAM's T times g and m.
enum Col : std::uint8_t { g, s, r, q, m, y, w, Tg, Tm };
inline constexpr int kCols = 9;
inline constexpr const char* kColNames[kCols] = {"g", "s", "r", "q", "m", "y", "w", "Tg", "Tm"};

// Gradients of this step carry the loss scale, columns that outlive it do not.
LOOKSAM_HD bool is_scaled(Col x) { return x == g || x == s || x == r || x == Tg; }

enum class Rule : std::uint8_t {
  // ascents, e = T^2 sum_i c_i x_i
  sam,
  asam,
  esam,
  esam_adaptive,
  trust_normalized,
  trust,
  trust_global,
  unit,
  opposite,
  vasso,
  friendly,
  friendly_adaptive,
  along_previous,
  extrapolate,
  // descents, d and what is written or added beside it
  as_is,
  looksam_refresh,
  looksam_reuse,
  ssam,
  gsam,
  wsam,
  wsam_coupled,
  crsam,
  vasso_direction,
  friendly_direction,
  sampa
};

enum Parameter : std::uint32_t {
  kRho = 1,
  kAlpha = 2,
  kBeta = 4,
  kGamma = 8,
  kTheta = 16,
  kSigma = 32,
  kLambda = 64,
  kLr = 128,
  kLayerScaled = 256
};

struct RuleInfo {
  const char* name;
  Rule rule;
  int inputs;
  Col input[kMaxInputs];
  std::uint32_t reads;     // which Parameters of the groups
  bool writes;             // a second combination
  bool posts;              // a third one, added to w after the base update
  bool stretched = false;  // the norm is that of T times the combination
};

inline constexpr RuleInfo kRules[] = {
    // ascents
    {"sam", Rule::sam, 1, {g}, kRho, false, false},
    {"asam", Rule::asam, 1, {g}, kRho, false, false, true},
    {"esam", Rule::esam, 1, {g}, kRho | kBeta, false, false},
    {"esam_adaptive", Rule::esam_adaptive, 1, {g}, kRho | kBeta, false, false, true},
    {"trust_normalized", Rule::trust_normalized, 1, {g}, kRho | kLayerScaled, false, false},
    {"trust", Rule::trust, 1, {g}, kRho | kLayerScaled, false, false},
    {"trust_global", Rule::trust_global, 1, {g}, kRho | kLayerScaled, false, false},
    {"unit", Rule::unit, 1, {g}, kRho | kLayerScaled, false, false},
    {"opposite", Rule::opposite, 1, {g}, kRho, false, false},
    {"vasso", Rule::vasso, 2, {g, m}, kRho | kTheta, false, false},
    {"friendly", Rule::friendly, 2, {g, m}, kRho | kSigma, false, false},
    {"friendly_adaptive", Rule::friendly_adaptive, 2, {g, m}, kRho | kSigma, false, false, true},
    {"along_previous", Rule::along_previous, 1, {y}, kRho, false, false},
    {"extrapolate", Rule::extrapolate, 1, {y}, kLr, false, false},
    // descents
    {"at_w", Rule::as_is, 1, {g}, 0, false, false},
    {"at_perturbed", Rule::as_is, 1, {s}, 0, false, false},
    {"looksam_refresh", Rule::looksam_refresh, 2, {s, g}, 0, true, false},
    {"looksam_reuse", Rule::looksam_reuse, 2, {g, q}, kAlpha, false, false},
    {"ssam", Rule::ssam, 1, {s}, 0, false, false},
    {"gsam", Rule::gsam, 2, {s, g}, kAlpha, false, false},
    {"wsam", Rule::wsam, 2, {s, g}, kGamma | kLr, false, true},
    {"wsam_coupled", Rule::wsam_coupled, 2, {s, g}, kGamma, false, false},
    {"crsam", Rule::crsam, 3, {r, s, g}, kBeta | kGamma, false, false},
    {"vasso_direction", Rule::vasso_direction, 3, {s, g, m}, kTheta, true, false},
    {"friendly_direction", Rule::friendly_direction, 3, {s, g, m}, kLambda, true, false},
    {"sampa", Rule::sampa, 2, {r, s}, kLambda, true, false},
};

// What takes the loss scale out of <x, y>.
LOOKSAM_HD double unscaling(Col x, Col y, double inv_scale) {
  return (is_scaled(x) ? inv_scale : 1) * (is_scaled(y) ? inv_scale : 1);
}

// Inner products <x, y> of one row, or their totals over all rows; 0 for pairs that the rule does not ask for.
struct Sums {
  static constexpr int count = kCols * (kCols + 1) / 2;
  double at[count];

  static LOOKSAM_HD constexpr int index(Col x, Col y) { return x < y ? y * (y + 1) / 2 + x : x * (x + 1) / 2 + y; }
  LOOKSAM_HD double of(Col x, Col y) const { return at[index(x, y)]; }
  LOOKSAM_HD void set(Col x, Col y, double value) { at[index(x, y)] = value; }

  LOOKSAM_HD void add(const Sums& row) {
    for (int i = 0; i < count; ++i) at[i] += row.at[i];
  }

  // The sums of gradients without their loss scale.
  LOOKSAM_HD void unscale(double inv_scale) {
    for (int i = 0; i < kCols; ++i)
      for (int j = 0; j <= i; ++j) at[index(Col(i), Col(j))] *= unscaling(Col(i), Col(j), inv_scale);
  }
};

// A row's hyper-parameters; all are its group's.
struct RowHyper {
  double rho, alpha, beta, gamma, theta, sigma, lambda, lr;
  double layer_scaled;  // 1 inside the layer filter, else 0
  double sign;          // -1 in groups that maximize
};

struct ParameterField {
  const char* name;
  Parameter bit;
  double RowHyper::* field;
};

inline constexpr ParameterField kParameters[] = {
    {"rho", kRho, &RowHyper::rho},
    {"alpha", kAlpha, &RowHyper::alpha},
    {"beta", kBeta, &RowHyper::beta},
    {"gamma", kGamma, &RowHyper::gamma},
    {"theta", kTheta, &RowHyper::theta},
    {"sigma", kSigma, &RowHyper::sigma},
    {"lambda_", kLambda, &RowHyper::lambda},
    {"lr", kLr, &RowHyper::lr},
    {"layer_scaled", kLayerScaled, &RowHyper::layer_scaled},
};

struct CommonHyper {
  double inv_scale;  // 1 / loss scale
  double perturb_eps;
  double max_grad_norm;  // negative: no clipping
  bool tensor_scope;     // norm_scope = "tensor"
};

// Coefficients of each input in d (an ascent's e), in what is written, and in what is added to w after the base update.
struct Direction {
  double d[kMaxInputs];
  double q[kMaxInputs];
  double post[kMaxInputs];
};

// a / b where b > 0, else 0: a zero denominator never makes NaN.
LOOKSAM_HD double ratio(double a, double b) { return b > 0 ? a / b : 0; }

LOOKSAM_HD double over_norm(double numerator, double norm, double perturb_eps) {
  return norm > 0 ? numerator / (norm + perturb_eps) : 0;
}

// ||g|| / ||q||, 0 where ||q|| <= 2^-21 ||g||: such a q is what rounding left of nothing, as in a tensor of one
// element.
LOOKSAM_HD double reuse_ratio(double gg, double qq) { return qq > 0x1p-42 * gg ? sqrt(gg / qq) : 0; }

LOOKSAM_HD double root(double square) { return square > 0 ? sqrt(square) : 0; }

// L_p = ||w_p|| / ||g_p||; 1 where ||w_p|| = 0 and outside the layer filter; 0 where g_p = 0.
template <class Row>
LOOKSAM_HD double layer_ratio(const Row& row, const RowHyper& h) {
  if (!(row.of(g, g) > 0)) return 0;
  return row.of(w, w) > 0 && h.layer_scaled > 0 ? sqrt(row.of(w, w) / row.of(g, g)) : 1;
}

// A moving average's weight of the new gradient: 1 where m is still zero, so that m starts as g.
template <class Row>
LOOKSAM_HD double weight_of_new(double weight, const Row& row) {
  return row.of(m, m) > 0 ? weight : 1;
}

// d, q and post of a row, of unscaled inputs; an ascent's d is still without its length.
template <class Row, class Total>
LOOKSAM_HD Direction direction(Rule rule, const Row& row, const Total& total, const RowHyper& h,
                               const CommonHyper& common) {
  const auto scoped = [&](Col x, Col y) { return common.tensor_scope ? row.of(x, y) : total.of(x, y); };
  const double eps = common.perturb_eps;
  const double gamma_odds = h.gamma / (1 - h.gamma);
  switch (rule) {
    case Rule::sam:
    case Rule::asam:
    case Rule::esam:
    case Rule::esam_adaptive:
    case Rule::unit:
    case Rule::along_previous:
    case Rule::as_is: return {{1}, {}, {}};
    case Rule::trust_normalized:
    case Rule::trust:
    case Rule::trust_global: return {{layer_ratio(row, h)}, {}, {}};
    case Rule::opposite: return {{-1}, {}, {}};
    case Rule::vasso: return {{weight_of_new(h.theta, row), 1 - weight_of_new(h.theta, row)}, {}, {}};
    case Rule::friendly:
    case Rule::friendly_adaptive: return {{1, -h.sigma}, {}, {}};
    case Rule::extrapolate: return {{-h.lr}, {}, {}};
    case Rule::looksam_refresh: return {{1, 0}, {1, -ratio(scoped(g, s), scoped(g, g))}, {}};
    case Rule::looksam_reuse: return {{1, h.alpha * reuse_ratio(scoped(g, g), scoped(q, q))}, {}, {}};
    case Rule::ssam: return {{over_norm(root(total.of(g, g)), root(total.of(s, s)), eps)}, {}, {}};
    case Rule::gsam: return {{1 + h.alpha * over_norm(total.of(g, s), total.of(s, s), eps), -h.alpha}, {}, {}};
    case Rule::wsam: return {{0, 1}, {}, {-h.lr * gamma_odds, h.lr * gamma_odds}};
    case Rule::wsam_coupled: return {{gamma_odds, 1 - gamma_odds}, {}, {}};
    case Rule::crsam: return {{h.gamma - h.beta, 1 + h.gamma + h.beta, -2 * h.gamma}, {}, {}};
    case Rule::vasso_direction:
      return {{1, 0, 0}, {0, weight_of_new(h.theta, row), 1 - weight_of_new(h.theta, row)}, {}};
    case Rule::friendly_direction:
      return {{1, 0, 0}, {0, weight_of_new(1 - h.lambda, row), 1 - weight_of_new(1 - h.lambda, row)}, {}};
    case Rule::sampa: return {{h.lambda, 1 - h.lambda}, {1, 0}, {}};
  }
  return {};
}

// ||d_p||^2 from the inner products alone; of a stretched rule ||T d_p||^2.
template <class Row>
LOOKSAM_HD double direction_sq(const RuleInfo& rule, const Direction& direction, const Row& row) {
  const auto measured = [&](int i) { return !rule.stretched ? rule.input[i] : rule.input[i] == m ? Tm : Tg; };
  double square = 0;
  // A loop of constant length leaves the direction in registers.
  for (int i = 0; i < kMaxInputs; ++i)
    for (int j = 0; j < kMaxInputs; ++j)
      if (i < rule.inputs && j < rule.inputs)
        square += direction.d[i] * direction.d[j] * row.of(measured(i), measured(j));
  return square;
}

LOOKSAM_HD bool is_ascent(Rule rule) { return rule < Rule::as_is; }

// What a row's d is still multiplied by: an ascent's length, or the descent's min(1, max_grad_norm / ||d||).
// direction_sq_total: direction_sq() over all rows.
template <class Row, class Total>
LOOKSAM_HD double length(Rule rule, const Row& row, const Total& total, const RowHyper& h, const CommonHyper& common,
                         double direction_sq_total) {
  const double eps = common.perturb_eps;
  if (!is_ascent(rule)) {
    if (common.max_grad_norm < 0) return 1;
    const double clip = ratio(common.max_grad_norm, root(direction_sq_total));
    return clip < 1 ? clip : 1;
  }
  switch (rule) {
    case Rule::extrapolate: return 1;
    case Rule::trust: return h.rho;
    case Rule::trust_global: return over_norm(h.rho, root(total.of(g, g)), eps);
    case Rule::unit: return over_norm(h.rho, root(h.layer_scaled > 0 ? row.of(g, g) : total.of(g, g)), eps);
    case Rule::esam:
    case Rule::esam_adaptive: return over_norm(h.rho / h.beta, root(direction_sq_total), eps);
    default: return over_norm(h.rho, root(direction_sq_total), eps);
  }
}

// One group's.
struct LarsHyper {
  double trust_coefficient, weight_decay, eps;
  double lr;  // read with trust_clip only
  bool trust_clip;
  bool adapts;  // with weight decay, or always_adapt
};

// r_p = trust_coefficient ||w_p|| / (||d_p|| + weight_decay ||w_p|| + eps), which scales d_p + weight_decay w_p; 1
// where either norm is 0; with trust_clip min(1, r_p / lr); 1 in groups that do not adapt. LARS, You, Gitman & Ginsburg
// 2017.
LOOKSAM_HD double lars_ratio(double w_norm_sq, double d_norm_sq, const LarsHyper& h) {
  if (!h.adapts) return 1;
  double r = 1;
  if (w_norm_sq > 0 && d_norm_sq > 0) {
    const double w_norm = sqrt(w_norm_sq);
    r = h.trust_coefficient * w_norm / (sqrt(d_norm_sq) + h.weight_decay * w_norm + h.eps);
  }
  if (!h.trust_clip) return r;
  return r < h.lr ? r / h.lr : 1;
}

// The i-th coefficients of a direction, of the input as it is, loss scale and all; an ascent's is 0 after a non-finite
// sum.
LOOKSAM_HD void finish(const RuleInfo& rule, int i, double& d, double& q, double& post, double length,
                       const RowHyper& h, const CommonHyper& common, bool found_inf) {
  const double unscaled = is_scaled(rule.input[i]) ? common.inv_scale : 1;
  d *= length * h.sign * unscaled;
  q *= unscaled;
  post *= h.sign * unscaled;
  if (is_ascent(rule.rule) && found_inf) d = 0;
}

LOOKSAM_HD void finish(const RuleInfo& rule, Direction& direction, double length, const RowHyper& h,
                       const CommonHyper& common, bool found_inf) {
  for (int i = 0; i < rule.inputs; ++i)
    finish(rule, i, direction.d[i], direction.q[i], direction.post[i], length, h, common, found_inf);
}

}  // namespace looksam
