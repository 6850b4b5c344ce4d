// What both bindings read from Python: tensors, numbers, names and hyper-parameters. No arithmetic in here.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "../core/formulas.h"

namespace py = pybind11;

namespace looksam {

using Pair = std::pair<std::string, std::string>;
using Tensors = std::vector<at::Tensor>;  // undefined where a row has none
using RowFlags = std::vector<char>;       // one flag a row

inline const at::Tensor& unpack(py::handle object) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("expected a torch.Tensor");
  return THPVariable_Unpack(object.ptr());
}

// None for an undefined tensor.
inline py::object wrap(const at::Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

// Which tensor a message is about: checks pass it along for every row of every op, and spell it out only in an error.
class Where {
 public:
  Where(const char* what) : name_(what) {}
  Where(std::string_view column, std::size_t row) : name_(column), row_(static_cast<std::ptrdiff_t>(row)) {}

  friend std::string operator+(const Where& where, const std::string& text) {
    const std::string name(where.name_);
    return (where.row_ < 0 ? name : "column '" + name + "', row " + std::to_string(where.row_)) + text;
  }

 private:
  std::string_view name_;
  std::ptrdiff_t row_ = -1;
};

// As x.itemsize(), which is a call.
C10_ALWAYS_INLINE std::size_t size_of_element(const c10::TensorImpl& x) {
  return c10::elementSize(c10::typeMetaToScalarType(x.dtype()));
}

// The storage of nearly all tensors: of torch's own dense ones on the CPU, with nothing between them and their
// elements, which are all there. Null for the others. Asked of every tensor by every op, so without the calls that the
// others need.
C10_ALWAYS_INLINE c10::StorageImpl* plain_storage(const c10::TensorImpl& x) {
  const std::uint64_t plain = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                                   c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU})
                                  .raw_repr();
  if ((x.key_set().raw_repr() & ~plain) != 0 || !x.is_non_overlapping_and_dense()) return nullptr;
  c10::StorageImpl* const storage = x.unsafe_storage().unsafeGetStorageImpl();
  if (storage == nullptr || storage->_mutable_data_ptr_no_checks().get() == nullptr) return nullptr;
  const auto end = static_cast<std::size_t>(x.storage_offset() + x.numel()) * size_of_element(x);
  return storage->nbytes() >= end ? storage : nullptr;
}

// Asks the memory for what the walks over a column read of the tensors that come next: of thousands nothing is in the
// cache, and each would be waited for. First the tensor, then, once that is there, its storage, then a number.
inline constexpr std::size_t kTensorAhead = 12, kStorageAhead = 6, kNumberAhead = 3;
inline constexpr std::size_t kMany = 512;  // what is asked of fewer is in the cache

C10_ALWAYS_INLINE void prefetch(const void* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}
C10_ALWAYS_INLINE c10::StorageImpl* storage_of(const at::Tensor& x) {
  return x.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}
