// looksam_kernels._cuda: takes tensors apart for csrc/cuda and checks them; no arithmetic in here. Its Table has the
// methods of looksam_kernels._C's. Nothing waits for the device, and all device memory is written by kernels: whatever
// an op does can be captured in a CUDA graph.

#include "borrowed_columns.h"

namespace looksam::cuda {

#if defined(LOOKSAM_HARNESS)
// csrc/harness/execute.h
void fail_after(std::int64_t launches);
void run_launches_with(std::function<void(const std::string&, std::int64_t, const void*, std::size_t)> launch);
#endif

namespace {

// lr: where it is a tensor on a device, kept for the length of the op.
StepGroup step_group(Base base, py::handle group, const at::Device& device, Tensors& kept) {
  StepGroup result = {base_hyper(base, group), {}};
  if (base == Base::grad) return result;
  const py::object lr = item(group, "lr");
  if (is_remote(lr) || (kDeviceType == at::kCPU && THPVariable_Check(lr.ptr()))) {
    const at::Tensor& given = unpack(lr);
    const bool known = given.scalar_type() == at::kFloat || given.scalar_type() == at::kDouble;
    kept.push_back(given.to(device, known ? given.scalar_type() : at::kDouble));
    require_memory(kept.back(), "lr");
    if (kept.back().numel() != 1)
      throw py::value_error("lr has " + std::to_string(given.numel()) + " elements, not one");
    const auto address = reinterpret_cast<std::uint64_t>(kept.back().const_data_ptr());
    result.lr = {address | static_cast<std::uint64_t>(kept.back().scalar_type() == at::kFloat)};
  } else {
    result.hyper.lr = number(lr, "lr");
  }
  return result;
}

// The arguments of a rule, and the tensors that they point to.
struct Evaluation {
  RuleArgs args = {};
  std::vector<RowHyper> groups;

  Evaluation(const DeviceTable& table, const Session& session, const std::string& name, py::handle group_list,
             py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm, bool lars) {
    check_groups(table.group(), group_list);
    args.evaluate = true;
    std::fill(std::begin(args.place), std::end(args.place), std::int8_t{-1});
    args.rule = rule_named(name);
    args.common = common_hyper(group_list, max_grad_norm);
    for (const py::handle group : group_list) groups.push_back(rule_hyper(args.rule, group));
    if (lars) {
      lars_.emplace();
      for (std::size_t i = 0; i < groups.size(); ++i) lars_->group[i] = lars_hyper(group_list[py::int_(i)]);
    }
    scale_ = table.flag(session, grad_scale, "grad_scale");
    earlier_ = table.flag(session, found_inf, "found_inf");
    args.grad_scale = data<float>(scale_);
    args.earlier_inf = data<float>(earlier_);
    d_ = table.new_doubles(args.rule.inputs);
    if (args.rule.writes) q_ = table.new_doubles(args.rule.inputs);
    if (args.rule.posts) post_ = table.new_doubles(args.rule.inputs);
    if (lars) trust_ = table.new_doubles(1).squeeze(0);
    found_inf_ = at::empty({}, at::TensorOptions().dtype(at::kFloat).device(table.device()));
    args.d = data<double>(d_);
    args.q = data<double>(q_);
    args.post = data<double>(post_);
    args.found_inf = data<float>(found_inf_);
  }

  void reads(const Pair& pair, const double* value, double* copy) {
    if (args.fields == kFields) throw py::value_error("a rule reads at most " + std::to_string(kFields) + " sums");
    const auto x = column_named(pair.first), y = column_named(pair.second);
    if (x && y) args.place[Sums::index(*x, *y)] = static_cast<std::int8_t>(args.fields);
    args.field[args.fields++] = {value, copy};
  }

  // After the launch that has evaluated the rule, and filled in its rows and groups.
  void adapt(const Session& session) {
    if (!lars_) return;
    lars_->rule = args;
    lars_->trust = data<double>(trust_);
    cuda::lars(*lars_, session.stream);
  }

  py::tuple result() const { return py::make_tuple(wrap(d_), wrap(q_), wrap(found_inf_), wrap(post_), wrap(trust_)); }

