// Have an optimizer's groups, weights and state changed since they were last read? Asked several times a step, so
// without hashing a tensor (Python would, in each state[p]) and without calling into Python. Twin:
// looksam_kernels/snapshot.py.

#include "snapshot.h"

#include <ATen/record_function.h>
#include <c10/util/DimVector.h>

#include <algorithm>

namespace looksam {
namespace {

enum Change { kParams = 1, kPlaces = 2, kState = 4, kContents = 8 };

// Where a tensor lives and how its elements lie there. Never reads the memory: some tensors have none.
struct Place {
  const void* data;
  at::ScalarType dtype;
  at::Device device;
  c10::DimVector sizes, strides;

  explicit Place(const at::Tensor& x)
      : data(address(x)), dtype(x.scalar_type()), device(x.device()), sizes(x.sizes()), strides(x.strides()) {}

  bool holds(const at::Tensor& x) const {
    return x.layout() == at::kStrided && data == address(x) && dtype == x.scalar_type() && device == x.device() &&
           x.sizes() == c10::IntArrayRef(sizes) && x.strides() == c10::IntArrayRef(strides);
  }

  static const void* address(const at::Tensor& x) {
    if (!x.has_storage()) return nullptr;
    const auto* start =
        static_cast<const char*>(x.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get());
    return start == nullptr ? nullptr : start + x.storage_offset() * static_cast<std::int64_t>(x.dtype().itemsize());
  }
};

// The items of a list or tuple, borrowed for as long as this lives.
class Items {
 public:
  explicit Items(py::handle sequence)
      : fast_(py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "expected a list"))) {
    if (!fast_) throw py::error_already_set();
  }
  std::size_t size() const { return static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast_.ptr())); }
  py::handle operator[](std::size_t i) const {
    return PySequence_Fast_GET_ITEM(fast_.ptr(), static_cast<Py_ssize_t>(i));
  }

 private:
  py::object fast_;
};

class Snapshot {
 public:
  // entries: the names in a parameter's state that are followed. contents: tensors that nobody else may write unseen.
  // Everything compared is kept alive, so that no address can come back as that of another object.
  Snapshot(py::handle groups, py::handle state, py::handle weights, const std::vector<std::string>& entries,
           py::handle contents) {
    const Items all(groups);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const Items items(item(all[i], "params"));
      std::vector<py::object>& params = params_.emplace_back();
      for (std::size_t k = 0; k < items.size(); ++k) params.push_back(py::reinterpret_borrow<py::object>(items[k]));
    }
    const Items tensors(weights);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      tensors_.push_back(unpack(tensors[i]));
      places_.emplace_back(tensors_.back());
    }
    read(state, entries);
    const Items all_contents(contents);
    for (std::size_t i = 0; i < all_contents.size(); ++i) contents_.push_back(unpack(all_contents[i]));
    written();
  }

  // To be called after our own writes to the contents.
  void written() {
    versions_.clear();
    for (const at::Tensor& x : contents_) versions_.push_back(version_of(x));
  }

  // weights: those of now where they are not the parameters themselves, else None.
  int changes(py::handle groups, py::handle state, py::handle weights) const {
    return (same_params(groups) ? 0 : kParams) | (same_places(weights) ? 0 : kPlaces) |
           (same_state(state) ? 0 : kState) | (same_contents() ? 0 : kContents);
  }

 private:
  struct Entry {
    py::object name, value;  // no value where the entry is not followed
  };
  struct StateOfParam {
    py::object key, state;  // no state where the key is not a parameter
    std::size_t end;        // of its entries, which begin where those of the one before end
  };

  void read(py::handle state, const std::vector<std::string>& followed) {
    PyObject *key, *inner, *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &inner);) {
      const bool of_param = THPVariable_Check(key);  // a class may keep anything under other keys
      for (Py_ssize_t in = 0; of_param && PyDict_Next(inner, &in, &name, &value);) {
        const bool follow =
            PyUnicode_Check(name) && std::any_of(followed.begin(), followed.end(), [&](const std::string& x) {
              return PyUnicode_CompareWithASCIIString(name, x.c_str()) == 0;
            });
        entries_.push_back({borrowed(name), follow ? borrowed(value) : py::object()});
      }
      state_.push_back({borrowed(key), of_param ? borrowed(inner) : py::object(), entries_.size()});
    }
  }

  bool same_params(py::handle groups) const {
    const Items all(groups);
    if (all.size() != params_.size()) return false;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const Items items(item(all[i], "params"));
      if (items.size() != params_[i].size()) return false;
      for (std::size_t k = 0; k < items.size(); ++k)
        if (!items[k].is(params_[i][k])) return false;
    }
    return true;
  }

  bool same_places(py::handle weights) const {
    if (weights.is_none()) {
      for (std::size_t i = 0; i < places_.size(); ++i) {
        prefetch_after(tensors_, i);
        if (!places_[i].holds(tensors_[i])) return false;
      }
      return true;
    }
    const Items tensors(weights);
    if (tensors.size() != places_.size()) return false;
    for (std::size_t i = 0; i < places_.size(); ++i)
      if (!places_[i].holds(unpack(tensors[i]))) return false;
    return true;
  }

  bool same_state(py::handle state) const {
    if (!PyDict_Check(state.ptr()) || static_cast<std::size_t>(PyDict_Size(state.ptr())) != state_.size()) return false;
    PyObject *key, *inner, *name, *value;
    std::size_t row = 0, entry = 0;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &inner); ++row) {
      if (state_[row].key.ptr() != key) return false;
      if (!state_[row].state) continue;
      if (state_[row].state.ptr() != inner) return false;
      if (entry + static_cast<std::size_t>(PyDict_Size(inner)) != state_[row].end) return false;
      for (Py_ssize_t in = 0; PyDict_Next(inner, &in, &name, &value); ++entry) {
        const Entry& before = entries_[entry];
        if (before.name.ptr() != name || (before.value && before.value.ptr() != value)) return false;
      }
    }
    return true;
  }

  bool same_contents() const {
    for (std::size_t i = 0; i < contents_.size(); ++i)
      if (version_of(contents_[i]) != versions_[i]) return false;
    return true;
  }

  static py::object borrowed(PyObject* x) { return py::reinterpret_borrow<py::object>(x); }

  std::vector<std::vector<py::object>> params_;
  Tensors tensors_;
  std::vector<Place> places_;
  std::vector<StateOfParam> state_;
  std::vector<Entry> entries_;
  std::vector<at::Tensor> contents_;
  std::vector<std::uint32_t> versions_;
};

