// looksam_kernels._C: takes tensors apart for csrc/cpu and checks them; no arithmetic in here.

#include <ATen/Parallel.h>

#include <algorithm>

#include "../cpu/ops.h"
#include "arguments.h"
#include "places.h"
#include "snapshot.h"

namespace looksam {
namespace {

const at::Device kHost(at::kCPU);

// New tensors of this file's own. While FakeTensorMode is on, torch makes fake ones.
double* doubles(const at::Tensor& x) {
  require_memory(x, "a new tensor");
  return static_cast<double*>(x.mutable_data_ptr());
}

// One number, which the host can reach.
void check_scalar(const at::Tensor& x, const Where& what) {
  if (!x.is_cpu())
    throw py::type_error(what + " is on " + x.device().str() +
                         ", but the table is on the CPU; TensorTable(device=...) says where an empty table is");
  require_memory(x, what);
  if (x.numel() != 1) throw py::value_error(what + " has " + std::to_string(x.numel()) + " elements, not one");
}

double read_scalar(const at::Tensor& x, const Where& what) {
  const c10::TensorImpl& impl = *x.unsafeGetTensorImpl();
  const void* const number = impl.numel() == 1 ? plain_elements(impl) : nullptr;
  if (number != nullptr && x.scalar_type() == at::kFloat) return *static_cast<const float*>(number);
  if (number != nullptr && x.scalar_type() == at::kDouble) return *static_cast<const double*>(number);
  check_scalar(x, what);
  return x.item().toDouble();
}

bool holds_true(py::handle found_inf) { return read_scalar(unpack(found_inf), "found_inf") > 0; }

void bump_version(const at::Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

// takes_part: of a row. By the dozen: every increment waits for all reads before it, so the counters of a dozen are
// read together and then raised one by one.
template <class TakesPart>
void bump_versions(const Tensors& tensors, const TakesPart& takes_part) {
  constexpr std::size_t kTogether = 12;
  for (std::size_t begin = 0; begin < tensors.size(); begin += kTogether) {
    const std::size_t end = std::min(begin + kTogether, tensors.size());
    [[maybe_unused]] volatile std::uint32_t seen = 0;
    for (std::size_t row = begin; row < end; ++row)
      if (takes_part(row)) seen = version_of(tensors[row]);
    for (std::size_t row = begin; row < end; ++row)
      if (takes_part(row)) bump_version(tensors[row]);
  }
}

// x has been checked.
void write_scalar(const at::Tensor& x, double value) {
  void* const number = plain_elements_to_write(*x.unsafeGetTensorImpl());
  if (number != nullptr && x.scalar_type() == at::kFloat) {
    *static_cast<float*>(number) = static_cast<float>(value);
  } else if (number != nullptr && x.scalar_type() == at::kDouble) {
    *static_cast<double*>(number) = value;
  } else {
    x.fill_(value);
    return;
  }
  bump_version(x);
}

void parallel_for(std::int64_t count, std::int64_t grain, const cpu::Body& body) {
  at::parallel_for(0, count, grain, body);
}

enum class Access { read, overwrite, update };

// The elements of a column for the length of one op. Tensors in another order than their row's are read from and
// written to a copy.
class BorrowedColumn {
 public:
  BorrowedColumn() = default;
  BorrowedColumn(const BorrowedColumn&) = delete;
  BorrowedColumn& operator=(const BorrowedColumn&) = delete;

  // rows: those that take part; null: all.
  void take(const std::string& name, const Tensors& tensors, const Tensors& w, Access access, const RowFlags* rows) {
    data_.assign(w.size(), nullptr);
    dtype_.assign(w.size(), Dtype::f32);
    writes_ = access != Access::read;
    const auto takes_part = [&](std::size_t row) {
      return tensors[row].defined() && (rows == nullptr || (*rows)[row]);
    };
    for (std::size_t row = 0; row < tensors.size(); ++row) {
      prefetch_after(tensors, row);
      const at::Tensor& x = tensors[row];
      if (!x.defined()) continue;
      if (!takes_part(row)) {
        dtype_[row] = check_tensor(x, x, kHost, name, row);
        continue;
      }
      const c10::TensorImpl& impl = *x.unsafeGetTensorImpl();
      const std::optional<Dtype> dtype = dtype_of(x);
      void* const data = writes_ ? plain_elements_to_write(impl) : const_cast<void*>(plain_elements(impl));
      if (data != nullptr && dtype && alike(impl, *w[row].unsafeGetTensorImpl())) {
        data_[row] = data;
        dtype_[row] = *dtype;
      } else {
        take_one(name, x, w[row], access, row);
      }
    }
    if (writes_) bump_versions(tensors, takes_part);  // apart from the reads above
  }

  Column column() const { return {data_.data(), dtype_.data()}; }

  // What was written to copies goes to the tensors.
  void write_back() {
    if (!writes_) return;
    for (const auto& [x, copy] : copies_) x.copy_(copy);
  }

 private:
  // Of any kind of tensor.
  void take_one(const std::string& name, const at::Tensor& x, const at::Tensor& w, Access access, std::size_t row) {
    dtype_[row] = check_tensor(x, w, kHost, name, row);
    at::Tensor copy;
    if (!in_row_order(x, w)) {
      copy = empty_in_row_order(w, x.options());
      if (access != Access::overwrite) copy.copy_(x);
      copies_.emplace_back(x, copy);
    }
    const at::Tensor& source = copy.defined() ? copy : x;
    require_memory(source, Where(name, row));
    data_[row] = writes_ ? source.mutable_data_ptr() : const_cast<void*>(source.const_data_ptr());
  }

  std::vector<void*> data_;
  std::vector<Dtype> dtype_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
  bool writes_ = false;
};

// The tensors of a TensorTable. Columns are set when they change; addresses are read anew by every op, because
// `p.data = ...` moves them unseen.
class Table {
 public:
  Table(std::vector<int> group, const std::string& device) : group_(std::move(group)) {
    check_group_of_row(group_);
    if (!at::Device(device).is_cpu()) throw py::type_error("there is no code here for a table on " + device);
  }

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

  py::object sums(const std::vector<Pair>& pairs, py::handle adaptive) {
    const at::NoGradGuard no_grad;
    const at::Tensor values = new_doubles(pairs.size());
    add_up(pairs, adaptive, doubles(values));
    return wrap(values);
  }

  // -> d, q or None, found_inf, post or None, trust or None
  py::tuple coefficients(const std::string& rule, const std::vector<Pair>& pairs, py::handle values, py::handle groups,
                         py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm, bool lars) {
    const at::NoGradGuard no_grad;
    const at::Tensor exact = to_numbers(values, "sums.values", pairs.size() * rows(), kHost);
    return to_scalars(rule_named(rule), pairs, doubles(exact), groups, grad_scale, found_inf, max_grad_norm, lars);
  }

  // known: formulas.Sums or None. -> all sums, the known ones first, and coefficients().
  py::tuple measure(const std::string& rule, const std::vector<Pair>& pairs, py::handle known, py::handle groups,
                    py::handle adaptive, py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm,
                    bool lars) {
    const at::NoGradGuard no_grad;
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
    add_up(pairs, adaptive, doubles(values) + have);
    return py::make_tuple(wrap(values), to_scalars(rule_named(rule), all, doubles(values), groups, grad_scale,
                                                   found_inf, max_grad_norm, lars));
  }

  // moved: the table's list of perturbed rows, in which the rows that have the first input are marked.
  // threshold 0: no mask.
  void perturb(const std::vector<std::string>& inputs, py::handle d, py::handle adaptive, std::uint32_t key,
               std::uint32_t threshold, py::list moved) {
    const at::NoGradGuard no_grad;
    check_inputs(inputs);
    const Tensors &weights = column("w"), &backups = column("b");
    const RowFlags moves = present(inputs[0]);
    const RowFlags were_moved = flags_of(moved, rows());
    std::vector<unsigned char> from_b(rows());
    for (std::size_t row = 0; row < rows(); ++row)
      from_b[row] = were_moved[row] || is_master(backups[row], weights[row]);
    BorrowedColumn w, b, input[kMaxInputs];
    borrow("w", Access::update, &moves, w);
    borrow("b", Access::update, &moves, b);
    cpu::PerturbArgs args = {};
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      borrow(inputs[i], Access::read, &moves, input[i], /*optional=*/true);
      args.input[i] = input[i].column();
    }
    const std::vector<double> eta = to_eta(adaptive);
    const at::Tensor c = to_numbers(d, "coefficients.d", inputs.size() * rows(), kHost);
    args.map = chunks();
    args.w = w.column();
    args.b = b.column();
    args.from_b = from_b.data();
    args.eta = eta.empty() ? nullptr : eta.data();
    args.inputs = static_cast<int>(inputs.size());
    args.c = doubles(c);
    args.mask = {key, threshold};
    {
      const py::gil_scoped_release release;
      cpu::perturb(args, parallel_for);
    }
    w.write_back();
    b.write_back();
    for (std::size_t row = 0; row < rows(); ++row)
      if (moves[row]) moved[row] = true;
  }

  void step(const std::string& base_name, const std::vector<std::string>& inputs, py::handle d, py::handle q,
            py::handle found_inf, py::handle post, const std::string& writes, py::handle trust, py::handle groups,
            py::list moved) {
    const at::NoGradGuard no_grad;
    const Base base = base_named(base_name);
    check_inputs(inputs);
    const bool keep = holds_true(found_inf);
    const bool writes_q = !q.is_none() && !keep;
    const Tensors &weights = column("w"), &backups = column("b"), &firsts = column(inputs[0]), &counts = column("step");
    const std::string norm_sq = writes + "_norm_sq";
    const Tensors& norms_sq = column(norm_sq);

    check_groups(group_, groups);
    std::vector<BaseHyper> hyper;
    for (const py::handle group : groups) {
      hyper.push_back(base_hyper(base, group));
      if (base != Base::grad) hyper.back().lr = number_in(group, "lr");
    }
    const at::Tensor trust_ratio =
        trust.is_none() ? at::Tensor() : to_numbers(trust, "coefficients.trust", rows(), kHost);
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
      updated[row] = !keep && firsts[row].defined();
      written[row] = updated[row] || is_moved;
      for (std::size_t k = 0; k < states.size(); ++k) with_state[k][row] = updated[row] && is_there(states[k].when, h);
      plan[row].action = updated[row] ? cpu::Action::update : is_moved ? cpu::Action::restore : cpu::Action::skip;
      plan[row].from_b = is_moved || is_master(backups[row], weights[row]);
      if (updated[row] && writes_q && norms_sq[row].defined()) check_scalar(norms_sq[row], Where(norm_sq, row));
      if (!updated[row] || base == Base::grad) continue;
      count[row] = read_scalar(counts[row], Where("step", row)) + 1;
      const bool as_before = row > 0 && updated[row - 1] && group_[row] == group_[row - 1] &&
                             count[row] == count[row - 1] && !trust_ratio.defined();
      const double r = trust_ratio.defined() ? doubles(trust_ratio)[row] : 1;
      plan[row].scalars = as_before ? plan[row - 1].scalars : base_scalars(h, count[row], r);
    }

    BorrowedColumn w, b, q_out, state[kMaxStates], input[kMaxInputs];
    borrow("w", Access::update, &written, w);
    borrow("b", Access::update, &written, b, /*optional=*/true);
    for (std::size_t i = 0; i < inputs.size(); ++i)
      borrow(inputs[i], i == 0 && base == Base::grad ? Access::update : Access::read, &updated, input[i],
             /*optional=*/true);
    for (std::size_t k = 0; k < states.size(); ++k) borrow(states[k].name, Access::update, &with_state[k], state[k]);
    if (writes_q) borrow(writes, Access::overwrite, &updated, q_out, /*optional=*/true);
    const std::size_t terms = inputs.size() * rows();
    const at::Tensor d_coefficient = to_numbers(d, "coefficients.d", terms, kHost);
    const at::Tensor q_coefficient = writes_q ? to_numbers(q, "coefficients.q", terms, kHost) : at::Tensor();
    const at::Tensor post_coefficient =
        !post.is_none() ? to_numbers(post, "coefficients.post", terms, kHost) : at::Tensor();
    std::vector<double> q_sq(writes_q ? rows() : 0);

    cpu::StepArgs args = {};
    args.map = chunks();
    args.base = base;
    args.inputs = static_cast<int>(inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) args.input[i] = input[i].column();
    args.d = doubles(d_coefficient);
    args.q = writes_q ? doubles(q_coefficient) : nullptr;
    args.post = !post.is_none() ? doubles(post_coefficient) : nullptr;
    args.w = w.column();
    args.b = b.column();
    args.written = q_out.column();
    for (std::size_t k = 0; k < states.size(); ++k) args.state[k] = state[k].column();
    {
      const py::gil_scoped_release release;
      cpu::step(args, plan.data(), hyper_of_row.data(), writes_q ? q_sq.data() : nullptr, parallel_for);
    }
    for (BorrowedColumn* column : {&w, &b, &q_out, &input[0]}) column->write_back();
    for (BorrowedColumn& borrowed : state) borrowed.write_back();
    for (std::size_t row = 0; row < rows(); ++row) {
      prefetch_numbers_after(counts, row);
      if (!updated[row]) continue;
      if (base != Base::grad) write_scalar(counts[row], count[row]);
      if (writes_q && norms_sq[row].defined()) write_scalar(norms_sq[row], q_sq[row]);
    }
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

  ChunkMap chunks() {
    std::vector<std::int64_t> numel;
    for (const at::Tensor& w : column("w")) numel.push_back(w.numel());
    if (numel != chunks_.numel) chunks_ = ChunkList(std::move(numel));
    return chunks_.map();
  }

  at::Tensor new_doubles(std::size_t count) const {
    return at::empty({static_cast<std::int64_t>(count), static_cast<std::int64_t>(rows())}, at::kDouble);
  }

  // NaN in rows where T = 1; empty where it is 1 in all.
  std::vector<double> to_eta(py::handle adaptive) const {
    std::vector<double> eta;
    if (adaptive.is_none()) return eta;
    for (const py::handle value : adaptive) eta.push_back(value.is_none() ? std::nan("") : number(value, "adaptive"));
    if (eta.size() != rows()) throw py::value_error("adaptive does not have one entry a row");
    return eta;
  }

  // values [pairs, rows]. In batches, should there be more pairs than one pass takes.
  void add_up(const std::vector<Pair>& pairs, py::handle adaptive, double* values) {
    const std::vector<double> eta = to_eta(adaptive);
    BorrowedColumn w;
    const RowFlags none(rows());
    borrow("w", Access::read, eta.empty() ? &none : nullptr, w);  // the kernels ask for the types also where T = 1
    for (std::size_t next = 0; next < pairs.size();) {
      cpu::SumsArgs args = {};
      args.map = chunks();
      args.w = w.column();
      args.eta = eta.empty() ? nullptr : eta.data();
      BorrowedColumn borrowed[cpu::kMaxOperands];
      std::vector<std::string> operands;
      const auto operand = [&](const std::string& name) {
        for (std::size_t k = 0; k < operands.size(); ++k)
          if (operands[k] == name) return static_cast<int>(k);
        const std::size_t k = operands.size();
        operands.push_back(name);
        const std::string column = without_stretch(name);
        borrow(column, Access::read, nullptr, borrowed[k]);
        args.operand[k] = {borrowed[k].column(), column != name};
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
      const py::gil_scoped_release release;
      cpu::sums(args, batch, parallel_for);
    }
  }

  void cached_q_sq(double* values) const {
    const Tensors &q_sq = column(kKeptNorm), &g = column("g");
    for (std::size_t row = 0; row < rows(); ++row)
      values[row] = q_sq[row].defined() && g[row].defined() ? read_scalar(q_sq[row], Where(kKeptNorm, row)) : 0;
  }

  py::tuple to_scalars(const RuleInfo& rule, const std::vector<Pair>& pairs, const double* values, py::handle groups,
                       py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm, bool lars) const {
    cpu::SumsOfRows sums;
    bool bad = !found_inf.is_none() && holds_true(found_inf);
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
    CommonHyper common = common_hyper(groups, max_grad_norm);
    if (!grad_scale.is_none()) common.inv_scale = 1 / read_scalar(unpack(grad_scale), "grad_scale");
    std::vector<const RowHyper*> hyper_of_row;
    std::vector<const LarsHyper*> lars_of_row;
    for (const int group : group_) {
      hyper_of_row.push_back(&hyper.at(group));
      if (lars) lars_of_row.push_back(&lars_groups.at(group));
    }

    const at::Tensor d = new_doubles(rule.inputs);
    const at::Tensor q = rule.writes ? new_doubles(rule.inputs) : at::Tensor();
    const at::Tensor post = rule.posts ? new_doubles(rule.inputs) : at::Tensor();
    const at::Tensor trust = lars ? at::empty({static_cast<std::int64_t>(rows())}, at::kDouble) : at::Tensor();
    cpu::coefficients(rule, sums, hyper_of_row.data(), common, bad, static_cast<std::int32_t>(rows()), doubles(d),
                      rule.writes ? doubles(q) : nullptr, rule.posts ? doubles(post) : nullptr,
                      lars ? lars_of_row.data() : nullptr, lars ? doubles(trust) : nullptr);
    const at::Tensor not_finite = at::empty({}, at::kFloat);
    require_memory(not_finite, "a new tensor");
    *static_cast<float*>(not_finite.mutable_data_ptr()) = bad ? 1.0f : 0.0f;
    return py::make_tuple(wrap(d), wrap(q), wrap(not_finite), wrap(post), wrap(trust));
  }

  std::vector<int> group_;
  Tensors absent_ = Tensors(group_.size());
  std::unordered_map<std::string, Tensors> columns_;
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
      .def("set", &Table::set)
      .def("get", &Table::get)
      .def("take_gradients", &Table::take_gradients)
      .def("sums", &Table::sums)
      .def("coefficients", &Table::coefficients)
      .def("measure", &Table::measure)
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
}