 private:
  std::optional<LarsArgs> lars_;
  at::Tensor d_, q_, post_, trust_, found_inf_, scale_, earlier_;
};

// The ops on a table.
class Table : public DeviceTable {
  // Runs an op on the table's device and torch's current stream there; says which table it was if that fails.
  template <class Op>
  auto guarded(const Op& op) {
    const at::NoGradGuard no_grad;
    const Tensors& weights = column("w");
    if (!weights.empty() && weights[0].defined()) device_ = weights[0].device();
    if (device().type() != kDeviceType)
      throw py::type_error("the table is on " + device().str() + ", for which there is no code here");
    try {
      const Session session(device());
      follow_streams(session);
      return op(session);
    } catch (const py::builtin_exception&) {  // of the caller's doing, and says so
      throw;
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("looksam_kernels: " + std::string(error.what()) + " (table of " +
                               std::to_string(rows()) + " rows on " + device().str() + ")");
    }
  }

 public:
  using DeviceTable::DeviceTable;

  py::object sums(const std::vector<Pair>& pairs, py::handle adaptive) {
    return guarded([&](const Session& session) {
      const at::Tensor values = new_doubles(pairs.size());
      add_up(session, pairs, adaptive, data<double>(values), nullptr, {});
      return wrap(values);
    });
  }

  // Can the coefficients of this rule be computed here? Not with hyper-parameters on the device, nor with very many
  // groups.
  bool evaluates(const std::string& name, py::handle groups, bool lars) const {
    const RuleInfo& rule = rule_named(name);
    for (const py::handle group : groups) {
      for (const ParameterField& parameter : kParameters)
        if ((rule.reads & parameter.bit) && is_remote(item(group, parameter.name))) return false;
      if (lars && is_true(own(group, "trust_clip")) && is_remote(item(group, "lr"))) return false;
    }
    return py::len(groups) <= static_cast<std::size_t>(lars ? kLarsGroups : LargeSums::groups);
  }

  // -> d, q or None, found_inf, post or None, trust or None
  py::tuple coefficients(const std::string& rule, const std::vector<Pair>& pairs, py::handle values, py::handle groups,
                         py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm, bool lars) {
    return guarded([&](const Session& session) {
      const at::Tensor exact = numbers(session, values, "sums.values", pairs.size());
      Evaluation evaluation(*this, session, rule, groups, grad_scale, found_inf, max_grad_norm, lars);
      for (std::size_t p = 0; p < pairs.size(); ++p)
        evaluation.reads(pairs[p], data<double>(exact) + p * rows(), nullptr);
      add_up(session, {}, py::none(), nullptr, &evaluation.args, evaluation.groups);
      evaluation.adapt(session);
      return evaluation.result();
    });
  }

  // known: formulas.Sums or None. -> all sums, the known ones first, and coefficients().
  py::tuple measure(const std::string& rule, const std::vector<Pair>& pairs, py::handle known, py::handle groups,
                    py::handle adaptive, py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm,
                    bool lars) {
    return guarded([&](const Session& session) {
      std::vector<Pair> before;
      at::Tensor exact;
      if (!known.is_none()) {
        before = known.attr("pairs").cast<std::vector<Pair>>();
        exact = numbers(session, known.attr("values"), "known.values", before.size());
      }
      const at::Tensor values = new_doubles(before.size() + pairs.size());
      double* const all = data<double>(values);
      Evaluation evaluation(*this, session, rule, groups, grad_scale, found_inf, max_grad_norm, lars);
      for (std::size_t p = 0; p < before.size(); ++p)
        evaluation.reads(before[p], data<double>(exact) + p * rows(), all + p * rows());
      for (std::size_t p = 0; p < pairs.size(); ++p)
        evaluation.reads(pairs[p], all + (before.size() + p) * rows(), nullptr);
      add_up(session, pairs, adaptive, all + before.size() * rows(), &evaluation.args, evaluation.groups);
      evaluation.adapt(session);
      return py::make_tuple(wrap(values), evaluation.result());
    });
  }

