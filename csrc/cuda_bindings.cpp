// looksam_kernels._cuda: takes tensors apart for csrc/cuda and checks them; no arithmetic in here. Its Table has the methods of
// looksam_kernels._C's. Nothing waits for the device, and all device memory is written by kernels: whatever an op does can be
// captured in a CUDA graph.

#if !defined(LOOKSAM_HARNESS)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <array>
#include <list>

#include "bindings.h"
#include "cuda/launch.h"

namespace looksam::cuda {

#if defined(LOOKSAM_HARNESS)
void fail_after(std::int64_t launches);  // csrc/harness/execute.h
#endif

namespace {

using Kinds = std::vector<Kind>;  // one a row

// The device --------------------------------------------------------------------------------------------------------------

#if defined(LOOKSAM_HARNESS)

// CPU tensors, on which the harness runs the kernels. Tests say which stream and which capture it is.
Stream harness_stream = nullptr;
unsigned long long harness_capture = 0;
std::vector<std::pair<std::uintptr_t, std::uintptr_t>> harness_recorded;  // address, stream

struct Session {
  explicit Session(const at::Device&) {}
  void record(const at::Tensor& x) const {
    harness_recorded.emplace_back(reinterpret_cast<std::uintptr_t>(x.const_data_ptr()), reinterpret_cast<std::uintptr_t>(stream));
  }
  Stream stream = harness_stream;
  unsigned long long capture = harness_capture;
};
constexpr at::DeviceType kDeviceType = at::kCPU;

#else

// One op: its device, torch's current stream there, and the graph capture under way on it (0: none).
struct Session {
  explicit Session(const at::Device& device) : guard(device), current(c10::cuda::getCurrentCUDAStream(device.index())) {
    stream = current.stream();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamGetCaptureInfo(current.stream(), &status, &capture);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or torch's next call reports it
      throw std::runtime_error(cudaGetErrorString(error));
    }
    if (status == cudaStreamCaptureStatusNone) capture = 0;
  }
  // The memory of x is not given to anybody else before this stream has done what it was asked so far.
  void record(const at::Tensor& x) const { x.record_stream(current.unwrap()); }

  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream current;
  Stream stream = nullptr;
  unsigned long long capture = 0;
};
constexpr at::DeviceType kDeviceType = at::kCUDA;

#endif

// Python objects ----------------------------------------------------------------------------------------------------------

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
    if (kept.back().numel() != 1) throw py::value_error("lr has " + std::to_string(given.numel()) + " elements, not one");
    const auto address = reinterpret_cast<std::uint64_t>(kept.back().const_data_ptr());
    result.lr = {address | static_cast<std::uint64_t>(kept.back().scalar_type() == at::kFloat)};
  } else {
    result.hyper.lr = number(lr, "lr");
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
// only when the graph runs. Not filed from before the launch that writes it until that has succeeded.
struct Filed {
  bool done = false;
  unsigned long long capture = 0;

  bool holds(const Session& session, bool for_good) const {
    return done && (capture == session.capture || (capture == 0 && for_good));
  }
  void begin() { done = false; }
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
  Kinds kinds;
  std::vector<std::int64_t> numel;
  std::vector<Layout> layouts;
  at::Tensor numel_on_device, group, counters, trust_ratio;
  Filed filed;
  bool captured = false;  // a graph reads it whenever it is replayed

  Tensors arrays() const {
    Tensors all = {numel_on_device, group, counters, trust_ratio};
    for (const Layout& layout : layouts) all.insert(all.end(), {layout.first_on_device, layout.row_of, layout.partial});
    return all;
  }
};

// How many a table keeps of those that no graph reads. An op has one or two: more come up where dtypes change from step to step.
constexpr std::size_t kPlans = 8;

class Table {
  // Runs an op on the table's device and torch's current stream there; says which table it was if that fails.
  template <class Op>
  auto guarded(const Op& op) {
    const at::NoGradGuard no_grad;
    const Tensors& weights = column("w");
    if (!weights.empty() && weights[0].defined()) device_ = weights[0].device();
    if (device_.type() != kDeviceType) throw py::type_error("the table is on " + device_.str() + ", for which there is no code here");
    try {
      const Session session(device_);
      follow_streams(session);
      return op(session);
    } catch (const py::builtin_exception&) {  // of the caller's doing, and says so
      throw;
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("looksam_kernels: " + std::string(error.what()) + " (table of " + std::to_string(rows()) +
                               " rows on " + device_.str() + ")");
    }
  }

 public:
  // device: of a table without rows; of any other it is that of its first parameter.
  Table(std::vector<int> group, const at::Device& device) : group_(std::move(group)), device_(device) {
    check_group_of_row(group_);
    if (device_.is_cuda() && !device_.has_index()) device_.set_index(0);
  }

  // tensors: None forgets the column.
  void set(const std::string& name, const std::optional<py::list>& tensors) {
    Column& column = columns_[name];
    column.filed.begin();
    column.tensors = absent_;
    if (tensors) column.tensors = column_of(name, *tensors, rows());
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
      const at::Tensor exact = numbers(session, values, "sums.values", pairs.size());
      Evaluation evaluation(*this, session, rule, groups, grad_scale, found_inf, max_grad_norm, lars);
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
        exact = numbers(session, known.attr("values"), "known.values", before.size());
      }
      const at::Tensor values = new_doubles(before.size() + pairs.size());
      double* const all = data<double>(values);
      Evaluation evaluation(*this, session, rule, groups, grad_scale, found_inf, max_grad_norm, lars);
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
      const at::Tensor c = numbers(session, d, "coefficients.d", inputs.size());

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
      check_groups(group_, groups);
      Tensors kept;
      std::vector<StepGroup> hyper;
      for (const py::handle group : groups) hyper.push_back(step_group(base, group, device_, kept));
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
      for (std::size_t k = 0; k < states.size(); ++k)
        lease.take(states[k].name, Access::write, with_state[k], /*optional=*/false, /*wide_only=*/true);
      if (writes_q) lease.take(writes, Access::write, updated);
      const Plan& plan = lease.plan();
      const at::Tensor d_exact = numbers(session, d, "coefficients.d", inputs.size());
      const at::Tensor q_exact = numbers(session, q, "coefficients.q", inputs.size());
      const at::Tensor post_exact = numbers(session, post, "coefficients.post", inputs.size());
      const at::Tensor trust_exact = numbers(session, trust, "coefficients.trust", 1);
      const at::Tensor inf = flag(session, found_inf, "found_inf");

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
      if (base != Base::grad) args.count = scalars(session, "step", at::kFloat, Access::write, updated);
      if (writes_q) {
        args.written = lease.column(writes);
        args.written_norm_sq = scalars(session, writes + "_norm_sq", at::kDouble, Access::write, RowFlags(rows()));
      }
      launch_step(session, plan, args, hyper, moved);
      lease.give_back();
    });
  }

  void restore(py::list moved) {
    guarded([&](const Session& session) {
      RowFlags written(rows());
      for (std::size_t row = 0; row < rows(); ++row) written[row] = is_true(moved[row]);
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

  // The device memory that outlives an op.
  py::list arrays() const {
    py::list all;
    const auto append = [&](const at::Tensor& x) {
      if (x.defined()) all.append(wrap(x));
    };
    for (const auto& [name, column] : columns_) append(column.on_device);
    for (const Plan& plan : plans_)
      for (const at::Tensor& array : plan.arrays()) append(array);
    append(eta_on_device_);
    return all;
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

  // Once a second stream has come up, all device memory that an op uses is recorded with the stream that it runs on: torch's
  // allocator knows only the stream for which the memory was made. Sums and coefficients, too, pass from op to op.
  void follow_streams(const Session& session) {
    if (!first_stream_) first_stream_ = session.stream;
    several_streams_ = several_streams_ || *first_stream_ != session.stream;
  }

  void use(const Session& session, const at::Tensor& x) const {
    if (several_streams_ && x.defined()) session.record(x);
  }

  // A column's addresses on the device.
  Ref* on_device(const Session& session, const std::string& name, const std::vector<std::uint64_t>& refs) {
    Column& column = columns_[name];
    Ref* const array = room_for(session, column);
    if (!is_filed(session, name, refs)) {
      column.filed.begin();
      file(session, column.on_device, refs);
      column.refs = refs;
      column.filed.now(session);
    }
    return array;
  }

  bool is_filed(const Session& session, const std::string& name, const std::vector<std::uint64_t>& refs) {
    const Column& column = columns_[name];
    const auto col = column_named(name);
    const bool outlives_the_step = !col || !is_scaled(*col);
    return column.filed.holds(session, outlives_the_step) && column.refs == refs;
  }

  Ref* room_for(const Session& session, Column& column) {
    if (column.tensors.empty()) column.tensors = absent_;
    if (!column.on_device.defined()) column.on_device = new_array<std::uint64_t>(rows());
    use(session, column.on_device);
    return data<Ref>(column.on_device);
  }

  // A column of scalars. needed: the rows that must have one.
  const Ref* scalars(const Session& session, const std::string& name, at::ScalarType dtype, Access access, const RowFlags& needed) {
    std::vector<std::uint64_t> refs(rows());
    const Tensors& tensors = column(name);
    for (std::size_t row = 0; row < rows(); ++row) {
      const at::Tensor& x = tensors[row];
      if (!x.defined()) {
        if (needed[row]) throw py::value_error("row " + std::to_string(row) + " takes part, but has no '" + name + "'");
        continue;
      }
      if (x.device() != device_) throw py::type_error(Where(name, row) + ": on " + x.device().str() + ", not on " + device_.str());
      if (x.scalar_type() != dtype)
        throw py::type_error(Where(name, row) + ": " + toString(x.scalar_type()) + " is not supported; it must be " + toString(dtype));
      if (x.numel() != 1) throw py::value_error(Where(name, row) + ": " + std::to_string(x.numel()) + " elements, not one");
      refs[row] = address_of(x, access, name, row);
    }
    return on_device(session, name, refs);
  }

  // Written elements must be this tensor's own: another may share them until then (copy on write).
  static std::uint64_t address_of(const at::Tensor& x, Access access, const std::string& name, std::size_t row) {
    require_memory(x, Where(name, row));
    if (access == Access::write && !x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
    return reinterpret_cast<std::uint64_t>(access == Access::write ? x.mutable_data_ptr() : x.const_data_ptr());
  }

  // The columns of one op. Tensors in another order than their row's, or of a type in which the row's kernel does not read
  // them, are read from and written to a copy.
  class Lease {
   public:
    Lease(Table& table, const Session& session) : table_(table), session_(session) {}

    // rows: those that are read or written, the same for each use of a column; they must all have a tensor, unless that is
    // optional. wide_only: their kernel reads no other type, as of the base's states.
    void take(const std::string& name, Access access, const RowFlags& rows, bool optional = false, bool wide_only = false) {
      const Tensors &tensors = table_.column(name), &weights = table_.column("w");
      for (std::size_t row = 0; row < rows.size(); ++row) {
        if (tensors[row].defined()) {
          check_tensor(tensors[row], weights[row], table_.device_, name, row);
        } else if (rows[row] && !optional) {
          throw py::value_error(Where(name, row) + ": takes part, but has no tensor");
        }
      }
      Taken* const before = of(name);
      if (before == nullptr) {
        taken_.push_back({name, access, rows, wide_only, {}});
      } else if (access == Access::write) {
        before->access = access;
      }
    }

    // Which kernel each row needs: after the last take().
    Plan& plan() {
      Kinds kinds(table_.rows(), Kind::f32);
      const Tensors& weights = table_.column("w");
      const Tensors& masters = table_.column("b");
      for (std::size_t row = 0; row < kinds.size(); ++row) {
        const at::ScalarType w = weights[row].scalar_type();
        if (w == at::kBFloat16) kinds[row] = Kind::bf16;
        if (w == at::kHalf) kinds[row] = Kind::f16;
        if (w == at::kDouble || (masters[row].defined() && masters[row].scalar_type() == at::kDouble)) kinds[row] = Kind::f64;
      }
      for (const Taken& taken : taken_) {
        if (taken.wide_only) continue;
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
      bool wide_only;
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
        const bool known = dtype == wide(kinds[row]) || (!taken.wide_only && dtype == narrow(kinds[row]));
        at::Tensor copy;
        if (!known || !in_row_order(x, weights[row])) {
          if (!taken.rows[row]) continue;
          // Every kernel knows float, if not for its states.
          const at::ScalarType other = taken.wide_only ? scalar_type(wide(kinds[row])) : at::kFloat;
          copy = empty_in_row_order(weights[row], x.options().dtype(known ? x.scalar_type() : other));
          copy.copy_(x);
          (taken.access == Access::write ? copies_ : alive_).emplace_back(x, copy);
        }
        const at::Tensor& used = copy.defined() ? copy : x;
        const Access access = taken.rows[row] ? taken.access : Access::read;
        const std::uint64_t address = address_of(used, access, taken.name, row);
        if (address >> 48 != 0) throw std::runtime_error("an address of more than 48 bits");
        const bool is_narrow = used.scalar_type() != scalar_type(wide(kinds[row]));
        taken.refs[row] = (x.numel() == 0 ? kNowhere : address) | static_cast<std::uint64_t>(is_narrow);
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

    Evaluation(const Table& table, const Session& session, const std::string& name, py::handle group_list, py::handle grad_scale,
               py::handle found_inf, py::handle max_grad_norm, bool lars) {
      check_groups(table.group_, group_list);
      args.evaluate = true;
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

  // A float on the device; undefined for None.
  at::Tensor flag(const Session& session, py::handle object, const char* name) const {
    if (object.is_none()) return {};
    const at::Tensor x = unpack(object).to(device_, at::kFloat);
    require_memory(x, name);
    if (x.numel() != 1) throw py::value_error(std::string(name) + " has " + std::to_string(x.numel()) + " elements, not one");
    use(session, x);
    return x;
  }

  // [lists, rows]; undefined for None.
  at::Tensor numbers(const Session& session, py::handle object, const char* name, std::size_t lists) const {
    if (object.is_none()) return {};
    const at::Tensor exact = to_numbers(object, name, lists * rows(), device_);
    use(session, exact);
    return exact;
  }

  // NaN in rows where T = 1; null where it is 1 in all.
  const double* to_eta(const Session& session, py::handle adaptive) {
    if (adaptive.is_none()) return nullptr;
    std::vector<double> eta;
    for (const py::handle value : adaptive) eta.push_back(value.is_none() ? std::nan("") : number(value, "adaptive"));
    if (eta.size() != rows()) throw py::value_error("adaptive does not have one entry a row");
    const auto same = [](double x, double y) { return x == y || (x != x && y != y); };
    if (!eta_filed_.holds(session, true) || !std::equal(eta.begin(), eta.end(), eta_.begin(), eta_.end(), same)) {
      if (!eta_on_device_.defined()) eta_on_device_ = new_array<double>(rows());
      eta_filed_.begin();
      file(session, eta_on_device_, eta);
      eta_ = std::move(eta);
      eta_filed_.now(session);
    }
    use(session, eta_on_device_);
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
    auto known = std::find_if(plans_.begin(), plans_.end(), [&](const Plan& x) { return x.kinds == kinds && x.numel == numel; });
    if (known == plans_.end()) known = plans_.insert(plans_.begin(), new_plan(kinds, std::move(numel)));
    plans_.splice(plans_.begin(), plans_, known);
    forget_old_plans();
    Plan& plan = plans_.front();
    plan.captured = plan.captured || session.capture != 0;
    for (const at::Tensor& array : plan.arrays()) use(session, array);
    if (!plan.filed.holds(session, true)) {
      plan.filed.begin();
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

  void forget_old_plans() {
    std::size_t eager = 0;
    plans_.remove_if([&](const Plan& plan) { return !plan.captured && ++eager > kPlans; });
  }

  Plan new_plan(const Kinds& kinds, std::vector<std::int64_t> numel) const {
    Plan plan;
    plan.kinds = kinds;
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
    // The first operand that is not filed travels with this launch, which files it.
    std::string carried;
    for (std::size_t k = 0; k < operands.size() && args.filed == nullptr; ++k) {
      const std::string name = column_of(operands[k]);
      if (is_filed(session, name, lease.refs(name))) continue;
      carried = name;
      columns_[name].filed.begin();
      args.filed = room_for(session, columns_[name]);
      args.carried = static_cast<std::int32_t>(k);
    }
    const auto place = [&](const std::string& name) -> const Ref* { return name == carried ? args.filed : lease.column(name); };
    for (std::size_t k = 0; k < operands.size(); ++k) {
      args.operand[k] = place(column_of(operands[k]));
      if (operands[k] == "Tg") {
        args.adaptive = static_cast<std::int32_t>(k);
        args.eta = to_eta(session, adaptive);
        if (args.eta == nullptr) args.adaptive = -1;
        args.w = place("w");
      }
    }
    if (args.cached_value != nullptr) {
      args.cached = scalars(session, "q_norm_sq", at::kDouble, Access::read, RowFlags(rows()));
      args.cached_if = place("g");
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
        const auto& refs = lease.refs(carried);
        for (std::int32_t row = 0; row < window.rows.count; ++row) {
          launch.column.low[row] = static_cast<std::uint32_t>(refs[window.rows.first + row]);
          launch.column.high[row] = static_cast<std::uint16_t>(refs[window.rows.first + row] >> 32);
        }
      }
      cuda::sums(window.kind, window.chunks, launch, rule != nullptr ? static_cast<int>(groups.size()) : 0, session.stream);
    }
    if (args.filed != nullptr) {
      columns_[carried].refs = lease.refs(carried);
      columns_[carried].filed.now(session);
    }
  }

  std::vector<int> group_;
  Tensors absent_ = Tensors(group_.size());
  at::Device device_;
  std::unordered_map<std::string, Column> columns_;
  std::list<Plan> plans_;  // the last used first
  std::vector<double> eta_;
  at::Tensor eta_on_device_;
  Filed eta_filed_;
  std::optional<Stream> first_stream_;
  bool several_streams_ = false;
};

// A GPU on which these kernels do not run has a reason, which the driver knows best: the code in this build is for others, the
// driver is too old for its PTX.
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
      .def(py::init([](std::vector<int> group, const std::string& device) { return Table(std::move(group), at::Device(device)); }))
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
  module.def("use_stream", [](std::uintptr_t stream) { looksam::cuda::harness_stream = reinterpret_cast<looksam::cuda::Stream>(stream); });
  module.def("use_capture", [](unsigned long long capture) { looksam::cuda::harness_capture = capture; });
  module.def("recorded", [] { return looksam::cuda::harness_recorded; });
#endif
}