C10_ALWAYS_INLINE void prefetch_tensor(const at::Tensor& x) {
  prefetch(x.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
}
C10_ALWAYS_INLINE void prefetch_storage(const at::Tensor& x) {
  if (const auto* storage = storage_of(x)) prefetch(storage, sizeof(c10::StorageImpl));
}

C10_ALWAYS_INLINE void prefetch_after(const Tensors& tensors, std::size_t row) {
  if (tensors.size() < kMany) return;
  if (row + kTensorAhead < tensors.size()) prefetch_tensor(tensors[row + kTensorAhead]);
  if (row + kStorageAhead < tensors.size()) prefetch_storage(tensors[row + kStorageAhead]);
}

// Of a column of 0-dim tensors.
C10_ALWAYS_INLINE void prefetch_numbers_after(const Tensors& tensors, std::size_t row) {
  prefetch_after(tensors, row);
  if (tensors.size() < kMany || row + kNumberAhead >= tensors.size()) return;
  if (auto* const storage = storage_of(tensors[row + kNumberAhead]))
    __builtin_prefetch(storage->_mutable_data_ptr_no_checks().get());
}

// The first element of a tensor with plain storage, to be read or to be written; null for others.
C10_ALWAYS_INLINE const void* plain_elements(const c10::TensorImpl& x) {
  const c10::StorageImpl* const storage = plain_storage(x);
  if (storage == nullptr) return nullptr;
  return static_cast<const char*>(storage->data()) + static_cast<std::size_t>(x.storage_offset()) * size_of_element(x);
}

C10_ALWAYS_INLINE void* plain_elements_to_write(const c10::TensorImpl& x) {
  c10::StorageImpl* const storage = plain_storage(x);
  if (storage == nullptr) return nullptr;
  return static_cast<char*>(storage->mutable_data()) +
         static_cast<std::size_t>(x.storage_offset()) * size_of_element(x);
}

// How often a tensor has been written; an inference tensor does not count.
inline std::uint32_t version_of(const at::Tensor& x) {
  return x.is_inference() ? 0 : x.unsafeGetTensorImpl()->version_counter().current_version();
}

// Have two tensors with plain storage the same shape, and their elements in the same order?
C10_ALWAYS_INLINE bool alike(const c10::TensorImpl& x, const c10::TensorImpl& w) {
  const auto equal = [](c10::IntArrayRef a, c10::IntArrayRef b) {  // a loop: memcmp costs more for one to four numbers
    bool same = a.size() == b.size();
    for (std::size_t i = 0; same && i < a.size(); ++i) same = a[i] == b[i];
    return same;
  };
  return &x == &w ||
         (equal(x.sizes(), w.sizes()) && ((x.is_contiguous() && w.is_contiguous()) || equal(x.strides(), w.strides())));
}

// Does memory hold the elements of x, on the device that it says? That of FakeTensors and of wrappers around other
// tensors does not, and a storage may have been resized to nothing.
inline bool has_memory(const at::Tensor& x) {
  if (plain_storage(*x.unsafeGetTensorImpl()) != nullptr) return true;
  if (!x.has_storage()) return false;
  const c10::Storage& storage = x.unsafeGetTensorImpl()->unsafe_storage();
  if (storage.device_type() != x.device().type() || x._is_zerotensor()) return false;
  const auto offset = static_cast<std::size_t>(x.storage_offset()), count = static_cast<std::size_t>(x.numel());
  if (count == 0) return true;
  try {
    if (storage.data() == nullptr) return false;
  } catch (const c10::Error&) {  // a storage whose data may not be accessed
    return false;
  }
  return storage.nbytes() >= (x.is_contiguous()
                                  ? (offset + count) * x.itemsize()
                                  : at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.itemsize(), offset));
}

// The elements of x, which C++ is about to read or write there. what: which tensor it is, for the message.
inline void require_memory(const at::Tensor& x, const Where& what) {
  if (!has_memory(x))
    throw py::type_error(
        what + " has no memory on " + x.device().str() +
        ": it is a FakeTensor or wraps another tensor, or its storage was freed; backend=\"reference\" takes all "
        "tensors that PyTorch can compute with");
}

// A tensor on the device, whose value the host must not read.
inline bool is_remote(py::handle object) {
  return THPVariable_Check(object.ptr()) && !THPVariable_Unpack(object.ptr()).is_cpu();
}