  // moved: the table's list of perturbed rows, in which the rows that have the first input are marked.
  // threshold 0: no mask.
  void perturb(const std::vector<std::string>& inputs, py::handle d, py::handle adaptive, std::uint32_t key,
               std::uint32_t threshold, py::list moved) {
    guarded([&](const Session& session) {
      check_inputs(inputs);
      const RowFlags moves = present(inputs[0]);
      BorrowedColumns columns(*this, session);
      columns.borrow("w", Access::write, moves);
      columns.borrow("b", Access::write, moves);
      for (const std::string& name : inputs) columns.borrow(name, Access::read, moves, /*optional=*/true);
      const bool preconditioned = is_preconditioner(adaptive);
      if (preconditioned)
        columns.borrow(moment_of(adaptive), Access::read, moves, /*optional=*/false, /*wide_only=*/true);
      const Arrangement& arrangement = columns.arrange();
      const at::Tensor t = preconditioned ? numbers_of(session, adaptive) : at::Tensor();
      const at::Tensor c = numbers(session, d, "coefficients.d", inputs.size());

      PerturbArgs args = {};
      args.inputs = static_cast<std::int32_t>(inputs.size());
      for (std::size_t i = 0; i < inputs.size(); ++i) args.input[i] = columns.column(inputs[i]);
      args.w = columns.column("w");
      args.b = columns.column("b");
      if (preconditioned) {
        args.v = columns.column(moment_of(adaptive));
        args.numbers = data<double>(t);
      } else {
        args.eta = to_eta(session, adaptive);
      }
      args.c = data<double>(c);
      args.mask = {key, threshold};
      if (rounding_key_) {
        RowFlags needed(rows());
        for (std::size_t row = 0; row < rows(); ++row) needed[row] = moves[row] && rounds_stochastically(row);
        args.count = scalars(session, "step", at::kFloat, Access::read, needed);
        args.rounding_key = *rounding_key_;
      }
      for (const Layout& layout : arrangement.layouts) {
        for (const Window& window : windows(layout, /*groups=*/false)) {
          args.map = layout.map;
          args.rows = window.rows;
          args.perturbed = to_bits(moved, window.rows);
          cuda::perturb(layout.kind, window.chunks, args, session.stream);
        }
      }
      columns.write_back();
      for (std::size_t row = 0; row < rows(); ++row)
        if (moves[row]) moved[row] = true;
    });
  }

  void step(const std::string& base_name, const std::vector<std::string>& inputs, py::handle d, py::handle q,
            py::handle found_inf, py::handle post, const std::string& writes, py::handle trust, py::handle groups,
            py::list moved) {
    guarded([&](const Session& session) {
      check_inputs(inputs);
      const Base base = base_named(base_name);
      const bool writes_q = !q.is_none();
      check_groups(group(), groups);
      Tensors kept;
      std::vector<StepGroup> hyper;
      for (const py::handle group : groups) hyper.push_back(step_group(base, group, device(), kept));
      const RowFlags updated = present(inputs[0]);
      const std::vector<State> states = states_of_base(base);
      RowFlags written = updated;
      std::vector<RowFlags> with_state(states.size(), RowFlags(rows()));
      for (std::size_t row = 0; row < rows(); ++row) {
        written[row] = updated[row] || is_true(moved[row]);
        for (std::size_t k = 0; k < states.size(); ++k)
          with_state[k][row] = updated[row] && is_there(states[k].when, hyper.at(group()[row]).hyper);
      }

      BorrowedColumns columns(*this, session);
      columns.borrow("w", Access::write, written);
      columns.borrow("b", Access::write, written, /*optional=*/true);
      for (std::size_t i = 0; i < inputs.size(); ++i)
        columns.borrow(inputs[i], i == 0 && base == Base::grad ? Access::write : Access::read, updated,
                       /*optional=*/true);
      for (std::size_t k = 0; k < states.size(); ++k)
        columns.borrow(states[k].name, Access::write, with_state[k], /*optional=*/false, /*wide_only=*/true);
      if (writes_q) columns.borrow(writes, Access::write, updated, /*optional=*/true);
      const Arrangement& arrangement = columns.arrange();
      const at::Tensor d_exact = numbers(session, d, "coefficients.d", inputs.size());
      const at::Tensor q_exact = numbers(session, q, "coefficients.q", inputs.size());
      const at::Tensor post_exact = numbers(session, post, "coefficients.post", inputs.size());
      const at::Tensor trust_exact = numbers(session, trust, "coefficients.trust", 1);
      const at::Tensor inf = flag(session, found_inf, "found_inf");

      StepArgs args = {};
      args.base = base;
      args.inputs = static_cast<std::int32_t>(inputs.size());
      for (std::size_t i = 0; i < inputs.size(); ++i) args.input[i] = columns.column(inputs[i]);
      args.d = data<double>(d_exact);
      args.q = data<double>(q_exact);
      args.post = data<double>(post_exact);
      args.found_inf = data<float>(inf);
      args.w = columns.column("w");
      args.b = columns.column("b");
      args.trust = data<double>(trust_exact);
      for (std::size_t k = 0; k < states.size(); ++k) args.state[k] = columns.column(states[k].name);
      if (base != Base::grad) args.count = scalars(session, "step", at::kFloat, Access::write, updated);
      if (writes_q) {
        args.written = columns.column(writes);
        args.written_norm_sq = scalars(session, writes + "_norm_sq", at::kDouble, Access::write, RowFlags(rows()));
      }
      launch_step(session, arrangement, args, hyper, moved);
      columns.write_back();
    });
  }

