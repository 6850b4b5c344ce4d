// looksam_kernels._C: takes tensors apart for csrc/cpu and checks them; no arithmetic in here.

#include <ATen/Parallel.h>

#include <deque>

#include "../cpu/memory.h"
#include "../cpu/ops.h"
#include "host_columns.h"
#include "places.h"
#include "snapshot.h"

namespace looksam {
namespace {

void parallel_for(std::int64_t count, std::int64_t grain, const cpu::Body& body) {
  at::parallel_for(0, count, grain, body);
}

// The tensors of a TensorTable. Columns are set when they change; addresses are read anew by every op, because
// `p.data = ...` moves them unseen.
class Table {
 public:
  Table(std::vector<int> group, const std::string& device) : group_(std::move(group)) {
    check_group_of_row(group_);
    if (!at::Device(device).is_cpu()) throw py::type_error("there is no code here for a table on " + device);
  }

  // From now on weights of bfloat16 without a master copy are rounded stochastically.
  void round_stochastically(std::uint32_t key) { rounding_key_ = key; }

  // tensors: None forgets the column.
  void set(const std::string& name, const std::optional<py::list>& tensors) {
    columns_.erase(name);
    if (tensors) columns_[name] = column_of(name, *tensors, rows());
  }

  // Sets a column to p.grad of each. -> which rows have one: True where all do; None, and nothing is set, where one
  // does not plainly fit its parameter.
  py::object take_gradients(const std::string& name, const py::list& params) {
    const Tensors& w = column("w");
    Tensors taken(rows());
    std::size_t count = 0;
    if (params.size() != rows()) throw py::value_error("parameters that do not fit the table");
    for (std::size_t row = 0; row < rows(); ++row) {
      prefetch_after(w, row);
      const at::Tensor& x = unpack(PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(row))).grad();
      if (!x.defined()) continue;
      if (!fits(x, w[row], /*scalar=*/false)) return py::none();
      taken[row] = x;
      ++count;
    }
    columns_[name] = std::move(taken);
    if (count == rows()) return py::bool_(true);
    py::list there;
    for (const at::Tensor& x : column(name)) there.append(x.defined());
    return there;
  }

  // The tensors of a column, None in rows without one.
  py::list get(const std::string& name) const {
    py::list tensors;
    for (const at::Tensor& x : column(name)) tensors.append(wrap(x));
    return tensors;
  }

  bool any_shared(const std::string& name) const { return looksam::any_shared(column(name)); }
  int first_same_place(const std::string& name, const std::string& other) const {
    return looksam::first_same_place(column(name), column(other));
  }

  py::object sums(const std::vector<Pair>& pairs, py::handle adaptive) {
    const at::NoGradGuard no_grad;
    const at::Tensor values = new_doubles(pairs.size());
    Reads reads(*this);
    add_up(pairs, adaptive, doubles(values), reads);
    return wrap(values);
  }

  // -> d, q or None, found_inf, post or None, trust or None
  py::tuple coefficients(const std::string& rule, const std::vector<Pair>& pairs, py::handle values, py::handle groups,
                         py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm, bool lars) {
    const at::NoGradGuard no_grad;
    const at::Tensor exact = to_numbers(values, "sums.values", pairs.size() * rows(), kHost);
    const Scaling scaling = {grad_scale, found_inf, max_grad_norm, lars};
    const RuleInfo& info = rule_named(rule);
    return as_tensors(info, scaling, evaluate(info, pairs, doubles(exact), groups, scaling));
  }

  // known: formulas.Sums or None. -> all sums, the known ones first, and coefficients().
  py::tuple measure(const std::string& rule, const std::vector<Pair>& pairs, py::handle known, py::handle groups,
                    py::handle adaptive, py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm,
                    bool lars) {
    const at::NoGradGuard no_grad;
    Reads reads(*this);
    const Scaling scaling = {grad_scale, found_inf, max_grad_norm, lars};
    const RuleInfo& info = rule_named(rule);
    const Measured found = measured(info, pairs, known, groups, adaptive, scaling, reads);
    return py::make_tuple(wrap(found.sums), as_tensors(info, scaling, found.scalars));
  }

