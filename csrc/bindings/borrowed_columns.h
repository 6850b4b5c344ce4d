// The columns of one op: checked, copied where a kernel could not work on them, uploaded.
#pragma once

#include <array>

#include "device_table.h"

namespace looksam::cuda {

// The columns of one op. Tensors in another order than their row's, or of a type in which the row's kernel does not
// read them, are read from and written to a copy.
class BorrowedColumns {
 public:
  BorrowedColumns(DeviceTable& table, const Session& session) : table_(table), session_(session) {}

  // rows: those that are read or written, the same for each use of a column; they must all have a tensor, unless that
  // is optional. wide_only: their kernel reads no other type, as of the base's states.
  void borrow(const std::string& name, Access access, const RowFlags& rows, bool optional = false,
              bool wide_only = false) {
    const Tensors &tensors = table_.column(name), &weights = table_.column("w");
    for (std::size_t row = 0; row < rows.size(); ++row) {
      prefetch_after(tensors, row);
      prefetch_after(weights, row);
      if (tensors[row].defined()) {
        check_tensor(tensors[row], weights[row], table_.device(), name, row);
      } else if (rows[row] && !optional) {
        throw py::value_error(Where(name, row) + ": takes part, but has no tensor");
      }
    }
    Borrowed* const before = of(name);
    if (before == nullptr) {
      borrowed_.push_back({name, access, rows, wide_only, {}});
    } else if (access == Access::write) {
      before->access = access;
    }
  }

  // Which kernel each row needs: after the last borrow().
  Arrangement& arrange() {
    Kinds kinds(table_.rows(), Kind::f32);
    const Tensors& weights = table_.column("w");
    const Tensors& masters = table_.column("b");
    for (std::size_t row = 0; row < kinds.size(); ++row) {
      prefetch_after(weights, row);
      const at::ScalarType w = weights[row].scalar_type();
      if (w == at::kBFloat16) kinds[row] = Kind::bf16;
      if (w == at::kHalf) kinds[row] = Kind::f16;
      if (w == at::kDouble || (masters[row].defined() && masters[row].scalar_type() == at::kDouble))
        kinds[row] = Kind::f64;
    }
    for (const Borrowed& borrowed : borrowed_) {
      if (borrowed.wide_only) continue;
      const Tensors& tensors = table_.column(borrowed.name);
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
    for (Borrowed& borrowed : borrowed_) fill(borrowed, kinds);
    return table_.arrangement_for(session_, kinds);
  }

  const std::vector<std::uint64_t>& refs(const std::string& name) { return of(name)->refs; }

  const Ref* column(const std::string& name) { return table_.on_device(session_, name, refs(name)); }

  void write_back() const {
    for (const auto& [x, copy] : copies_) x.copy_(copy);
  }

 private:
  struct Borrowed {
    std::string name;
    Access access;
    RowFlags rows;
    bool wide_only;
    std::vector<std::uint64_t> refs;
  };

  Borrowed* of(const std::string& name) {
    const auto found = std::find_if(borrowed_.begin(), borrowed_.end(),
                                    [&](const Borrowed& borrowed) { return borrowed.name == name; });
    return found != borrowed_.end() ? &*found : nullptr;
  }

  void fill(Borrowed& borrowed, const Kinds& kinds) {
    const Tensors &tensors = table_.column(borrowed.name), &weights = table_.column("w");
    borrowed.refs.assign(kinds.size(), 0);
    for (std::size_t row = 0; row < kinds.size(); ++row) {
      prefetch_after(tensors, row);
      prefetch_after(weights, row);
      const at::Tensor& x = tensors[row];
      if (!x.defined()) continue;
      const Dtype dtype = *dtype_of(x);
      const bool known = dtype == wide(kinds[row]) || (!borrowed.wide_only && dtype == narrow(kinds[row]));
      at::Tensor copy;
      if (!known || !in_row_order(x, weights[row])) {
        if (!borrowed.rows[row]) continue;
        // Every kernel knows float, if not for its states.
        const at::ScalarType other = borrowed.wide_only ? scalar_type(wide(kinds[row])) : at::kFloat;
        copy = empty_in_row_order(weights[row], x.options().dtype(known ? x.scalar_type() : other));
        copy.copy_(x);
        (borrowed.access == Access::write ? copies_ : alive_).emplace_back(x, copy);
      }
      const at::Tensor& used = copy.defined() ? copy : x;
      const Access access = borrowed.rows[row] ? borrowed.access : Access::read;
      const std::uint64_t address = DeviceTable::address_of(used, access, borrowed.name, row);
      if (address >> 48 != 0) throw std::runtime_error("an address of more than 48 bits");
      const bool is_narrow = used.scalar_type() != scalar_type(wide(kinds[row]));
      borrowed.refs[row] = (x.numel() == 0 ? kNowhere : address) | static_cast<std::uint64_t>(is_narrow);
    }
  }

  DeviceTable& table_;
  const Session& session_;
  std::vector<Borrowed> borrowed_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_, alive_;
};

}  // namespace looksam::cuda