  void restore(py::list moved) {
    guarded([&](const Session& session) {
      RowFlags written(rows());
      for (std::size_t row = 0; row < rows(); ++row) written[row] = is_true(moved[row]);
      BorrowedColumns columns(*this, session);
      columns.borrow("w", Access::write, written);
      columns.borrow("b", Access::read, written);
      const Arrangement& arrangement = columns.arrange();
      StepArgs args = {};
      args.base = Base::grad;
      args.w = columns.column("w");
      args.b = columns.column("b");
      launch_step(session, arrangement, args, {}, moved);
      columns.write_back();
    });
  }

 private:
  static Bits to_bits(const py::list& moved, const Rows& window) {
    Bits bits = {};
    for (std::int32_t i = 0; i < window.count; ++i)
      if (is_true(moved[window.first + i])) bits.word[i / 32] |= 1u << (i % 32);
    return bits;
  }

  // A preconditioner's column, and its numbers.
  static std::string moment_of(py::handle adaptive) { return adaptive.attr("column").cast<std::string>(); }
  at::Tensor numbers_of(const Session& session, py::handle adaptive) const {
    return numbers(session, adaptive.attr("numbers"), "adaptive", kPreconditionerNumbers);
  }

  void launch_step(const Session& session, const Arrangement& arrangement, StepArgs& args,
                   const std::vector<StepGroup>& groups, const py::list& moved) const {
    args.group = data<std::int32_t>(arrangement.group);
    args.row_arrivals = data<std::uint32_t>(arrangement.counters);
    args.trust_ratio = data<double>(arrangement.trust_ratio);
    args.rounds_stochastically = rounding_key_.has_value();
    args.rounding_key = rounding_key_.value_or(0);
    for (const Layout& layout : arrangement.layouts) {
      for (const Window& window : windows(layout, /*groups=*/true)) {
        args.map = layout.map;
        args.rows = window.rows;
        args.partial = data<double>(layout.partial);
        args.perturbed = to_bits(moved, window.rows);
        const auto begin = group().begin() + window.rows.first, end = begin + window.rows.count;
        args.first_group = *std::min_element(begin, end);
        const int last_group = *std::max_element(begin, end);
        for (int i = args.first_group; i <= last_group && !groups.empty(); ++i)
          args.groups[i - args.first_group] = groups.at(i);
        cuda::step(layout.kind, window.chunks, args, session.stream);
        if (in_two_phases(args.base)) cuda::lamb_apply(layout.kind, window.chunks, args, session.stream);
      }
    }
  }