  // -> all sums, as measure(), and found_inf.
  py::tuple measure_and_perturb(const std::string& rule, const std::vector<Pair>& pairs, py::handle known,
                                py::handle groups, py::handle adaptive, py::handle grad_scale, py::handle found_inf,
                                py::handle max_grad_norm, bool lars, std::uint32_t key, std::uint32_t threshold,
                                py::list moved) {
    const at::NoGradGuard no_grad;
    Reads reads(*this);
    const RuleInfo& info = rule_named(rule);
    const Scaling scaling = {grad_scale, found_inf, max_grad_norm, lars};
    const Measured found = measured(info, pairs, known, groups, adaptive, scaling, reads);
    move(inputs_of(info), found.scalars.d.data(), adaptive, {key, threshold}, moved, reads);
    return py::make_tuple(wrap(found.sums), wrap(flag(found.scalars.found_inf)));
  }

  // -> found_inf.
  py::object measure_and_step(const std::string& rule, const std::vector<Pair>& pairs, py::handle known,
                              py::handle groups, py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm,
                              bool lars, const std::string& base, const std::string& writes, bool check,
                              py::list moved) {
    const at::NoGradGuard no_grad;
    Reads reads(*this);
    const RuleInfo& info = rule_named(rule);
    const Scaling scaling = {grad_scale, found_inf, max_grad_norm, lars};
    Measured found = measured(info, pairs, known, groups, py::none(), scaling, reads);
    found.scalars.found_inf = found.scalars.found_inf && check;
    update(base_named(base), inputs_of(info), found.scalars.combination(), writes, groups, moved, reads);
    return wrap(flag(found.scalars.found_inf));
  }

  // moved: the table's list of perturbed rows, in which the rows that have the first input are marked.
  // threshold 0: no mask.
  void perturb(const std::vector<std::string>& inputs, py::handle d, py::handle adaptive, std::uint32_t key,
               std::uint32_t threshold, py::list moved) {
    const at::NoGradGuard no_grad;
    check_inputs(inputs);
    Reads reads(*this);
    const at::Tensor c = to_numbers(d, "coefficients.d", inputs.size() * rows(), kHost);
    move(inputs, doubles(c), adaptive, {key, threshold}, moved, reads);
  }

  void step(const std::string& base, const std::vector<std::string>& inputs, py::handle d, py::handle q,
            py::handle found_inf, py::handle post, const std::string& writes, py::handle trust, py::handle groups,
            py::list moved) {
    const at::NoGradGuard no_grad;
    check_inputs(inputs);
    Reads reads(*this);
    std::deque<at::Tensor> exact;
    const auto numbers = [&](py::handle given, const char* name, std::size_t count) -> const double* {
      return given.is_none() ? nullptr : doubles(exact.emplace_back(to_numbers(given, name, count, kHost)));
    };
    const std::size_t terms = inputs.size() * rows();
    const bool keep = holds_true(found_inf);
    const Combination of = {numbers(d, "coefficients.d", terms), keep ? nullptr : numbers(q, "coefficients.q", terms),
                            numbers(post, "coefficients.post", terms), numbers(trust, "coefficients.trust", rows()),
                            keep};
    update(base_named(base), inputs, of, writes, groups, moved, reads);
  }

  void restore(py::list moved) {
    const at::NoGradGuard no_grad;
    std::vector<cpu::StepRow> plan(rows());
    const RowFlags written = flags_of(moved, rows());
    for (std::size_t row = 0; row < rows(); ++row) {
      plan[row].action = written[row] ? cpu::Action::restore : cpu::Action::skip;
    }
    BorrowedColumn w, b;
    borrow("w", Access::update, &written, w);
    borrow("b", Access::read, &written, b);
    cpu::StepArgs args = {};
    args.map = chunks();
    args.base = Base::grad;
    args.w = w.column();
    args.b = b.column();
    {
      const py::gil_scoped_release release;
      cpu::step(args, plan.data(), nullptr, nullptr, parallel_for);
    }
    w.write_back();
  }

