// What the CUDA extension keeps of a TensorTable: its columns, and the arrays on the device by which the kernels find
// them.
#pragma once

#include <algorithm>
#include <list>

#include "session.h"

namespace looksam::cuda {

using Kinds = std::vector<Kind>;  // one a row

inline at::ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::f32   ? at::kFloat
         : dtype == Dtype::f64 ? at::kDouble
         : dtype == Dtype::f16 ? at::kHalf
                               : at::kBFloat16;
}

enum class Access { read, write };

template <class T>
T* data(const at::Tensor& x) {
  return x.defined() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

// Empty tensors have no address, but they are there.
inline constexpr std::uint64_t kNowhere = 16;

// Whether the device has an array, and in which graph capture it was uploaded: what a capture uploads is there only
// when the graph runs. Not uploaded from before the launch that writes it until that has succeeded.
struct Uploaded {
  bool done = false;
  unsigned long long capture = 0;

  bool holds(const Session& session, bool for_good) const {
    return done && (capture == session.capture || (capture == 0 && for_good));
  }
  void invalidate() { done = false; }
  void confirm(const Session& session) { done = true, capture = session.capture; }
};

struct Column {
  Tensors tensors;
  std::vector<std::uint64_t> refs;  // as last uploaded
  at::Tensor on_device;
  Uploaded uploaded;
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
struct Arrangement {
  Kinds kinds;
  std::vector<std::int64_t> numel;
  std::vector<Layout> layouts;
  at::Tensor numel_on_device, group, counters, trust_ratio;
  Uploaded uploaded;
  bool captured = false;  // a graph reads it whenever it is replayed

  Tensors arrays() const {
    Tensors all = {numel_on_device, group, counters, trust_ratio};
    for (const Layout& layout : layouts) all.insert(all.end(), {layout.first_on_device, layout.row_of, layout.partial});
    return all;
  }
};

// How many a table keeps of those that no graph reads. An op has one or two: more come up where dtypes change from step
// to step.
inline constexpr std::size_t kArrangements = 8;

class DeviceTable {
 public:
  // device: of a table without rows; of any other it is that of its first parameter.
  DeviceTable(std::vector<int> group, const at::Device& device) : group_(std::move(group)), device_(device) {
    check_group_of_row(group_);
    if (device_.is_cuda() && !device_.has_index()) device_.set_index(0);
  }

  // From now on weights of bfloat16 without a master copy are rounded stochastically.
  void round_stochastically(std::uint32_t key) { rounding_key_ = key; }

  // tensors: None forgets the column.
  void set(const std::string& name, const std::optional<py::list>& tensors) {
    Column& column = columns_[name];
    column.uploaded.invalidate();
    column.tensors = absent_;
    if (tensors) column.tensors = column_of(name, *tensors, rows());
  }

  // The device memory that outlives an op.
  py::list arrays() const {
    Tensors kept = {eta_on_device_};
    for (const auto& [name, column] : columns_) kept.push_back(column.on_device);
    for (const Arrangement& arrangement : arrangements_) {
      const Tensors arrays = arrangement.arrays();
      kept.insert(kept.end(), arrays.begin(), arrays.end());
    }
    py::list all;
    for (const at::Tensor& x : kept)
      if (x.defined()) all.append(wrap(x));
    return all;
  }

  std::size_t rows() const { return group_.size(); }
  const std::vector<int>& group() const { return group_; }
  const at::Device& device() const { return device_; }

  const Tensors& column(const std::string& name) const {
    const auto found = columns_.find(name);
    return found != columns_.end() ? found->second.tensors : absent_;
  }

  bool rounds_stochastically(std::size_t row) const {
    const at::Tensor& w = column("w")[row];
    return rounding_key_ && w.scalar_type() == at::kBFloat16 && !is_master(column("b")[row], w);
  }

  RowFlags present(const std::string& name) const {
    RowFlags rows;
    for (const at::Tensor& x : column(name)) rows.push_back(x.defined());
    return rows;
  }

  template <class T>
  at::Tensor new_array(std::size_t count) const {
    return at::empty({static_cast<std::int64_t>(count * sizeof(T))},
                     at::TensorOptions().dtype(at::kByte).device(device_));
  }

  at::Tensor new_doubles(std::size_t count) const {
    return at::empty({static_cast<std::int64_t>(count), static_cast<std::int64_t>(rows())},
                     at::TensorOptions().dtype(at::kDouble).device(device_));
  }

  template <class T>
  static void upload(const Session& session, const at::Tensor& to, const std::vector<T>& from) {
    cuda::upload(to.mutable_data_ptr(), from.data(), from.size() * sizeof(T), session.stream);
  }

  // Once a second stream has come up, all device memory that an op uses is recorded with the stream that it runs on:
  // torch's allocator knows only the stream for which the memory was made. Sums and coefficients, too, pass from op to
  // op.
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
    Ref* const array = array_of(session, column);
    if (!is_uploaded(session, name, refs)) {
      column.uploaded.invalidate();
      upload(session, column.on_device, refs);
      column.refs = refs;
      column.uploaded.confirm(session);
    }
    return array;
  }

  bool is_uploaded(const Session& session, const std::string& name, const std::vector<std::uint64_t>& refs) {
    const Column& column = columns_[name];
    const auto col = column_named(name);
    const bool outlives_the_step = !col || !is_scaled(*col);
    return column.uploaded.holds(session, outlives_the_step) && column.refs == refs;
  }

  Ref* array_of(const Session& session, Column& column) {
    if (column.tensors.empty()) column.tensors = absent_;
    if (!column.on_device.defined()) column.on_device = new_array<std::uint64_t>(rows());
    use(session, column.on_device);
    return data<Ref>(column.on_device);
  }

  // A column of scalars. needed: the rows that must have one.
  const Ref* scalars(const Session& session, const std::string& name, at::ScalarType dtype, Access access,
                     const RowFlags& needed) {
    std::vector<std::uint64_t> refs(rows());
    const Tensors& tensors = column(name);
    for (std::size_t row = 0; row < rows(); ++row) {
      const at::Tensor& x = tensors[row];
      if (!x.defined()) {
        if (needed[row]) throw py::value_error("row " + std::to_string(row) + " takes part, but has no '" + name + "'");
        continue;
      }
      if (x.device() != device_)
        throw py::type_error(Where(name, row) + ": on " + x.device().str() + ", not on " + device_.str());
      if (x.scalar_type() != dtype)
        throw py::type_error(Where(name, row) + ": " + toString(x.scalar_type()) + " is not supported; it must be " +
                             toString(dtype));
      if (x.numel() != 1)
        throw py::value_error(Where(name, row) + ": " + std::to_string(x.numel()) + " elements, not one");
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

  // A float on the device; undefined for None.
  at::Tensor flag(const Session& session, py::handle object, const char* name) const {
    if (object.is_none()) return {};
    const at::Tensor x = unpack(object).to(device_, at::kFloat);
    require_memory(x, name);
    if (x.numel() != 1)
      throw py::value_error(std::string(name) + " has " + std::to_string(x.numel()) + " elements, not one");
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
    if (!eta_uploaded_.holds(session, true) || !std::equal(eta.begin(), eta.end(), eta_.begin(), eta_.end(), same)) {
      if (!eta_on_device_.defined()) eta_on_device_ = new_array<double>(rows());
      eta_uploaded_.invalidate();
      upload(session, eta_on_device_, eta);
      eta_ = std::move(eta);
      eta_uploaded_.confirm(session);
    }
    use(session, eta_on_device_);
    return data<double>(eta_on_device_);
  }

  // Chunks and counters on the device, for rows of these kinds.
  Arrangement& arrangement_for(const Session& session, const Kinds& kinds) {
    std::vector<std::int64_t> numel;
    for (const at::Tensor& w : column("w")) numel.push_back(w.numel());
    auto known = std::find_if(arrangements_.begin(), arrangements_.end(),
                              [&](const Arrangement& x) { return x.kinds == kinds && x.numel == numel; });
    if (known == arrangements_.end())
      known = arrangements_.insert(arrangements_.begin(), new_arrangement(kinds, std::move(numel)));
    arrangements_.splice(arrangements_.begin(), arrangements_, known);
    forget_old_arrangements();
    Arrangement& arrangement = arrangements_.front();
    arrangement.captured = arrangement.captured || session.capture != 0;
    for (const at::Tensor& array : arrangement.arrays()) use(session, array);
    if (!arrangement.uploaded.holds(session, true)) {
      arrangement.uploaded.invalidate();
      upload(session, arrangement.numel_on_device, arrangement.numel);
      upload(session, arrangement.group, group_);
      auto* const counters = data<std::uint32_t>(arrangement.counters);
      for (const Layout& layout : arrangement.layouts) {
        upload(session, layout.first_on_device, layout.first);
        index_chunks(layout.map, data<std::int32_t>(layout.row_of), counters, counters + rows(), session.stream);
      }
      arrangement.uploaded.confirm(session);
    }
    return arrangement;
  }

  void forget_old_arrangements() {
    std::size_t eager = 0;
    arrangements_.remove_if(
        [&](const Arrangement& arrangement) { return !arrangement.captured && ++eager > kArrangements; });
  }

  Arrangement new_arrangement(const Kinds& kinds, std::vector<std::int64_t> numel) const {
    Arrangement arrangement;
    arrangement.kinds = kinds;
    arrangement.numel = std::move(numel);
    arrangement.numel_on_device = new_array<std::int64_t>(rows());
    arrangement.group = new_array<std::int32_t>(rows());
    arrangement.counters = new_array<std::uint32_t>(rows() + 1);
    arrangement.trust_ratio = new_array<double>(rows());
    for (int k = 0; k < kKinds; ++k) {
      Layout layout = {};
      layout.kind = Kind(k);
      layout.first = {0};
      layout.rows = {0};
      for (std::size_t row = 0; row < rows(); ++row) {
        const bool here = kinds[row] == layout.kind;
        // Empty rows have a chunk too: it counts their updates.
        const std::int64_t chunks =
            here ? std::max<std::int64_t>((arrangement.numel[row] + kChunk - 1) / kChunk, 1) : 0;
        layout.first.push_back(layout.first.back() + chunks);
        layout.rows.push_back(layout.rows.back() + here);
      }
      const std::int64_t chunks = layout.first.back();
      if (chunks == 0) continue;
      layout.first_on_device = new_array<std::int64_t>(rows() + 1);
      layout.row_of = new_array<std::int32_t>(chunks);
      layout.partial = new_array<double>(kPairs * chunks);
      layout.map = {static_cast<std::int32_t>(rows()), chunks, data<std::int64_t>(arrangement.numel_on_device),
                    data<std::int64_t>(layout.first_on_device), data<std::int32_t>(layout.row_of)};
      arrangement.layouts.push_back(std::move(layout));
    }
    return arrangement;
  }

  // One launch each: at most kMaxRows rows, and, where the groups are passed too, kStepGroups groups that follow each
  // other.
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
        result.push_back(
            {layout.kind, {first, end - first, first_chunk}, chunks, layout.rows[end] - layout.rows[first]});
      first = end;
    }
    return result;
  }

 protected:
  std::vector<int> group_;
  Tensors absent_ = Tensors(group_.size());
  at::Device device_;
  std::unordered_map<std::string, Column> columns_;
  std::list<Arrangement> arrangements_;  // the last used first
  std::vector<double> eta_;
  at::Tensor eta_on_device_;
  std::optional<std::uint32_t> rounding_key_;
  Uploaded eta_uploaded_;
  std::optional<Stream> first_stream_;
  bool several_streams_ = false;
};

}  // namespace looksam::cuda