  // values [pairs, rows], and the coefficients of a rule in the same launch. In batches, should there be more columns
  // than one launch takes. rule: null for none.
  void add_up(const Session& session, const std::vector<Pair>& pairs, py::handle adaptive, double* values,
              RuleArgs* rule, const std::vector<RowHyper>& groups) {
    std::size_t next = 0;
    const bool stretched = std::any_of(pairs.begin(), pairs.end(), [](const Pair& pair) {
      return without_stretch(pair.first) != pair.first || without_stretch(pair.second) != pair.second;
    });
    do {
      SumsArgs args = {};
      std::vector<std::string> operands;
      if (stretched && is_preconditioner(adaptive)) operands = {"Tg"};  // T is made of operand 0
      for (; next < pairs.size(); ++next) {
        const auto& [x, y] = pairs[next];
        double* const value = values + next * rows();
        if (is_kept_norm(pairs[next])) {
          args.cached_value = value;
          continue;
        }
        const std::size_t had = operands.size();
        for (const std::string& name : {x, y})
          if (std::find(operands.begin(), operands.end(), name) == operands.end()) operands.push_back(name);
        if (operands.size() > kOperands) {
          operands.resize(had);
          break;
        }
        const auto place = [&](const std::string& name) {
          return static_cast<int>(std::find(operands.begin(), operands.end(), name) - operands.begin());
        };
        args.value[pair_of(std::min(place(x), place(y)), std::max(place(x), place(y)))] = value;
      }
      launch_sums(session, args, operands, adaptive, next == pairs.size() ? rule : nullptr, groups);
    } while (next < pairs.size());
  }