 private:
  // Columns that an op reads, in several of its parts: each is borrowed once.
  class Reads {
   public:
    explicit Reads(const Table& table) : table_(table) {}

    Column of(const std::string& name) {
      for (const auto& [known, borrowed] : columns_)
        if (known == name) return borrowed.column();
      auto& [_, borrowed] =
          columns_.emplace_back(std::piecewise_construct, std::forward_as_tuple(name), std::tuple<>());
      table_.borrow(name, Access::read, nullptr, borrowed);
      return borrowed.column();
    }

   private:
    const Table& table_;
    std::deque<std::pair<std::string, BorrowedColumn>> columns_;
  };

  // Arguments of a rule, whatever the rule: formulas.Scaling.
  struct Scaling {
    py::handle grad_scale, found_inf, max_grad_norm;
    bool lars;
  };

  // What step combines the inputs with, each [inputs, rows] but trust, which is [rows]; null where there is none.
  struct Combination {
    const double *d, *q, *post, *trust;
    bool keep;  // change nothing: a gradient was not finite
  };

  // The coefficients of a rule. Empty where it has none.
  struct Scalars {
    std::vector<double> d, q, post, trust;
    bool found_inf;

    Combination combination() const {
      const auto numbers = [](const std::vector<double>& x) { return x.empty() ? nullptr : x.data(); };
      return {d.data(), found_inf ? nullptr : numbers(q), numbers(post), numbers(trust), found_inf};
    }
  };

  struct Measured {
    at::Tensor sums;
    Scalars scalars;
  };

  static std::vector<std::string> inputs_of(const RuleInfo& rule) {
    std::vector<std::string> names;
    for (int i = 0; i < rule.inputs; ++i) names.emplace_back(kColNames[rule.input[i]]);
    return names;
  }

  static at::Tensor flag(bool value) {
    const at::Tensor x = at::empty({}, at::kFloat);
    require_memory(x, "a new tensor");
    *static_cast<float*>(x.mutable_data_ptr()) = value ? 1.0f : 0.0f;
    return x;
  }

  std::size_t rows() const { return group_.size(); }

  const Tensors& column(const std::string& name) const {
    const auto found = columns_.find(name);
    return found != columns_.end() ? found->second : absent_;
  }

  RowFlags present(const std::string& name) const {
    RowFlags rows;
    for (const at::Tensor& x : column(name)) rows.push_back(x.defined());
    return rows;
  }

  // Every row of the mask must have a tensor in the column, unless that is optional.
  void borrow(const std::string& name, Access access, const RowFlags* mask, BorrowedColumn& borrowed,
              bool optional = false) const {
    const Tensors& tensors = column(name);
    for (std::size_t row = 0; row < rows() && mask != nullptr && !optional; ++row)
      if ((*mask)[row] && !tensors[row].defined())
        throw py::value_error("row " + std::to_string(row) + " takes part, but column '" + name +
                              "' has no tensor for it");
    borrowed.take(name, tensors, column("w"), access, mask);
  }

  bool rounds_stochastically(std::size_t row) const {
    const at::Tensor& w = column("w")[row];
    return rounding_key_ && w.scalar_type() == at::kBFloat16 && !is_master(column("b")[row], w);
  }
  // updates: as of rounding_key().
  Rounding rounding(std::size_t row, WrittenBy op, double updates) const {
    return rounds_stochastically(row) ? Rounding{looksam::rounding_key(*rounding_key_, op, updates), true} : Rounding{};
  }

  ChunkMap chunks() {
    std::vector<std::int64_t> numel;
    for (const at::Tensor& w : column("w")) numel.push_back(w.numel());
    if (numel != chunks_.numel) chunks_ = ChunkList(std::move(numel));
    return chunks_.map();
  }

  at::Tensor new_doubles(std::size_t count) const {
    return at::empty({static_cast<std::int64_t>(count), static_cast<std::int64_t>(rows())}, at::kDouble);
  }

  // Where the T of each element comes from.
  struct Stretch {
    std::vector<double> eta;  // NaN in rows where T = 1; empty where it is 1 in all, or a preconditioner's
    at::Tensor numbers;       // a preconditioner's; undefined: there is none
    Column v;

