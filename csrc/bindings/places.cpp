// Where the tensors of a column are, and whether that has changed: for the Triton backend, which takes their addresses
// to the device. Gradients are new in every step, so all of a column is looked at in one call. Twin:
// looksam_kernels/backends/triton/places.py.

#include "places.h"

#include "arguments.h"

namespace looksam {
namespace {

enum Difference { kSame = 0, kMoved = 1, kOther = 2 };

class Places {
 public:
  // tensors: a list of tensors and None, one a row. -> kMoved if only addresses differ from those seen before, by
  // multiples of 16 bytes; kOther if element types, strides or rows do.
  int look(const py::list& tensors) {
    taken_.clear();
    begin();
    for (const py::handle x : tensors) x.is_none() ? see_none() : see(unpack(x));
    return end();
  }

  // The same for p.grad of each, which is kept until `release`. -> the difference, and which rows have one: True where
  // all do, else a flag for each. None, and nothing is seen, where one does not plainly fit its parameter.
  py::object take(const py::list& params, const py::list& weights) {
    if (params.size() != weights.size()) throw py::value_error("parameters that do not fit the table");
    Tensors taken(params.size());
    std::size_t count = 0;
    for (std::size_t row = 0; row < taken.size(); ++row) {
      const auto at = static_cast<Py_ssize_t>(row);
      const at::Tensor& x = unpack(PyList_GET_ITEM(params.ptr(), at)).grad();
      if (!x.defined()) continue;
      if (!fits(x, unpack(PyList_GET_ITEM(weights.ptr(), at)), /*scalar=*/false)) return py::none();
      taken[row] = x;
      ++count;
    }
    begin();
    for (const at::Tensor& x : taken) x.defined() ? see(x) : see_none();
    taken_ = std::move(taken);
    const int difference = end();
    if (count == taken_.size()) return py::make_tuple(difference, true);
    py::list there;
    for (const at::Tensor& x : taken_) there.append(x.defined());
    return py::make_tuple(difference, there);
  }

  // Is one of these, a tensor a row, at another address than when it was looked at?
  bool moved(const py::list& tensors) const {
    if (tensors.size() != now_.addresses.size()) return true;
    for (std::size_t row = 0; row < tensors.size(); ++row) {
      const py::handle x = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(row));
      if (reinterpret_cast<std::intptr_t>(unpack(x).mutable_data_ptr()) != now_.addresses[row]) return true;
    }
    return false;
  }

  // Those that `take` has kept, None in rows without one.
  py::list tensors() const {
    py::list listed(taken_.size());
    for (std::size_t row = 0; row < taken_.size(); ++row) listed[row] = wrap(taken_[row]);
    return listed;
  }

  void release() { taken_.clear(); }

  // int64, 0 in rows without a tensor.
  py::bytes addresses() const {
    return {reinterpret_cast<const char*>(now_.addresses.data()), now_.addresses.size() * sizeof(std::int64_t)};
  }

 private:
  struct Seen {
    std::vector<std::int64_t> addresses, strides;
    std::vector<int> kinds;  // one a row, -1 without a tensor
  };

  void begin() {
    std::swap(now_, before_);
    now_.addresses.clear();
    now_.strides.clear();
    now_.kinds.clear();
  }

  void see(const at::Tensor& x) {
    // To be written, so that a lazy copy has memory of its own.
    const auto address = reinterpret_cast<std::intptr_t>(x.mutable_data_ptr());
    now_.addresses.push_back(address);
    now_.strides.insert(now_.strides.end(), x.strides().begin(), x.strides().end());
    const auto misaligned = static_cast<int>(address & 15);
    const int nowhere = address == 0, negated = x.is_neg(), dims = static_cast<int>(x.dim());
    now_.kinds.push_back(static_cast<int>(x.scalar_type()) << 16 | dims << 6 | negated << 5 | nowhere << 4 |
                         misaligned);
  }

  void see_none() {
    now_.addresses.push_back(0);
    now_.kinds.push_back(-1);
  }

  int end() {
    const bool first = !seen_any_;
    seen_any_ = true;
    if (first || now_.kinds != before_.kinds || now_.strides != before_.strides) return kOther;
    return now_.addresses == before_.addresses ? kSame : kMoved;
  }

  Seen now_, before_;
  bool seen_any_ = false;
  Tensors taken_;
};

}  // namespace

void bind_places(py::module_& module) {
  py::class_<Places>(module, "Places")
      .def(py::init<>())
      .def("look", &Places::look)
      .def("moved", &Places::moved)
      .def("take", &Places::take)
      .def("tensors", &Places::tensors)
      .def("release", &Places::release)
      .def("addresses", &Places::addresses);
}

}  // namespace looksam
