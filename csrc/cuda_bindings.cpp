// looksam_kernels._cuda: takes tensors apart for csrc/cuda and checks them; no arithmetic in here. Its Table has the methods of
// looksam_kernels._C's. Nothing waits for the device, and all device memory is written by kernels: whatever an op does can be
// captured in a CUDA graph.

#if !defined(LOOKSAM_HARNESS)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <array>
#include <map>

#include "bindings.h"
#include "cuda/launch.h"

namespace looksam::cuda {
namespace {

using Kinds = std::vector<Kind>;  // one a row

// The device --------------------------------------------------------------------------------------------------------------

#if defined(LOOKSAM_HARNESS)

// CPU tensors, on which the harness runs the kernels.
struct Session {
  explicit Session(const at::Device&) {}
  Stream stream = nullptr;
  unsigned long long capture = 0;
};
constexpr at::DeviceType kDeviceType = at::kCPU;

#else

// One op: its device, torch's current stream there, and the graph capture under way on it (0: none).
struct Session {
  explicit Session(const at::Device& device) : guard(device) {
    const c10::cuda::CUDAStream current = c10::cuda::getCurrentCUDAStream(device.index());
    stream = current.stream();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamGetCaptureInfo(current.stream(), &status, &capture);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    if (status == cudaStreamCaptureStatusNone) capture = 0;
  }
  c10::cuda::CUDAGuard guard;
  Stream stream = nullptr;
  unsigned long long capture = 0;
};
constexpr at::DeviceType kDeviceType = at::kCUDA;

#endif

// Python objects ----------------------------------------------------------------------------------------------------------

// lr: where it is a tensor on the device, kept for the length of the op.
StepGroup step_group(Base base, py::handle group, Tensors& kept) {
  StepGroup result = {base_hyper(base, group), {}};
  if (base == Base::grad) return result;
  const py::object lr = item(group, "lr");
  if (is_remote(lr) || (kDeviceType == at::kCPU && THPVariable_Check(lr.ptr()))) {
    at::Tensor on_device = unpack(lr);
    const bool known = on_device.scalar_type() == at::kFloat || on_device.scalar_type() == at::kDouble;
    kept.push_back(known ? on_device : on_device.to(at::kDouble));
    const auto address = reinterpret_cast<std::uint64_t>(kept.back().const_data_ptr());
    result.lr = {address | static_cast<std::uint64_t>(kept.back().scalar_type() == at::kFloat)};
  } else {
    result.hyper.lr = number(lr);
  }
  return result;
}

// Tensors -----------------------------------------------------------------------------------------------------------------

at::ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::f32 ? at::kFloat : dtype == Dtype::f64 ? at::kDouble : dtype == Dtype::f16 ? at::kHalf : at::kBFloat16;
}

enum class Access { read, write };

template <class T>
T* data(const at::Tensor& x) {
  return x.defined() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

// Empty tensors have no address, but they are there.
constexpr std::uint64_t kNowhere = 16;

// The table ---------------------------------------------------------------------------------------------------------------

// Something that a kernel was given to write down, and the graph capture in which that happened: what a capture files is there
// only when the graph runs.
struct Filed {
  bool done = false;
  unsigned long long capture = 0;

  bool holds(const Session& session, bool for_good) const {
    return done && (capture == session.capture || (capture == 0 && for_good));
  }
  void now(const Session& session) { done = true, capture = session.capture; }
};

struct Column {
  Tensors tensors;
  std::vector<std::uint64_t> refs;  // as last filed
  at::Tensor on_device;
  Filed filed;
};

// A range of rows for one launch, and its chunks.
struct Window {
  Kind kind;
  Rows rows;
  std::int64_t chunks;
  std::int32_t rows_here;
};

// The rows of one kind: rows of other kinds have no chunks in its map.
struct Layout {
  Kind kind;
  std::vector<std::int64_t> first;  // [rows + 1]
  std::vector<std::int32_t> rows;   // how many of the rows 0 .. i - 1 are here; [rows + 1]
  at::Tensor first_on_device, row_of, partial;
  ChunkMap map;
};

// The rows by their kinds.
struct Plan {
  std::vector<std::int64_t> numel;
  std::vector<Layout> layouts;
  at::Tensor numel_on_device, group, counters, trust_ratio;
  Filed filed;
};

class Table {
  // Runs an op on the table's device and torch's current stream there; says which table it was if that fails.
  template <class Op>
  auto guarded(const Op& op) {
    const at::NoGradGuard no_grad;
    const Tensors& weights = column("w");
    const auto first = std::find_if(weights.begin(), weights.end(), [](const at::Tensor& w) { return w.defined(); });
    device_ = first != weights.end() ? first->device() : at::Device(kDeviceType, kDeviceType == at::kCPU ? -1 : 0);
    try {
      return op(Session(device_));
    } catch (const py::builtin_exception&) {  // of the caller's doing, and says so
      throw;
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("looksam_kernels: " + std::string(error.what()) + " (table of " + std::to_string(rows()) +
                               " rows on " + device_.str() + ")");
    }
  }

 public:
  explicit Table(std::vector<int> group) : group_(std::move(group)) {}

  // tensors: a list of tensors and None; None forgets the column.
  void set(const std::string& name, py::handle tensors) {
    Column& column = columns_[name];
    column.filed.done = false;
    if (tensors.is_none()) {
      column.tensors = absent_;
      return;
    }
    column.tensors.clear();
    for (const py::handle x : py::reinterpret_borrow<py::list>(tensors))
      column.tensors.push_back(x.is_none() ? at::Tensor() : unpack(x));
    if (column.tensors.size() != rows()) throw py::value_error("column '" + name + "' does not fit the table");
  }

  py::object sums(const std::vector<Pair>& pairs, py::handle adaptive) {
    return guarded([&](const Session& session) {
      const at::Tensor values = new_doubles(pairs.size());
      add_up(session, pairs, adaptive, data<double>(values), nullptr, {});
      return wrap(values);
    });
  }

  // Can the coefficients of this rule be computed here? Not with hyper-parameters on the device, nor with very many groups.
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
      const at::Tensor exact = unpack(values).to(at::kDouble).contiguous();
      Evaluation evaluation(*this, rule, groups, grad_scale, found_inf, max_grad_norm, lars);
      for (std::size_t p = 0; p < pairs.size(); ++p) evaluation.reads(pairs[p], data<double>(exact) + p * rows(), nullptr);
      add_up(session, {}, py::none(), nullptr, &evaluation.args, evaluation.groups);
      evaluation.adapt(session);
      return evaluation.result();
    });
  }

  // known: formulas.Sums or None. -> all sums, the known ones first, and coefficients().
  py::tuple measure(const std::string& rule, const std::vector<Pair>& pairs, py::handle known, py::handle groups,
                    py::handle adaptive, py::handle grad_scale, py::handle found_inf, py::handle max_grad_norm, bool lars) {
    return guarded([&](const Session& session) {
      std::vector<Pair> before;
      at::Tensor exact;
      if (!known.is_none()) {
        before = known.attr("pairs").cast<std::vector<Pair>>();
        exact = unpack(known.attr("values")).to(at::kDouble).contiguous();
      }
      const at::Tensor values = new_doubles(before.size() + pairs.size());
      double* const all = data<double>(values);
      Evaluation evaluation(*this, rule, groups, grad_scale, found_inf, max_grad_norm, lars);
      for (std::size_t p = 0; p < before.size(); ++p)
        evaluation.reads(before[p], data<double>(exact) + p * rows(), all + p * rows());
      for (std::size_t p = 0; p < pairs.size(); ++p) evaluation.reads(pairs[p], all + (before.size() + p) * rows(), nullptr);
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
      Lease lease(*this, session);
      lease.take("w", Access::write, moves);
      lease.take("b", Access::write, moves);
      for (const std::string& name : inputs) lease.take(name, Access::read, moves, /*optional=*/true);
      const Plan& plan = lease.plan();
      const at::Tensor c = to_coefficients(d, inputs.size());

      PerturbArgs args = {};
      args.inputs = static_cast<std::int32_t>(inputs.size());
      for (std::size_t i = 0; i < inputs.size(); ++i) args.input[i] = lease.column(inputs[i]);
      args.w = lease.column("w");
      args.b = lease.column("b");
      args.eta = to_eta(session, adaptive);
      args.c = data<double>(c);
      args.mask = {key, threshold};
      for (const Layout& layout : plan.layouts) {
        for (const Window& window : windows(layout, /*groups=*/false)) {
          args.map = layout.map;
          args.rows = window.rows;
          args.perturbed = to_bits(moved, window.rows);
          cuda::perturb(layout.kind, window.chunks, args, session.stream);
        }
      }
      lease.give_back();
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
      Tensors kept;
      std::vector<StepGroup> hyper;
      for (const py::handle group : groups) hyper.push_back(step_group(base, group, kept));
      const RowFlags updated = present(inputs[0]);
      const std::vector<State> states = states_of_base(base);
      RowFlags written = updated;
      std::vector<RowFlags> with_state(states.size(), RowFlags(rows()));
      for (std::size_t row = 0; row < rows(); ++row) {
        written[row] = updated[row] || is_true(moved[row]);
        for (std::size_t k = 0; k < states.size(); ++k)
          with_state[k][row] = updated[row] && is_there(states[k].when, hyper.at(group_[row]).hyper);
      }

      Lease lease(*this, session);
      lease.take("w", Access::write, written);
      lease.take("b", Access::write, written, /*optional=*/true);
      for (std::size_t i = 0; i < inputs.size(); ++i)
        lease.take(inputs[i], i == 0 && base == Base::grad ? Access::write : Access::read, updated, /*optional=*/true);
      for (std::size_t k = 0; k < states.size(); ++k) lease.take(states[k].name, Access::write, with_state[k]);
      if (writes_q) lease.take(writes, Access::write, updated);
      const Plan& plan = lease.plan();
      const at::Tensor d_exact = to_coefficients(d, inputs.size());
      const at::Tensor q_exact = writes_q ? to_coefficients(q, inputs.size()) : at::Tensor();
      const at::Tensor post_exact = post.is_none() ? at::Tensor() : to_coefficients(post, inputs.size());
      const at::Tensor trust_exact = trust.is_none() ? at::Tensor() : to_coefficients(trust, 1);
      const at::Tensor inf = to_flag(found_inf);

      StepArgs args = {};
      args.base = base;
      args.inputs = static_cast<std::int32_t>(inputs.size());
      for (std::size_t i = 0; i < inputs.size(); ++i) args.input[i] = lease.column(inputs[i]);
      args.d = data<double>(d_exact);
      args.q = data<double>(q_exact);
      args.post = data<double>(post_exact);
      args.found_inf = data<float>(inf);
      args.w = lease.column("w");
      args.b = lease.column("b");
      args.trust = data<double>(trust_exact);
      for (std::size_t k = 0; k < states.size(); ++k) args.state[k] = lease.column(states[k].name);
      if (base != Base::grad) args.count = scalars(session, "step", at::kFloat, updated);
      if (writes_q) {
        args.written = lease.column(writes);
        args.written_norm_sq = scalars(session, writes + "_norm_sq", at::kDouble, RowFlags(rows()));
      }
      launch_step(session, plan, args, hyper, moved);
      lease.give_back();
    });
  }

  void restore(py::list moved) {
    guarded([&](const Session& session) {
      RowFlags written;
      for (const py::handle is_moved : moved) written.push_back(is_true(is_moved));
      Lease lease(*this, session);
      lease.take("w", Access::write, written);
      lease.take("b", Access::read, written);
      const Plan& plan = lease.plan();
      StepArgs args = {};
      args.base = Base::grad;
      args.w = lease.column("w");
      args.b = lease.column("b");
      launch_step(session, plan, args, {}, moved);
      lease.give_back();
    });
  }

 private:
  std::size_t rows() const { return group_.size(); }

  const Tensors& column(const std::string& name) const {
    const auto found = columns_.find(name);
    return found != columns_.end() ? found->second.tensors : absent_;
  }

  RowFlags present(const std::string& name) const {
    RowFlags rows;
    for (const at::Tensor& x : column(name)) rows.push_back(x.defined());
    return rows;
  }

  template <class T>
  at::Tensor new_array(std::size_t count) const {
    return at::empty({static_cast<std::int64_t>(count * sizeof(T))}, at::TensorOptions().dtype(at::kByte).device(device_));
  }

  at::Tensor new_doubles(std::size_t count) const {
    return at::empty({static_cast<std::int64_t>(count), static_cast<std::int64_t>(rows())},
                     at::TensorOptions().dtype(at::kDouble).device(device_));
  }

  template <class T>
  static void file(const Session& session, const at::Tensor& to, const std::vector<T>& from) {
    cuda::file(to.mutable_data_ptr(), from.data(), from.size() * sizeof(T), session.stream);
  }

  // A column's addresses on the device. carry: where it must be filed first, the coming launch does it, and *carry is set.
  Ref* on_device(const Session& session, const std::string& name, const std::vector<std::uint64_t>& refs, bool* carry = nullptr) {
    Column& column = columns_[name];
    if (column.tensors.empty()) column.tensors = absent_;
    if (!column.on_device.defined()) column.on_device = new_array<std::uint64_t>(rows());
    const auto col = column_named(name);
    const bool outlives_the_step = !col || !is_scaled(*col);
    if (!column.filed.holds(session, outlives_the_step) || column.refs != refs) {
      if (carry != nullptr) {
        *carry = true;
      } else {
        file(session, column.on_device, refs);
      }
      column.refs = refs;
      column.filed.now(session);
    }
    return data<Ref>(column.on_device);
  }

  // A column of scalars. rows: those that must have one.
  const Ref* scalars(const Session& session, const std::string& name, at::ScalarType dtype, const RowFlags& needed) {
    std::vector<std::uint64_t> refs(rows());
    const Tensors& tensors = column(name);
    for (std::size_t row = 0; row < rows(); ++row) {
      const at::Tensor& x = tensors[row];
      if (!x.defined()) {
        if (needed[row]) throw py::value_error("row " + std::to_string(row) + " takes part, but has no '" + name + "'");
        continue;
      }
      if (x.scalar_type() != dtype)
        throw py::type_error("column '" + name + "', row " + std::to_string(row) + ": " + toString(x.scalar_type()) +
                             " is not supported; it must be " + toString(dtype));
      refs[row] = reinterpret_cast<std::uint64_t>(x.mutable_data_ptr());
      if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
    }
    return on_device(session, name, refs);
  }

  // The columns of one op. Tensors in another order than their row's, or of a type that the row's kernel does not know, are
  // read from and written to a copy.
  class Lease {
   public:
    Lease(Table& table, const Session& session) : table_(table), session_(session) {}

    // rows: those that are read or written, the same for each use of a column; they must all have a tensor, unless that is
    // optional.
    void take(const std::string& name, Access access, const RowFlags& rows, bool optional = false) {
      const Tensors &tensors = table_.column(name), &weights = table_.column("w");
      for (std::size_t row = 0; row < rows.size(); ++row) {
        const at::Tensor& x = tensors[row];
        const auto at_row = [&] { return "column '" + name + "', row " + std::to_string(row) + ": "; };
        if (!x.defined()) {
          if (rows[row] && !optional) throw py::value_error(at_row() + "takes part, but has no tensor");
          continue;
        }
        if (x.device() != table_.device_) throw py::type_error(at_row() + "on " + x.device().str() + ", not on " + table_.device_.str());
        if (!dtype_of(x)) throw py::type_error(at_row() + toString(x.scalar_type()) + " is not supported");
        if (x.sizes() != weights[row].sizes()) throw py::value_error(at_row() + "the shape has changed since the column was set");
      }
      Taken* const before = of(name);
      if (before == nullptr) {
        taken_.push_back({name, access, rows, {}});
      } else if (access == Access::write) {
        before->access = access;
      }
    }

    // Which kernel each row needs: after the last take().
    Plan& plan() {
      Kinds kinds(table_.rows(), Kind::f32);
      const Tensors& weights = table_.column("w");
      for (std::size_t row = 0; row < kinds.size(); ++row) {
        const at::ScalarType w = weights[row].scalar_type();
        if (w == at::kDouble) kinds[row] = Kind::f64;
        if (w == at::kBFloat16) kinds[row] = Kind::bf16;
        if (w == at::kHalf) kinds[row] = Kind::f16;
      }
      for (const Taken& taken : taken_) {
        const Tensors& tensors = table_.column(taken.name);
        for (std::size_t row = 0; row < kinds.size(); ++row) {
          if (kinds[row] != Kind::f32 || !tensors[row].defined()) continue;
          if (tensors[row].scalar_type() == at::kBFloat16) kinds[row] = Kind::bf16;
          if (tensors[row].scalar_type() == at::kHalf) kinds[row] = Kind::f16;
        }
      }
      std::array<bool, kKinds> found = {};
      for (const Kind kind : kinds) found[static_cast<int>(kind)] = true;
      // Rows of float alone go along with others, for one launch instead of two.
      const Kind host = found[static_cast<int>(Kind::bf16)] ? Kind::bf16 : Kind::f16;
      if (found[static_cast<int>(host)]) std::replace(kinds.begin(), kinds.end(), Kind::f32, host);
      for (Taken& taken : taken_) fill(taken, kinds);
      return table_.plan_for(session_, kinds);
    }

    const std::vector<std::uint64_t>& refs(const std::string& name) { return of(name)->refs; }

    const Ref* column(const std::string& name) { return table_.on_device(session_, name, refs(name)); }

    void give_back() const {
      for (const auto& [x, copy] : copies_) x.copy_(copy);
    }

   private:
    struct Taken {
      std::string name;
      Access access;
      RowFlags rows;
      std::vector<std::uint64_t> refs;
    };

    Taken* of(const std::string& name) {
      const auto found = std::find_if(taken_.begin(), taken_.end(), [&](const Taken& taken) { return taken.name == name; });
      return found != taken_.end() ? &*found : nullptr;
    }

    void fill(Taken& taken, const Kinds& kinds) {
      const Tensors &tensors = table_.column(taken.name), &weights = table_.column("w");
      taken.refs.assign(kinds.size(), 0);
      for (std::size_t row = 0; row < kinds.size(); ++row) {
        const at::Tensor& x = tensors[row];
        if (!x.defined()) continue;
        const Dtype dtype = *dtype_of(x);
        const bool known = dtype == wide(kinds[row]) || dtype == narrow(kinds[row]);
        at::Tensor copy;
        if (!known || !in_row_order(x, weights[row])) {
          if (!taken.rows[row]) continue;
          const at::TensorOptions options = x.options().dtype(scalar_type(known ? dtype : wide(kinds[row])));
          copy = empty_in_row_order(weights[row], options);
          copy.copy_(x);
          (taken.access == Access::write ? copies_ : alive_).emplace_back(x, copy);
        }
        const at::Tensor& used = copy.defined() ? copy : x;
        const auto address = reinterpret_cast<std::uint64_t>(used.const_data_ptr());
        if (address >> 48 != 0) throw std::runtime_error("an address of more than 48 bits");
        const bool is_narrow = used.scalar_type() != scalar_type(wide(kinds[row]));
        taken.refs[row] = (x.numel() == 0 ? kNowhere : address) | static_cast<std::uint64_t>(is_narrow);
        if (taken.access == Access::write && taken.rows[row] && !x.is_inference())
          x.unsafeGetTensorImpl()->bump_version();
      }
    }

    Table& table_;
    const Session& session_;
    std::vector<Taken> taken_;
    std::vector<std::pair<at::Tensor, at::Tensor>> copies_, alive_;
  };

  // The arguments of a rule, and the tensors that they point to.
  struct Evaluation {
    RuleArgs args = {};
    std::vector<RowHyper> groups;

    Evaluation(const Table& table, const std::string& name, py::handle group_list, py::handle grad_scale, py::handle found_inf,
               py::handle max_grad_norm, bool lars) {
      args.evaluate = true;
      args.rule = rule_named(name);
      args.common = common_hyper(group_list, max_grad_norm);
      for (const py::handle group : group_list) groups.push_back(rule_hyper(args.rule, group));
      if (lars) {
        lars_.emplace();
        for (std::size_t i = 0; i < groups.size(); ++i) lars_->group[i] = lars_hyper(group_list[py::int_(i)]);
      }
      if (!grad_scale.is_none()) scale_ = table.to_flag(grad_scale);
      if (!found_inf.is_none()) earlier_ = table.to_flag(found_inf);
      args.grad_scale = data<float>(scale_);
      args.earlier_inf = data<float>(earlier_);
      d_ = table.new_doubles(args.rule.inputs);
      if (args.rule.writes) q_ = table.new_doubles(args.rule.inputs);
      if (args.rule.posts) post_ = table.new_doubles(args.rule.inputs);
      if (lars) trust_ = table.new_doubles(1).squeeze(0);
      found_inf_ = at::empty({}, at::TensorOptions().dtype(at::kFloat).device(table.device_));
      args.d = data<double>(d_);
      args.q = data<double>(q_);
      args.post = data<double>(post_);
      args.found_inf = data<float>(found_inf_);
    }

    void reads(const Pair& pair, const double* value, double* copy) {
      if (args.fields == kFields) throw py::value_error("a rule reads at most " + std::to_string(kFields) + " sums");
      const auto x = column_named(pair.first), y = column_named(pair.second);
      args.field[args.fields++] = {x && y ? Sums::index(*x, *y) : -1, value, copy};
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

  // A float on the device.
  at::Tensor to_flag(py::handle object) const { return unpack(object).to(device_, at::kFloat); }

  at::Tensor to_coefficients(py::handle object, std::size_t inputs) const {
    const at::Tensor exact = unpack(object).to(device_, at::kDouble).contiguous();
    if (exact.numel() != static_cast<std::int64_t>(inputs * rows()))
      throw py::value_error("the coefficients do not fit the inputs and rows of this table");
    return exact;
  }

  // NaN in rows where T = 1; null where it is 1 in all.
  const double* to_eta(const Session& session, py::handle adaptive) {
    if (adaptive.is_none()) return nullptr;
    std::vector<double> eta;
    for (const py::handle value : adaptive) eta.push_back(value.is_none() ? std::nan("") : number(value));
    if (eta.size() != rows()) throw py::value_error("adaptive does not have one entry a row");
    const auto same = [](double x, double y) { return x == y || (x != x && y != y); };
    if (!eta_filed_.holds(session, true) || !std::equal(eta.begin(), eta.end(), eta_.begin(), eta_.end(), same)) {
      if (!eta_on_device_.defined()) eta_on_device_ = new_array<double>(rows());
      file(session, eta_on_device_, eta);
      eta_ = std::move(eta);
      eta_filed_.now(session);
    }
    return data<double>(eta_on_device_);
  }

  static Bits to_bits(const py::list& moved, const Rows& window) {
    Bits bits = {};
    for (std::int32_t i = 0; i < window.count; ++i)
      if (is_true(moved[window.first + i])) bits.word[i / 32] |= 1u << (i % 32);
    return bits;
  }

  // Chunks and counters on the device, for rows of these kinds.
  Plan& plan_for(const Session& session, const Kinds& kinds) {
    std::vector<std::int64_t> numel;
    for (const at::Tensor& w : column("w")) numel.push_back(w.numel());
    Plan& plan = plans_[kinds];
    if (plan.numel != numel || !plan.numel_on_device.defined()) plan = new_plan(kinds, std::move(numel));
    if (!plan.filed.holds(session, true)) {
      file(session, plan.numel_on_device, plan.numel);
      file(session, plan.group, group_);
      auto* const counters = data<std::uint32_t>(plan.counters);
      for (const Layout& layout : plan.layouts) {
        file(session, layout.first_on_device, layout.first);
        index_chunks(layout.map, data<std::int32_t>(layout.row_of), counters, counters + rows(), session.stream);
      }
      plan.filed.now(session);
    }
    return plan;
  }

  Plan new_plan(const Kinds& kinds, std::vector<std::int64_t> numel) const {
    Plan plan;
    plan.numel = std::move(numel);
    plan.numel_on_device = new_array<std::int64_t>(rows());
    plan.group = new_array<std::int32_t>(rows());
    plan.counters = new_array<std::uint32_t>(rows() + 1);
    plan.trust_ratio = new_array<double>(rows());
    for (int k = 0; k < kKinds; ++k) {
      Layout layout = {};
      layout.kind = Kind(k);
      layout.first = {0};
      layout.rows = {0};
      for (std::size_t row = 0; row < rows(); ++row) {
        const bool here = kinds[row] == layout.kind;
        // Empty rows have a chunk too: it counts their updates.
        const std::int64_t chunks = here ? std::max<std::int64_t>((plan.numel[row] + kChunk - 1) / kChunk, 1) : 0;
        layout.first.push_back(layout.first.back() + chunks);
        layout.rows.push_back(layout.rows.back() + here);
      }
      const std::int64_t chunks = layout.first.back();
      if (chunks == 0) continue;
      layout.first_on_device = new_array<std::int64_t>(rows() + 1);
      layout.row_of = new_array<std::int32_t>(chunks);
      layout.partial = new_array<double>(kPairs * chunks);
      layout.map = {static_cast<std::int32_t>(rows()), chunks, data<std::int64_t>(plan.numel_on_device),
                    data<std::int64_t>(layout.first_on_device), data<std::int32_t>(layout.row_of)};
      plan.layouts.push_back(std::move(layout));
    }
    return plan;
  }

  // One launch each: at most kMaxRows rows, and, where the groups travel too, kStepGroups groups that follow each other.
  std::vector<Window> windows(const Layout& layout, bool groups) const {
    std::vector<Window> result;
    const auto count = static_cast<std::int32_t>(rows());
    for (std::int32_t first = 0; first < count;) {
      std::int32_t end = first;
      int low = group_[first], high = low;
      for (; end < count && end - first < kMaxRows; ++end) {
        low = std::min(low, group_[end]), high = std::max(high, group_[end]);
        if (groups && high - low >= kStepGroups) break;
      }
      const std::int64_t first_chunk = layout.first[first], chunks = layout.first[end] - first_chunk;
      if (chunks > 0)
        result.push_back({layout.kind, {first, end - first, first_chunk}, chunks, layout.rows[end] - layout.rows[first]});
      first = end;
    }
    return result;
  }

  void launch_step(const Session& session, const Plan& plan, StepArgs& args, const std::vector<StepGroup>& groups,
                   const py::list& moved) const {
    args.group = data<std::int32_t>(plan.group);
    args.row_arrivals = data<std::uint32_t>(plan.counters);
    args.trust_ratio = data<double>(plan.trust_ratio);
    for (const Layout& layout : plan.layouts) {
      for (const Window& window : windows(layout, /*groups=*/true)) {
        args.map = layout.map;
        args.rows = window.rows;
        args.partial = data<double>(layout.partial);
        args.perturbed = to_bits(moved, window.rows);
        const auto begin = group_.begin() + window.rows.first, end = begin + window.rows.count;
        args.first_group = *std::min_element(begin, end);
        const int last_group = *std::max_element(begin, end);
        for (int i = args.first_group; i <= last_group && !groups.empty(); ++i) args.groups[i - args.first_group] = groups.at(i);
        cuda::step(layout.kind, window.chunks, args, session.stream);
        if (in_two_phases(args.base)) cuda::lamb_apply(layout.kind, window.chunks, args, session.stream);
      }
    }
  }

  // values [pairs, rows], and the coefficients of a rule in the same launch. In batches, should there be more columns than one
  // launch takes. rule: null for none.
  void add_up(const Session& session, const std::vector<Pair>& pairs, py::handle adaptive, double* values, RuleArgs* rule,
              const std::vector<RowHyper>& groups) {
    std::size_t next = 0;
    do {
      SumsArgs args = {};
      std::vector<std::string> operands;
      for (; next < pairs.size(); ++next) {
        const auto& [x, y] = pairs[next];
        double* const value = values + next * rows();
        if (x == "q" && y == "q") {
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

  void launch_sums(const Session& session, SumsArgs& args, const std::vector<std::string>& operands, py::handle adaptive,
                   RuleArgs* rule, const std::vector<RowHyper>& groups) {
    const auto column_of = [](const std::string& name) { return name == "Tg" ? std::string("g") : name; };
    const RowFlags all(rows(), 1);
    Lease lease(*this, session);
    lease.take("w", Access::read, all);
    for (const std::string& name : operands) lease.take(column_of(name), Access::read, all, /*optional=*/true);
    if (args.cached_value != nullptr) lease.take("g", Access::read, all, /*optional=*/true);
    Plan& plan = lease.plan();

    args.operands = static_cast<std::int32_t>(operands.size());
    args.adaptive = -1;
    for (std::size_t k = 0; k < operands.size(); ++k) {
      const std::string name = column_of(operands[k]);
      bool carry = false;
      Ref* const column = on_device(session, name, lease.refs(name), args.filed == nullptr ? &carry : nullptr);
      args.operand[k] = column;
      if (carry) args.filed = column, args.carried = static_cast<std::int32_t>(k);
      if (operands[k] == "Tg") {
        args.adaptive = static_cast<std::int32_t>(k);
        args.eta = to_eta(session, adaptive);
        if (args.eta == nullptr) args.adaptive = -1;
        args.w = lease.column("w");
      }
    }
    if (args.cached_value != nullptr) {
      args.cached = scalars(session, "q_norm_sq", at::kDouble, RowFlags(rows()));
      args.cached_if = lease.column("g");  // filed above if it is an operand too
    }
    auto* const counters = data<std::uint32_t>(plan.counters);
    args.row_arrivals = counters;
    args.arrivals = counters + rows();
    args.rule.rows = static_cast<std::int32_t>(rows());
    args.rule.group = data<std::int32_t>(plan.group);

    std::vector<std::pair<const Layout*, Window>> launches;
    for (const Layout& layout : plan.layouts)
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
      if (layout != nullptr) launch.args.map = layout->map, launch.args.partial = data<double>(layout->partial);
      if (!last) launch.args.cached_value = nullptr;
      if (last && rule != nullptr) {
        rule->rows = args.rule.rows;
        rule->group = args.rule.group;
        launch.args.rule = *rule;
        std::copy(groups.begin(), groups.end(), launch.group);
      }
      if (args.filed != nullptr) {
        const auto& refs = lease.refs(column_of(operands[args.carried]));
        for (std::int32_t row = 0; row < window.rows.count; ++row) {
          launch.column.low[row] = static_cast<std::uint32_t>(refs[window.rows.first + row]);
          launch.column.high[row] = static_cast<std::uint16_t>(refs[window.rows.first + row] >> 32);
        }
      }
      cuda::sums(window.kind, window.chunks, launch, rule != nullptr ? static_cast<int>(groups.size()) : 0, session.stream);
    }
  }

  std::vector<int> group_;
  Tensors absent_ = Tensors(group_.size());
  at::Device device_ = at::Device(kDeviceType, kDeviceType == at::kCPU ? -1 : 0);
  std::unordered_map<std::string, Column> columns_;
  std::map<Kinds, Plan> plans_;
  std::vector<double> eta_;
  at::Tensor eta_on_device_;
  Filed eta_filed_;
};

}  // namespace
}  // namespace looksam::cuda

PYBIND11_MODULE(LOOKSAM_MODULE, module) {
  using looksam::cuda::Table;
  py::class_<Table>(module, "Table")
      .def(py::init<std::vector<int>>())
      .def("set", &Table::set)
      .def("sums", &Table::sums)
      .def("evaluates", &Table::evaluates)
      .def("coefficients", &Table::coefficients)
      .def("measure", &Table::measure)
      .def("perturb", &Table::perturb)
      .def("step", &Table::step)
      .def("restore", &Table::restore);
  module.def("launches", &looksam::cuda::launches);
}