    // Into the arguments of an op.
    template <class Args>
    void pass_to(Args& args) const {
      args.eta = eta.empty() ? nullptr : eta.data();
      args.numbers = numbers.defined() ? doubles(numbers) : nullptr;
      args.v = v;
    }
  };

  Stretch to_stretch(py::handle adaptive, Reads& reads) const {
    Stretch stretch = {};
    if (adaptive.is_none()) return stretch;
    if (is_preconditioner(adaptive)) {
      stretch.numbers = to_numbers(adaptive.attr("numbers"), "adaptive", kPreconditionerNumbers * rows(), kHost);
      stretch.v = reads.of(adaptive.attr("column").cast<std::string>());
      return stretch;
    }
    for (const py::handle value : adaptive)
      stretch.eta.push_back(value.is_none() ? std::nan("") : number(value, "adaptive"));
    if (stretch.eta.size() != rows()) throw py::value_error("adaptive does not have one entry a row");
    return stretch;
  }

  // values [pairs, rows]. In batches, should there be more pairs than one pass takes.
  void add_up(const std::vector<Pair>& pairs, py::handle adaptive, double* values, Reads& reads) {
    const Stretch stretch = to_stretch(adaptive, reads);
    BorrowedColumn w;
    const RowFlags none(rows());
    // The kernels ask for the types also where T is made of others.
    borrow("w", Access::read, stretch.eta.empty() ? &none : nullptr, w);
    for (std::size_t next = 0; next < pairs.size();) {
      cpu::SumsArgs args = {};
      args.map = chunks();
      args.w = w.column();
      stretch.pass_to(args);
      std::vector<std::string> operands;
      const auto operand = [&](const std::string& name) {
        for (std::size_t k = 0; k < operands.size(); ++k)
          if (operands[k] == name) return static_cast<int>(k);
        const std::size_t k = operands.size();
        operands.push_back(name);
        const std::string column = without_stretch(name);
        args.operand[k] = {reads.of(column), column != name};
        return static_cast<int>(k);
      };
      double* const batch = values + next * rows();
      for (; next < pairs.size() && args.pairs < cpu::kMaxPairs && operands.size() + 2 <= cpu::kMaxOperands; ++next) {
        const auto& [x, y] = pairs[next];
        if (is_kept_norm(pairs[next])) {
          if (args.pairs > 0) break;
          cached_q_sq(values + next * rows());
          ++next;
          break;
        }
        args.x[args.pairs] = operand(x);
        args.y[args.pairs] = operand(y);
        ++args.pairs;
      }
      args.operands = static_cast<int>(operands.size());
      if (args.pairs == 0) continue;
      if (args.numbers != nullptr && (args.gradient = operand_of_gradient(operands)) < 0) args.numbers = nullptr;
      const py::gil_scoped_release release;
      cpu::sums(args, batch, parallel_for);
    }
  }

  void cached_q_sq(double* values) const {
    const Tensors &q_sq = column(kKeptNorm), &g = column("g");
    for (std::size_t row = 0; row < rows(); ++row)
      values[row] = q_sq[row].defined() && g[row].defined() ? read_scalar(q_sq[row], Where(kKeptNorm, row)) : 0;
  }