  void launch_sums(const Session& session, SumsArgs& args, const std::vector<std::string>& operands,
                   py::handle adaptive, RuleArgs* rule, const std::vector<RowHyper>& groups) {
    const RowFlags all(rows(), 1);
    BorrowedColumns columns(*this, session);
    columns.borrow("w", Access::read, all);
    for (const std::string& name : operands)
      columns.borrow(without_stretch(name), Access::read, all, /*optional=*/true);
    const bool preconditioned = !operands.empty() && operands[0] == "Tg" && is_preconditioner(adaptive);
    if (preconditioned) columns.borrow(moment_of(adaptive), Access::read, all, /*optional=*/true);
    if (args.cached_value != nullptr) columns.borrow("g", Access::read, all, /*optional=*/true);
    Arrangement& arrangement = columns.arrange();

    args.operands = static_cast<std::int32_t>(operands.size());
    for (std::size_t k = 0; k < operands.size(); ++k)
      if (operands[k] != without_stretch(operands[k])) args.stretched |= 1u << k;
    const std::string of_t = preconditioned ? moment_of(adaptive) : args.stretched != 0 ? "w" : "";
    // The first operand that is not uploaded is passed with this launch, which writes it to the device; where another
    // operand, or T, is of the same column, it would be read while it is written.
    std::string passed;
    for (std::size_t k = 0; k < operands.size() && args.passed_to == nullptr; ++k) {
      const std::string name = without_stretch(operands[k]);
      const auto of_column = [&](const std::string& other) { return without_stretch(other) == name; };
      if (name == of_t || std::count_if(operands.begin(), operands.end(), of_column) > 1) continue;
      if (is_uploaded(session, name, columns.refs(name))) continue;
      passed = name;
      columns_[name].uploaded.invalidate();
      args.passed_to = array_of(session, columns_[name]);
      args.passed = static_cast<std::int32_t>(k);
    }
    const auto place = [&](const std::string& name) -> const Ref* {
      return name == passed ? args.passed_to : columns.column(name);
    };
    for (std::size_t k = 0; k < operands.size(); ++k) args.operand[k] = place(without_stretch(operands[k]));
    const at::Tensor t = preconditioned ? numbers_of(session, adaptive) : at::Tensor();
    if (preconditioned) {
      args.numbers = data<double>(t);
      args.of_t = place(of_t);
    } else if (args.stretched != 0) {
      args.eta = to_eta(session, adaptive);
      if (args.eta == nullptr) args.stretched = 0;
      args.of_t = place(of_t);
    }
    if (args.cached_value != nullptr) {
      args.cached = scalars(session, kKeptNorm, at::kDouble, Access::read, RowFlags(rows()));
      args.cached_if = place("g");
    }
    auto* const counters = data<std::uint32_t>(arrangement.counters);
    args.row_arrivals = counters;
    args.arrivals = counters + rows();
    args.rule.rows = static_cast<std::int32_t>(rows());
    args.rule.group = data<std::int32_t>(arrangement.group);

    std::vector<std::pair<const Layout*, Window>> launches;
    for (const Layout& layout : arrangement.layouts)
      if (args.operands > 0)
        for (const Window& window : windows(layout, /*groups=*/false)) launches.emplace_back(&layout, window);
    if (launches.empty()) launches.emplace_back(nullptr, Window{});

    LargeSums launch;
    for (std::size_t i = 0; i < launches.size(); ++i) {
      const auto& [layout, window] = launches[i];
      const bool last = i + 1 == launches.size();
      launch.args = args;
      launch.args.rows = window.rows;
      launch.args.rows_here = window.rows_here;
      launch.args.chunks_here = window.chunks;
      if (layout != nullptr) launch.args.map = layout->map, launch.args.partial = data<double>(layout->partial);
      if (!last) launch.args.cached_value = nullptr;
      if (last && rule != nullptr) {
        rule->rows = args.rule.rows;
        rule->group = args.rule.group;
        launch.args.rule = *rule;
        std::copy(groups.begin(), groups.end(), launch.group);
      }
      if (args.passed_to != nullptr) {
        const auto& refs = columns.refs(passed);
        for (std::int32_t row = 0; row < window.rows.count; ++row) {
          launch.column.low[row] = static_cast<std::uint32_t>(refs[window.rows.first + row]);
          launch.column.high[row] = static_cast<std::uint16_t>(refs[window.rows.first + row] >> 32);
        }
      }
      cuda::sums(window.kind, launch, rule != nullptr ? static_cast<int>(groups.size()) : 0, session.stream);
    }
    if (args.passed_to != nullptr) {
      columns_[passed].refs = columns.refs(passed);
      columns_[passed].uploaded.confirm(session);
    }
  }
};

// A GPU on which these kernels do not run has a reason, which the driver knows best: the code in this build is for
// others, the driver is too old for its PTX.
std::optional<std::string> refusal(int device) {
  try {
    const Session session(at::Device(kDeviceType, static_cast<at::DeviceIndex>(device)));
    return why_not_here();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

}  // namespace
}  // namespace looksam::cuda

PYBIND11_MODULE(LOOKSAM_MODULE, module) {
  using looksam::cuda::Table;
  py::class_<Table>(module, "Table")
      .def(py::init([](std::vector<int> group, const std::string& device) {
        return Table(std::move(group), at::Device(device));
      }))
      .def("round_stochastically", &Table::round_stochastically)
      .def("set", &Table::set)
      .def("sums", &Table::sums)
      .def("evaluates", &Table::evaluates)
      .def("coefficients", &Table::coefficients)
      .def("measure", &Table::measure)
      .def("perturb", &Table::perturb)
      .def("step", &Table::step)
      .def("restore", &Table::restore)
      .def("arrays", &Table::arrays);
  module.def("rules", &looksam::rule_names);
  module.def("launches", &looksam::cuda::launches);
  module.def("refusal", &looksam::cuda::refusal);
#if defined(LOOKSAM_HARNESS)
  module.def("fail_after", &looksam::cuda::fail_after);
  module.def("use_stream", [](std::uintptr_t stream) {
    looksam::cuda::harness_stream = reinterpret_cast<looksam::cuda::Stream>(stream);
  });
  module.def("use_capture", [](unsigned long long capture) { looksam::cuda::harness_capture = capture; });
  // run(kernel, blocks, arguments) for the rest of the process; `run` is never let go, as Python may end first.
  module.def("run_launches_with", [](py::object run) {
    looksam::cuda::run_launches_with(
        [run = run.release()](const std::string& kernel, std::int64_t blocks, const void* args, std::size_t bytes) {
          run(kernel, blocks, py::bytes(static_cast<const char*>(args), bytes));
        });
  });
  module.def("recorded", [] { return looksam::cuda::harness_recorded; });
#endif
}