// Numbers, and tensors on the host that hold one.
inline double number(py::handle object, const char* name) {
  if (is_remote(object))
    throw py::type_error(
        std::string(name) + " is a tensor on " + unpack(object).device().str() +
        ", which the host would have to wait for: give a number or a CPU tensor. Only lr may be on the device of "
        "the parameters, and only of CUDA parameters");
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline bool is_true(py::handle object) {
  const int truth = PyObject_IsTrue(object.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

// The flags of a list, one a row.
inline RowFlags flags_of(const py::list& list, std::size_t rows) {
  if (list.size() != rows) throw py::value_error("a list of flags that does not fit the table");
  RowFlags flags(rows);
  for (std::size_t row = 0; row < rows; ++row)
    flags[row] = is_true(PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(row)));
  return flags;
}

// The Python string of a name, made once, as every op looks dozens of them up in every group. name: of static storage.
inline py::handle key(const char* name, const char* prefix = "") {
  static std::unordered_map<const void*, PyObject*> keys[2];  // by address, without prefix and with; never let go
  PyObject*& known = keys[*prefix != 0][name];
  if (known == nullptr) known = PyUnicode_InternFromString((prefix + std::string(name)).c_str());
  if (known == nullptr) throw py::error_already_set();
  return known;
}

// Null where the group has no such name.
inline py::object item_or_null(py::handle group, py::handle name) {
  if (PyDict_CheckExact(group.ptr())) {
    PyObject* value = PyDict_GetItemWithError(group.ptr(), name.ptr());
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(value);
  }
  PyObject* value = PyObject_GetItem(group.ptr(), name.ptr());
  if (value == nullptr && !PyErr_ExceptionMatches(PyExc_KeyError)) throw py::error_already_set();
  if (value == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(value);
}

inline py::object item(py::handle group, const char* name) {
  py::object value = item_or_null(group, key(name));
  if (!value) throw py::key_error(name);
  return value;
}

inline py::object item_or(py::handle group, const char* name, py::object otherwise) {
  py::object value = item_or_null(group, key(name));
  return value ? value : otherwise;
}

inline double number_in(py::handle group, const char* name) { return number(item(group, name), name); }

// A hyper-parameter of the base: base.<name> in groups whose variant has one of the same name.
inline py::object own(py::handle group, const char* name) {
  py::object renamed = item_or_null(group, key(name, "base."));
  return renamed ? renamed : item(group, name);
}

inline const RuleInfo& rule_named(const std::string& name) {
  for (const RuleInfo& rule : kRules)
    if (name == rule.name) return rule;
  throw py::value_error("unknown rule '" + name + "'");
}

inline Base base_named(const std::string& name) {
  std::optional<Base> found;
  for_each_base([&](const char* known, Base base) {
    if (name == known) found = base;
  });
  if (!found) throw py::value_error("unknown base '" + name + "'");
  return *found;
}

inline std::vector<State> states_of_base(Base base) {
  if (base == Base::grad) return {};
  return with_update(base, [](auto update) {
    using Update = decltype(update);
    return std::vector<State>(std::begin(Update::state), std::end(Update::state));
  });
}

// Those that have their formula in C++; the others are formulas.py's.
inline std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const RuleInfo& rule : kRules) names.emplace_back(rule.name);
  return names;
}

inline std::optional<Col> column_named(const std::string& name) {
  for (int i = 0; i < kCols; ++i)
    if (name == kColNames[i]) return Col(i);
  return std::nullopt;
}

// Of a virtual column Tx, T times x: x; of another itself.
inline std::string without_stretch(const std::string& name) { return name[0] == 'T' ? name.substr(1) : name; }

// What an op is given as `adaptive`: a preconditioning.Preconditioner, ASAM's eta of each row, or None.
inline bool is_preconditioner(py::handle adaptive) { return py::hasattr(adaptive, "numbers"); }
inline constexpr std::size_t kPreconditionerNumbers = 4;

// Which operand's column is the g of a preconditioner; -1 where none is stretched.
inline int operand_of_gradient(const std::vector<std::string>& operands) {
  int gradient = -1;
  bool any_stretched = false;
  for (std::size_t k = 0; k < operands.size(); ++k) {
    if (without_stretch(operands[k]) == "g") gradient = static_cast<int>(k);
    any_stretched = any_stretched || without_stretch(operands[k]) != operands[k];
  }
  if (any_stretched && gradient < 0)
    throw py::value_error("a preconditioner's T is made of g: take the sums of Tg together with those of other Tx");
  return any_stretched ? gradient : -1;
}

inline RowHyper rule_hyper(const RuleInfo& rule, py::handle group) {
  RowHyper h = {};
  for (const ParameterField& parameter : kParameters)
    if (rule.reads & parameter.bit) h.*parameter.field = number_in(group, parameter.name);
  h.sign = is_true(item_or(group, "maximize", py::bool_(false))) ? -1 : 1;
  return h;
}

inline LarsHyper lars_hyper(py::handle group) {
  LarsHyper h = {};
  h.trust_coefficient = number(own(group, "trust_coefficient"), "trust_coefficient");
  h.weight_decay = number(own(group, "weight_decay"), "weight_decay");
  h.eps = number(own(group, "eps"), "eps");
  h.trust_clip = is_true(own(group, "trust_clip"));
  if (h.trust_clip) h.lr = number_in(group, "lr");
  h.adapts = h.weight_decay != 0 || is_true(own(group, "always_adapt"));
  return h;
}

// What the base reads, but lr.
inline BaseHyper base_hyper(Base base, py::handle group) {
  BaseHyper h = {};
  if (base == Base::grad) return h;
  with_update(base, [&](auto update) {
    for (const Option& option : decltype(update)::reads) {
      py::object value = own(group, option.name);
      if (option.index >= 0) value = py::tuple(value)[option.index];
      if (option.number != nullptr) h.*option.number = number(value, option.name);
      if (option.flag != nullptr) h.*option.flag = is_true(value);
    }
  });
  return h;
}

// What all groups share; without the loss scale.
inline CommonHyper common_hyper(py::handle groups, py::handle max_grad_norm) {
  CommonHyper common = {1, 0, -1, false};
  if (py::len(groups) > 0) {
    const py::object first = groups[py::int_(0)];
    common.perturb_eps = number(item_or(first, "perturb_eps", py::float_(0.0)), "perturb_eps");
    common.tensor_scope = py::str("tensor").equal(item_or(first, "norm_scope", py::none()));
  }
  if (!max_grad_norm.is_none()) common.max_grad_norm = number(max_grad_norm, "max_grad_norm");
  return common;
}

inline std::optional<Dtype> dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: return std::nullopt;
  }
}