  Scalars evaluate(const RuleInfo& rule, const std::vector<Pair>& pairs, const double* values, py::handle groups,
                   const Scaling& scaling) const {
    const bool lars = scaling.lars;
    cpu::SumsOfRows sums;
    bool bad = !scaling.found_inf.is_none() && holds_true(scaling.found_inf);
    check_groups(group_, groups);
    for (std::size_t p = 0; p < pairs.size(); ++p) {
      const double* const of_pair = values + p * rows();
      bad = bad || !std::all_of(of_pair, of_pair + rows(), [](double value) { return std::isfinite(value); });
      const auto x = column_named(pairs[p].first), y = column_named(pairs[p].second);
      if (!x || !y) continue;
      sums.x.push_back(*x);
      sums.y.push_back(*y);
      sums.values.push_back(of_pair);
    }
    std::vector<RowHyper> hyper;
    std::vector<LarsHyper> lars_groups;
    for (const py::handle group : groups) {
      hyper.push_back(rule_hyper(rule, group));
      if (lars) lars_groups.push_back(lars_hyper(group));
    }
    CommonHyper common = common_hyper(groups, scaling.max_grad_norm);
    if (!scaling.grad_scale.is_none()) common.inv_scale = 1 / read_scalar(unpack(scaling.grad_scale), "grad_scale");
    std::vector<const RowHyper*> hyper_of_row;
    std::vector<const LarsHyper*> lars_of_row;
    for (const int group : group_) {
      hyper_of_row.push_back(&hyper.at(group));
      if (lars) lars_of_row.push_back(&lars_groups.at(group));
    }

    const std::size_t terms = static_cast<std::size_t>(rule.inputs) * rows();
    Scalars found = {std::vector<double>(terms), std::vector<double>(rule.writes ? terms : 0),
                     std::vector<double>(rule.posts ? terms : 0), std::vector<double>(lars ? rows() : 0), bad};
    cpu::coefficients(rule, sums, hyper_of_row.data(), common, bad, static_cast<std::int32_t>(rows()), found.d.data(),
                      rule.writes ? found.q.data() : nullptr, rule.posts ? found.post.data() : nullptr,
                      lars ? lars_of_row.data() : nullptr, lars ? found.trust.data() : nullptr);
    return found;
  }

  // -> d, q or None, found_inf, post or None, trust or None
  py::tuple as_tensors(const RuleInfo& rule, const Scaling& scaling, const Scalars& found) const {
    const auto tensor = [&](const std::vector<double>& numbers, bool is_there, at::IntArrayRef shape) {
      if (!is_there) return at::Tensor();
      const at::Tensor x = at::empty(shape, at::kDouble);
      std::copy(numbers.begin(), numbers.end(), doubles(x));
      return x;
    };
    const std::int64_t shape[] = {rule.inputs, static_cast<std::int64_t>(rows())}, row[] = {shape[1]};
    return py::make_tuple(wrap(tensor(found.d, true, shape)), wrap(tensor(found.q, rule.writes, shape)),
                          wrap(flag(found.found_inf)), wrap(tensor(found.post, rule.posts, shape)),
                          wrap(tensor(found.trust, scaling.lars, row)));
  }

  // All sums, the known ones first, and the coefficients of the rule.
  Measured measured(const RuleInfo& rule, const std::vector<Pair>& pairs, py::handle known, py::handle groups,
                    py::handle adaptive, const Scaling& scaling, Reads& reads) {
    std::vector<Pair> all;
    at::Tensor before;
    if (!known.is_none()) {
      all = known.attr("pairs").cast<std::vector<Pair>>();
      before = to_numbers(known.attr("values"), "known.values", all.size() * rows(), kHost);
    }
    const std::size_t have = all.size() * rows();
    all.insert(all.end(), pairs.begin(), pairs.end());
    const at::Tensor values = new_doubles(all.size());
    if (have > 0) std::memcpy(doubles(values), doubles(before), have * sizeof(double));
    add_up(pairs, adaptive, doubles(values) + have, reads);
    return {values, evaluate(rule, all, doubles(values), groups, scaling)};
  }

