// Sums -> coefficients of every rule, in double, with all zero rules in one place: the twin of formulas.py.
//
// All functions work on one row and the totals over all rows, so that a host loop and a thread block can both drive them:
//   1. add up the rows' Sums to the total, and layer_sq() of the rows to total.layer
//   2. ascent() or descent() of each row; when clipping, add up direction_sq() over the rows
//   3. multiply d by clip_factor()
// A new rule is one line in kRules and one case in ascent() or descent().
#pragma once

#include "update.h"

namespace looksam {

inline constexpr int kMaxInputs = 3;

enum class Input : std::uint8_t { g, s, q };

enum class Rule : std::uint8_t {
  sam, asam, trust_normalized, trust, trust_global, unit,  // ascents: the first direction of a step, e = c T^2 g
  first, second, looksam_refresh, looksam_reuse,           // descents: d, and q where it is written
};

struct RuleInfo {
  const char* name;
  Rule rule;
  bool is_ascent;
  bool writes_q;
  int inputs;
  Input input[kMaxInputs];
  // Which hyper-parameters of the groups it reads.
  bool reads_rho, reads_alpha, reads_layer_scaled;
};

inline constexpr RuleInfo kRules[] = {
    {"sam", Rule::sam, true, false, 1, {Input::g}, true, false, false},
    {"asam", Rule::asam, true, false, 1, {Input::g}, true, false, false},
    {"trust_normalized", Rule::trust_normalized, true, false, 1, {Input::g}, true, false, true},
    {"trust", Rule::trust, true, false, 1, {Input::g}, true, false, true},
    {"trust_global", Rule::trust_global, true, false, 1, {Input::g}, true, false, true},
    {"unit", Rule::unit, true, false, 1, {Input::g}, true, false, true},
    {"first", Rule::first, false, false, 1, {Input::g}, false, false, false},
    {"second", Rule::second, false, false, 1, {Input::s}, false, false, false},
    {"looksam_refresh", Rule::looksam_refresh, false, true, 2, {Input::s, Input::g}, false, false, false},
    {"looksam_reuse", Rule::looksam_reuse, false, false, 2, {Input::g, Input::q}, false, true, false},
};

// Inner products of one row, or their totals over all rows; those that a rule does not ask for are 0.
struct Sums {
  double gg, gs, ss, gq, qq, ww;
  double tt;     // <T g, T g>
  double layer;  // layer_sq(), in totals only

  LOOKSAM_HD void add(const Sums& row) {
    gg += row.gg, gs += row.gs, ss += row.ss, gq += row.gq, qq += row.qq, ww += row.ww, tt += row.tt;
    layer += row.layer;
  }

