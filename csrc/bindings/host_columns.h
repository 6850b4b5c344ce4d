// Tensors of a table on the CPU: the numbers in them, and the elements of a column for the length of one op.
#pragma once

#include <algorithm>

#include "../cpu/args.h"
#include "arguments.h"

namespace looksam {

inline const at::Device kHost(at::kCPU);

// New tensors of this file's own. While FakeTensorMode is on, torch makes fake ones.
inline double* doubles(const at::Tensor& x) {
  require_memory(x, "a new tensor");
  return static_cast<double*>(x.mutable_data_ptr());
}

// One number, which the host can reach.
inline void check_scalar(const at::Tensor& x, const Where& what) {
  if (!x.is_cpu())
    throw py::type_error(what + " is on " + x.device().str() +
                         ", but the table is on the CPU; TensorTable(device=...) says where an empty table is");
  require_memory(x, what);
  if (x.numel() != 1) throw py::value_error(what + " has " + std::to_string(x.numel()) + " elements, not one");
}

inline double read_scalar(const at::Tensor& x, const Where& what) {
  const c10::TensorImpl& impl = *x.unsafeGetTensorImpl();
  const void* const number = impl.numel() == 1 ? plain_elements(impl) : nullptr;
  if (number != nullptr && x.scalar_type() == at::kFloat) return *static_cast<const float*>(number);
  if (number != nullptr && x.scalar_type() == at::kDouble) return *static_cast<const double*>(number);
  check_scalar(x, what);
  return x.item().toDouble();
}

inline bool holds_true(py::handle found_inf) { return read_scalar(unpack(found_inf), "found_inf") > 0; }

inline void bump_version(const at::Tensor& x) {
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
    for (std::size_t row = begin; row < end && tensors.size() >= kMany; ++row)
      if (takes_part(row)) seen = version_of(tensors[row]);
    for (std::size_t row = begin; row < end; ++row)
      if (takes_part(row)) bump_version(tensors[row]);
  }
}

// x has been checked.
inline void write_scalar(const at::Tensor& x, double value) {
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

}  // namespace looksam