  // perturb with the coefficients c [inputs, rows].
  void move(const std::vector<std::string>& inputs, const double* c, py::handle adaptive, const Mask& mask,
            py::list& moved, Reads& reads) {
    const Stretch stretch = to_stretch(adaptive, reads);
    const Tensors &weights = column("w"), &backups = column("b");
    const RowFlags moves = present(inputs[0]);
    const RowFlags were_moved = flags_of(moved, rows());
    std::vector<unsigned char> from_b(rows());
    for (std::size_t row = 0; row < rows(); ++row)
      from_b[row] = were_moved[row] || is_master(backups[row], weights[row]);
    BorrowedColumn w, b;
    borrow("w", Access::update, &moves, w);
    borrow("b", Access::update, &moves, b);
    cpu::PerturbArgs args = {};
    args.map = chunks();
    args.w = w.column();
    args.b = b.column();
    args.from_b = from_b.data();
    stretch.pass_to(args);
    args.inputs = static_cast<int>(inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) args.input[i] = reads.of(inputs[i]);
    args.c = c;
    args.mask = mask;
    std::vector<Rounding> roundings(rounding_key_ ? rows() : 0);
    for (std::size_t row = 0; row < roundings.size(); ++row)
      if (moves[row] && rounds_stochastically(row))
        roundings[row] = rounding(row, WrittenBy::perturb, read_scalar(column("step")[row], Where("step", row)) + 1);
    args.rounding = rounding_key_ ? roundings.data() : nullptr;
    {
      const py::gil_scoped_release release;
      cpu::perturb(args, parallel_for);
    }
    w.write_back();
    b.write_back();
    for (std::size_t row = 0; row < rows(); ++row)
      if (moves[row]) PyList_SetItem(moved.ptr(), static_cast<Py_ssize_t>(row), py::bool_(true).release().ptr());
  }

  // step with this combination of the inputs.
  void update(Base base, const std::vector<std::string>& inputs, const Combination& of, const std::string& writes,
              py::handle groups, const py::list& moved, Reads& reads) {
    const Tensors &weights = column("w"), &backups = column("b"), &firsts = column(inputs[0]), &counts = column("step");
    const std::string norm_sq = writes + "_norm_sq";
    const Tensors& norms_sq = column(norm_sq);

    check_groups(group_, groups);
    std::vector<BaseHyper> hyper;
    for (const py::handle group : groups) {
      hyper.push_back(base_hyper(base, group));
      if (base != Base::grad) hyper.back().lr = number_in(group, "lr");
    }
    const std::vector<State> states = states_of_base(base);
    std::vector<const BaseHyper*> hyper_of_row;
    hyper_of_row.reserve(rows());
    std::vector<cpu::StepRow> plan(rows());
    std::vector<double> count(rows());
    RowFlags updated(rows()), written(rows());
    const RowFlags were_moved = flags_of(moved, rows());
    std::vector<RowFlags> with_state(states.size(), RowFlags(rows()));
    for (std::size_t row = 0; row < rows(); ++row) {
      prefetch_numbers_after(counts, row);
      const BaseHyper& h = hyper.at(group_[row]);
      hyper_of_row.push_back(&h);
      const bool is_moved = were_moved[row];
      updated[row] = !of.keep && firsts[row].defined();
      written[row] = updated[row] || is_moved;
      for (std::size_t k = 0; k < states.size(); ++k) with_state[k][row] = updated[row] && is_there(states[k].when, h);
      plan[row].action = updated[row] ? cpu::Action::update : is_moved ? cpu::Action::restore : cpu::Action::skip;
      plan[row].from_b = is_moved || is_master(backups[row], weights[row]);
      if (updated[row] && of.q != nullptr && norms_sq[row].defined()) check_scalar(norms_sq[row], Where(norm_sq, row));
      if (!updated[row] || base == Base::grad) continue;
      count[row] = read_scalar(counts[row], Where("step", row)) + 1;
      const bool as_before = row > 0 && updated[row - 1] && group_[row] == group_[row - 1] &&
                             count[row] == count[row - 1] && of.trust == nullptr;
      const double r = of.trust != nullptr ? of.trust[row] : 1;
      plan[row].rounding = rounding(row, WrittenBy::step, count[row]);
      plan[row].scalars = as_before ? plan[row - 1].scalars : base_scalars(h, count[row], r);
    }

    BorrowedColumn w, b, q_out, d_out, state[kMaxStates];
    borrow("w", Access::update, &written, w);
    borrow("b", Access::update, &written, b, /*optional=*/true);
    for (std::size_t k = 0; k < states.size(); ++k) borrow(states[k].name, Access::update, &with_state[k], state[k]);
    if (of.q != nullptr) borrow(writes, Access::overwrite, &updated, q_out, /*optional=*/true);
    std::vector<double> q_sq(of.q != nullptr ? rows() : 0);

    cpu::StepArgs args = {};
    args.map = chunks();
    args.base = base;
    args.inputs = static_cast<int>(inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (i == 0 && base == Base::grad) {
        borrow(inputs[i], Access::update, &updated, d_out);
        args.input[i] = d_out.column();
      } else {
        args.input[i] = reads.of(inputs[i]);
      }
    }
    args.d = of.d;
    args.q = of.q;
    args.post = of.post;
    args.w = w.column();
    args.b = b.column();
    args.written = q_out.column();
    for (std::size_t k = 0; k < states.size(); ++k) args.state[k] = state[k].column();
    {
      const py::gil_scoped_release release;
      cpu::step(args, plan.data(), hyper_of_row.data(), of.q != nullptr ? q_sq.data() : nullptr, parallel_for);
    }
    for (BorrowedColumn* column : {&w, &b, &q_out, &d_out}) column->write_back();
    for (BorrowedColumn& borrowed : state) borrowed.write_back();
    for (std::size_t row = 0; row < rows(); ++row) {
      prefetch_numbers_after(counts, row);
      if (!updated[row]) continue;
      if (base != Base::grad) write_scalar(counts[row], count[row]);
      if (of.q != nullptr && norms_sq[row].defined()) write_scalar(norms_sq[row], q_sq[row]);
    }
  }