// Do the elements of x lie in the row's memory order: that of w where w is dense, else the contiguous one? Not those of
// a view whose minus sign has still to be applied, nor zeros that are nowhere.
inline bool in_row_order(const at::Tensor& x, const at::Tensor& w) {
  if (x.is_neg() || x._is_zerotensor()) return false;
  if (x.is_contiguous() && w.is_contiguous()) return true;
  if (!w.is_non_overlapping_and_dense()) return x.is_contiguous();
  for (std::int64_t i = 0; i < w.dim(); ++i)
    if (w.size(i) > 1 && x.stride(i) != w.stride(i)) return false;
  return true;
}

// A new tensor for the elements of a row, in that order.
inline at::Tensor empty_in_row_order(const at::Tensor& w, const at::TensorOptions& options) {
  return w.is_non_overlapping_and_dense() ? at::empty_strided(w.sizes(), w.strides(), options)
                                          : at::empty(w.sizes(), options);
}

// Is b the master copy of w, rather than a place to save it in?
inline bool is_master(const at::Tensor& b, const at::Tensor& w) {
  return b.defined() && b.scalar_type() != w.scalar_type();
}

// The one sum that is kept beside its column, in q_norm_sq: kept_norm() of formulas.py.
inline constexpr const char* kKeptNorm = "q_norm_sq";
inline bool is_kept_norm(const Pair& pair) { return pair.first == "q" && pair.second == "q"; }

inline void check_inputs(const std::vector<std::string>& inputs) {
  if (inputs.empty() || inputs.size() > kMaxInputs) throw py::value_error("one to three inputs are combined");
}

inline void check_group_of_row(const std::vector<int>& group) {
  for (std::size_t row = 0; row < group.size(); ++row)
    if (group[row] < 0)
      throw py::value_error("row " + std::to_string(row) + " is in group " + std::to_string(group[row]));
}

// Kernels index the groups by what stands in `group`.
inline void check_groups(const std::vector<int>& group, py::handle groups) {
  const auto count = static_cast<int>(py::len(groups));
  for (std::size_t row = 0; row < group.size(); ++row)
    if (group[row] >= count)
      throw py::value_error("row " + std::to_string(row) + " is in group " + std::to_string(group[row]) +
                            ", but there are only " + std::to_string(count) + " groups");
}

// A tensor on the table's device whose type the kernels know, at the shape that it had when the column was set.
inline Dtype check_tensor(const at::Tensor& x, const at::Tensor& w, const at::Device& device, const std::string& column,
                          std::size_t row) {
  if (x.device() != device)
    throw py::type_error(Where(column, row) + ": on " + x.device().str() + ", not on " + device.str());
  const std::optional<Dtype> dtype = dtype_of(x);
  if (!dtype) throw py::type_error(Where(column, row) + ": " + toString(x.scalar_type()) + " is not supported");
  if (x.sizes() != w.sizes())
    throw py::value_error(Where(column, row) + ": the shape has changed since the column was set");
  return *dtype;
}

// tensors: a list of tensors and None, one a row.
inline Tensors column_of(const std::string& name, const py::list& tensors, std::size_t rows) {
  Tensors column;
  for (const py::handle x : tensors) column.push_back(x.is_none() ? at::Tensor() : unpack(x));
  if (column.size() != rows) throw py::value_error("column '" + name + "' does not fit the table");
  for (std::size_t row = 0; name == "w" && row < rows; ++row)
    if (!column[row].defined()) throw py::type_error(Where(name, row) + ": a parameter is a tensor, not None");
  return column;
}

// Does x, a gradient or a state, plainly fit its parameter? table.py finds the words for what is wrong.
inline bool fits(const at::Tensor& x, const at::Tensor& w, bool scalar) {
  return x.layout() == at::kStrided && dtype_of(x) && x.device() == w.device() &&
         (scalar ? x.dim() == 0 : x.sizes() == w.sizes());
}

// Numbers that an op is given, float64 on the table's device, [count]. Of a table on the CPU they are read at once, so
// they must be there.
inline at::Tensor to_numbers(py::handle object, const char* name, std::size_t count, const at::Device& device) {
  const at::Tensor& given = unpack(object);
  if (device.is_cpu() && !given.is_cpu())
    throw py::type_error(std::string(name) + " is on " + given.device().str() +
                         ", but the table is on the CPU; TensorTable(device=...) says where an empty table is");
  const at::Tensor exact = given.to(device, at::kDouble).contiguous();
  if (exact.numel() != static_cast<std::int64_t>(count))
    throw py::value_error(std::string(name) + " has " + std::to_string(exact.numel()) + " numbers, not the " +
                          std::to_string(count) + " of this table's rows");
  require_memory(exact, name);
  return exact;
}

}  // namespace looksam