  LOOKSAM_HD double of(Input x, Input y) const {
    if (x == y) return x == Input::g ? gg : x == Input::s ? ss : qq;
    if (x != Input::g && y != Input::g) return 0;  // <s,q>: no rule has both
    return x == Input::s || y == Input::s ? gs : gq;
  }
};

// A row's hyper-parameters; all are its group's.
struct RowHyper {
  double rho, alpha;
  double sign;        // -1 in groups that maximize
  bool layer_scaled;  // inside the layer filter
};

struct CommonHyper {
  double inv_scale;      // 1 / loss scale
  double perturb_eps;
  double max_grad_norm;  // negative: no clipping
  bool tensor_scope;     // norm_scope = "tensor"
};

struct Direction {
  double d[kMaxInputs];
  double q[kMaxInputs];
};

// a / b where b > 0, else 0: a zero denominator never makes NaN.
LOOKSAM_HD double ratio(double a, double b) { return b > 0 ? a / b : 0; }

LOOKSAM_HD double over_norm(double numerator, double norm, double perturb_eps) {
  return norm > 0 ? numerator / (norm + perturb_eps) : 0;
}

// L_p = ||w_p|| / ||g_p||; 1 where ||w_p|| = 0 and outside the layer filter; 0 where g_p = 0. The 1 makes L depend on
// the size of g, so g enters unscaled: a loss scale must not move the perturbation.
LOOKSAM_HD double layer_ratio(const Sums& row, const RowHyper& h, const CommonHyper& common) {
  const double gg = row.gg * (common.inv_scale * common.inv_scale);
  if (!(gg > 0)) return 0;
  return row.ww > 0 && h.layer_scaled ? sqrt(row.ww / gg) : 1;
}

// ||L_p g_p||^2
LOOKSAM_HD double layer_sq(const Sums& row, const RowHyper& h, const CommonHyper& common) {
  const double l = layer_ratio(row, h, common);
  return l * l * row.gg;
}

// c of e_p = c T^2 g_p.
LOOKSAM_HD double ascent(Rule rule, const Sums& row, const Sums& total, const RowHyper& h, const CommonHyper& common) {
  const double eps = common.perturb_eps;
  double c = 0;
  switch (rule) {
    case Rule::sam: c = over_norm(h.rho, sqrt(total.gg), eps); break;
    case Rule::asam: c = over_norm(h.rho, sqrt(total.tt), eps); break;
    case Rule::trust_normalized: c = over_norm(h.rho * layer_ratio(row, h, common), sqrt(total.layer), eps); break;
    case Rule::trust: c = h.rho * layer_ratio(row, h, common) * common.inv_scale; break;
    case Rule::trust_global: c = over_norm(h.rho * layer_ratio(row, h, common), sqrt(total.gg), eps); break;
    case Rule::unit: c = over_norm(h.rho, sqrt(h.layer_scaled ? row.gg : total.gg), eps); break;
    default: break;
  }
  return c * h.sign;
}

// d and q, unscaled; d is not clipped yet.
LOOKSAM_HD Direction descent(Rule rule, const Sums& row, const Sums& total, const RowHyper& h, const CommonHyper& common) {
  const Sums& scoped = common.tensor_scope ? row : total;
  Direction direction = {{1, 0, 0}, {0, 0, 0}};
  switch (rule) {
    case Rule::looksam_refresh:
      direction.q[0] = 1;
      direction.q[1] = -ratio(scoped.gs, scoped.gg);
      break;
    case Rule::looksam_reuse: direction.d[1] = h.alpha * sqrt(ratio(scoped.gg, scoped.qq)); break;
    default: break;
  }
  for (int i = 0; i < kMaxInputs; ++i) {
    direction.d[i] *= common.inv_scale * h.sign;
    direction.q[i] *= common.inv_scale;
  }
  return direction;
}

// ||d_p||^2 from the inner products alone.
LOOKSAM_HD double direction_sq(const RuleInfo& rule, const Direction& direction, const Sums& row) {
  double square = 0;
  for (int i = 0; i < rule.inputs; ++i)
    for (int j = 0; j < rule.inputs; ++j)
      square += direction.d[i] * direction.d[j] * row.of(rule.input[i], rule.input[j]);
  return square;
}

// min(1, max_grad_norm / ||d||)
LOOKSAM_HD double clip_factor(double direction_sq_total, const CommonHyper& common) {
  const double factor = ratio(common.max_grad_norm, sqrt(direction_sq_total > 0 ? direction_sq_total : 0));
  return factor < 1 ? factor : 1;
}

// The base's hyper-parameters of one group, by torch.optim's names.
struct BaseHyper {
  double lr, weight_decay;
  double momentum, dampening;
  double beta1, beta2, eps;
  bool nesterov, always_adapt, trust_clip;
};

// count: how many updates this row has had, this one included.
LOOKSAM_HD UpdateScalars<double> base_scalars(const BaseHyper& h, double count) {
  return {h.lr,
          h.weight_decay,
          1 - h.lr * h.weight_decay,
          h.momentum,
          count == 1 ? 1 : 1 - h.dampening,
          h.nesterov,
          h.beta1,
          1 - h.beta1,
          h.beta2,
          1 - h.beta2,
          h.eps,
          1 / (1 - pow(h.beta1, count)),
          1 / sqrt(1 - pow(h.beta2, count))};
}

// ||w_p|| / ||u_p||; 1 where either is 0, and without weight decay unless always_adapt; at most 1 with trust_clip.
LOOKSAM_HD double trust_ratio(double w_norm_sq, double u_norm_sq, const BaseHyper& h) {
  if (h.weight_decay == 0 && !h.always_adapt) return 1;
  const double r = w_norm_sq > 0 && u_norm_sq > 0 ? sqrt(w_norm_sq / u_norm_sq) : 1;
  return h.trust_clip && r > 1 ? 1 : r;
}

}  // namespace looksam