  std::vector<int> group_;
  Tensors absent_ = Tensors(group_.size());
  std::unordered_map<std::string, Tensors> columns_;
  std::optional<std::uint32_t> rounding_key_;
  ChunkList chunks_;
};

// The first row whose tensor is not plainly one for its parameter, or -1.
int first_misfit(const py::list& tensors, const py::list& weights, bool scalar) {
  for (std::size_t row = 0; row < tensors.size(); ++row) {
    const py::handle x_object = tensors[row], w_object = weights[row];
    if (x_object.is_none() || w_object.is_none()) continue;
    if (!fits(unpack(x_object), unpack(w_object), scalar)) return static_cast<int>(row);
  }
  return -1;
}

}  // namespace
}  // namespace looksam

PYBIND11_MODULE(_C, module) {
  using looksam::Table;
  py::class_<Table>(module, "Table")
      .def(py::init<std::vector<int>, const std::string&>())
      .def("round_stochastically", &Table::round_stochastically)
      .def("set", &Table::set)
      .def("get", &Table::get)
      .def("take_gradients", &Table::take_gradients)
      .def("any_shared", &Table::any_shared)
      .def("first_same_place", &Table::first_same_place)
      .def("sums", &Table::sums)
      .def("coefficients", &Table::coefficients)
      .def("measure", &Table::measure)
      .def("measure_and_perturb", &Table::measure_and_perturb)
      .def("measure_and_step", &Table::measure_and_step)
      .def("perturb", &Table::perturb)
      .def("step", &Table::step)
      .def("restore", &Table::restore);
  module.def("rules", &looksam::rule_names);
  module.def("first_misfit", &looksam::first_misfit);
  looksam::bind_places(module);
  looksam::bind_snapshot(module);
  module.def("isas", [] {
    std::vector<std::string> names;
    for (const auto* kernels : looksam::cpu::available_isas()) names.emplace_back(kernels->name);
    return names;
  });
  module.def("isa", [] { return std::string(looksam::cpu::isa().name); });
  module.def("use_isa", [](const std::string& name) {
    if (!looksam::cpu::use_isa(name)) throw py::value_error("no instruction set '" + name + "' on this processor");
  });
  // Of each op: a name of MemoryChoice::kNames, or "measured" while the choice is open.
  module.def("memory_uses", [] {
    std::map<std::string, std::string> found;
    looksam::cpu::memory_choices().visit([&](const char* op, looksam::cpu::MemoryChoice& choice) {
      found[op] = looksam::cpu::MemoryChoice::name_of(choice.chosen());
    });
    return found;
  });
  module.def("use_memory", [](const std::string& name) {
    const int way = looksam::cpu::MemoryChoice::way_named(name);
    looksam::cpu::memory_choices().visit([&](const char*, looksam::cpu::MemoryChoice& choice) { choice.choose(way); });
  });
}