// Of a list or tuple, undefined where it has None.
Tensors tensors_in(py::handle sequence) {
  const Items items(sequence);
  Tensors tensors(items.size());
  for (std::size_t i = 0; i < items.size(); ++i)
    if (!items[i].is_none()) tensors[i] = unpack(items[i]);
  return tensors;
}

// p.grad of each, None where there is none.
py::list gradients(py::handle params) {
  const Items items(params);
  py::list found(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) found[i] = wrap(unpack(items[i]).grad());
  return found;
}

void clear_gradients(py::handle params) {
  const Items items(params);
  for (std::size_t i = 0; i < items.size(); ++i) {
    const at::Tensor& p = unpack(items[i]);
    if (p.grad().defined()) p.mutable_grad().reset();
  }
}

}  // namespace

bool any_shared(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& x) { return x.defined() && x.has_storage() && x.storage().use_count() > 1; });
}

int first_same_place(const Tensors& tensors, const Tensors& others) {
  for (std::size_t i = 0; i < std::min(tensors.size(), others.size()); ++i) {
    if (!tensors[i].defined() || !others[i].defined()) continue;
    const void* place = Place::address(tensors[i]);
    if (place != nullptr && place == Place::address(others[i])) return static_cast<int>(i);
  }
  return -1;
}

void bind_snapshot(py::module_& module) {
  py::class_<Snapshot>(module, "Snapshot")
      .def(py::init<py::handle, py::handle, py::handle, const std::vector<std::string>&, py::handle>())
      .def("changes", &Snapshot::changes)
      .def("written", &Snapshot::written);
  module.def("gradients", &gradients);
  module.def("clear_gradients", &clear_gradients);
  module.def("has_observers", &at::hasCallbacks);  // profilers, and whoever else listens to torch's operations
  module.def("any_shared", [](py::handle x) { return any_shared(tensors_in(x)); });
  module.def("first_same_place",
             [](py::handle x, py::handle y) { return first_same_place(tensors_in(x), tensors_in(y)); });
}

}  // namespace looksam
