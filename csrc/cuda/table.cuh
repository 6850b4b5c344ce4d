// The tensor table on the device, and the part of it that is passed in kernel arguments.
//
// Columns lie in device memory as one Ref a row. Nothing is ever copied there from the host: kernels write what they
// were given by value, so that filling the table needs no staging memory, no synchronisation, and works while a graph
// is captured.
#pragma once

#include <type_traits>

#include "../core/formulas.h"
#include "../core/rounding.h"
#include "../core/table.h"
#include "../core/vec.h"

namespace looksam::cuda {

// A tensor's address. Bit 0, which no address of a floating point number has, says in which of a kernel's two storage
// types its elements are; 0 is no tensor.
struct Ref {
  std::uint64_t bits;

  LOOKSAM_HD bool present() const { return bits != 0; }
  LOOKSAM_HD bool narrow() const { return (bits & 1) != 0; }
  LOOKSAM_HD char* data() const { return reinterpret_cast<char*>(bits & ~std::uint64_t{1}); }
};

LOOKSAM_HD Ref at(const Ref* column, std::int32_t row) { return column != nullptr ? column[row] : Ref{0}; }

// The rows of one launch. All its arrays are indexed by the row's place in the whole table.
struct Rows {
  std::int32_t first, count;
  std::int64_t first_chunk;
};

inline constexpr int kMaxRows = 4096;  // in one launch; longer tables take another for every 4,096 rows

// One bit a row of a launch.
struct Bits {
  std::uint32_t word[kMaxRows / 32];

  LOOKSAM_HD bool has(std::int32_t i) const { return (word[i / 32] >> (i % 32) & 1u) != 0; }
};

// How long the arguments of a launch are at most: every launch pays for its bytes; and what CUDA 12.1 and later allow.
inline constexpr std::size_t kShortArguments = 4096, kLongArguments = 32764;

// A column that is passed in the arguments of a launch, 6 bytes a row: addresses have 48 bits.
template <int kRows>
struct PassedColumn {
  std::uint32_t low[kRows];
  std::uint16_t high[kRows];

  LOOKSAM_HD Ref at(std::int32_t i) const { return {std::uint64_t{high[i]} << 32 | low[i]}; }
};

// The two storage types that one kernel knows; arithmetic, states and sums are of the wide one. A vector is what one
// thread works on at a time: 16 bytes of the narrow type, and one or more packs of 16 bytes of the wide one.
template <class W, class N>
struct Types {
  using Wide = W;
  using Narrow = N;
  static constexpr int lanes = 16 / sizeof(N);
  // Caps the registers of a thread, at 64, 128 (two packs of float) or 255 (double).
  static constexpr int blocks_per_processor = sizeof(W) == 8 ? 1 : sizeof(W) == sizeof(N) ? 4 : 2;
};

template <class T>
struct Vector {
  typename T::Wide lane[T::lanes];
};

// A vector as it lies in memory. Converted only where it is used, so that the loads of all columns are under way before
// the first one is waited for.
template <class T>
struct Raw {
  using Wide = typename T::Wide;
  using Narrow = typename T::Narrow;
  static constexpr int packs = static_cast<int>(sizeof(Wide) / sizeof(Narrow));

  Pack<std::uint32_t> pack[packs];
  bool narrow;

  LOOKSAM_HD Vector<T> values() const { return narrow ? values_of<Narrow>() : values_of<Wide>(); }

  template <class S>
  LOOKSAM_HD Vector<T> values_of() const {
    S element[T::lanes];
    memcpy(element, pack, sizeof element);
    Vector<T> x;
    for (int k = 0; k < T::lanes; ++k) x.lane[k] = as<Wide>(element[k]);
    return x;
  }
};

// One row's tensor from its current chunk on. may_be_narrow: its type is known at run time only.
template <class T, bool may_be_narrow = sizeof(typename T::Narrow) != sizeof(typename T::Wide)>
class Span {
 public:
  using Wide = typename T::Wide;
  using Narrow = typename T::Narrow;

  LOOKSAM_HD Span(Ref ref, std::int64_t offset) : data_(ref.data()), narrow_(may_be_narrow && ref.narrow()) {
    if (data_ != nullptr) data_ += offset * (narrow() ? sizeof(Narrow) : sizeof(Wide));
  }

  LOOKSAM_HD bool present() const { return data_ != nullptr; }
  LOOKSAM_HD bool narrow() const { return may_be_narrow && narrow_; }
  LOOKSAM_HD bool aligned() const { return looksam::aligned(data_); }

  // Elements i .. i + size - 1; whole: these are all lanes, and the tensor is aligned, which is found out where it is
  // not known. 0 in the other lanes, and in all of an absent tensor.
  template <bool whole, Cache cache = Cache::keep>
  LOOKSAM_HD Raw<T> load(int i, int size) const {
    Raw<T> raw = {};
    raw.narrow = narrow();
    if (data_ == nullptr) return raw;
    narrow() ? load_as<Narrow, whole, cache>(raw, i, size) : load_as<Wide, whole, cache>(raw, i, size);
    return raw;
  }

  template <bool whole, Cache cache = Cache::keep>
  LOOKSAM_HD void store(int i, int size, const Vector<T>& x) const {
    narrow() ? store_as<Narrow, whole, cache>(i, size, x) : store_as<Wide, whole, cache>(i, size, x);
  }

 private:
  template <class S, bool whole, Cache cache>
  LOOKSAM_HD void load_as(Raw<T>& raw, int i, int size) const {
    const S* from = reinterpret_cast<const S*>(data_) + i;
    constexpr int packs = T::lanes / Pack<S>::size;
    if (whole || (size == T::lanes && aligned())) {
      for (int p = 0; p < packs; ++p) {
        const Pack<S> pack = looksam::load<cache>(from + p * Pack<S>::size);
        memcpy(&raw.pack[p], &pack, 16);
      }
    } else {
      for (int p = 0; p < packs; ++p) {
        Pack<S> pack;
        for (int k = 0; k < Pack<S>::size; ++k)
          pack.lane[k] = p * Pack<S>::size + k < size ? from[p * Pack<S>::size + k] : S{};
        memcpy(&raw.pack[p], &pack, 16);
      }
    }
  }

  template <class S, bool whole, Cache cache>
  LOOKSAM_HD void store_as(int i, int size, const Vector<T>& x) const {
    S* to = reinterpret_cast<S*>(data_) + i;
    constexpr int packs = T::lanes / Pack<S>::size;
    if (whole || (size == T::lanes && aligned())) {
      for (int p = 0; p < packs; ++p) {
        Pack<S> pack;
        for (int k = 0; k < Pack<S>::size; ++k) pack.lane[k] = as<S>(x.lane[p * Pack<S>::size + k]);
        looksam::store<cache>(to + p * Pack<S>::size, pack);
      }
    } else {
      for (int k = 0; k < T::lanes; ++k)
        if (k < size) to[k] = as<S>(x.lane[k]);
    }
  }

  char* data_;
  bool narrow_;
};

// sum_i c_i x_i. A coefficient of 0 takes its input out, whatever that holds.
template <class T>
struct Combination {
  typename T::Wide c[kMaxInputs];

  LOOKSAM_HD Combination(const double* coefficient, std::int32_t inputs, std::int64_t rows, std::int32_t row) {
    for (int i = 0; i < kMaxInputs; ++i)
      c[i] = coefficient != nullptr && i < inputs ? static_cast<typename T::Wide>(coefficient[i * rows + row]) : 0;
  }

  LOOKSAM_HD bool is_zero() const { return c[0] == 0 && c[1] == 0 && c[2] == 0; }

  LOOKSAM_HD Vector<T> of(const Vector<T> (&x)[kMaxInputs]) const {
    Vector<T> sum = {};
    for (int i = 0; i < kMaxInputs; ++i)
      if (c[i] != 0)
        for (int k = 0; k < T::lanes; ++k) sum.lane[k] += c[i] * x[i].lane[k];
    return sum;
  }
};

// The storage type that is rounded stochastically.
template <class T>
inline constexpr bool has_bfloat16 = std::is_same<typename T::Narrow, bfloat16>::value;

// New weights, before they are stored. i: the first lane's place in the chunk.
template <class T>
LOOKSAM_HD void round_stochastically(Vector<T>& x, Rounding rounding, const Chunk& chunk, int i) {
  if (!has_bfloat16<T> || !rounding.stochastic) return;
  const HashSpan random(rounding.key, chunk.row, chunk.offset);
  for (int k = 0; k < T::lanes; ++k) x.lane[k] = stochastically_rounded(x.lane[k], random.hash(i + k));
}

// A state of the base update: always of the wide type, which spares its kernel the registers of a choice.
template <class T>
using StateSpan = Span<T, false>;

// How many elements the vector has that begins at i.
template <class T>
LOOKSAM_HD int vector_size(int i, int chunk_size) {
  return chunk_size - i < T::lanes ? chunk_size - i : T::lanes;
}

// A chunk's vectors, dealt out to the threads of a block: consecutive threads, consecutive vectors. `whole` is false at
// the tail of a tensor, and where one of the tensors is not aligned: then each is accessed as it can be.
template <class T, class Block, class Body>
LOOKSAM_HD void for_each_vector(const Block& block, int chunk_size, bool aligned, const Body& body) {
  for (int i = block.rank() * T::lanes; i < chunk_size; i += block.size() * T::lanes) {
    const int size = vector_size<T>(i, chunk_size);
    body(i, size, aligned && size == T::lanes);
  }
}

// The same vectors in the same order for what reads only: load(i, size, whole) of two comes before use() of the first,
// for a column alone does not have enough loads under way. whole: std::true_type or std::false_type.
template <class T, class Block, class Load, class Use>
LOOKSAM_HD void for_each_two_vectors(const Block& block, int chunk_size, bool aligned, const Load& load,
                                     const Use& use) {
  const int stride = block.size() * T::lanes;
  int i = block.rank() * T::lanes;
  for (; aligned && i + stride + T::lanes <= chunk_size; i += 2 * stride) {
    const auto first = load(i, T::lanes, std::true_type{}), second = load(i + stride, T::lanes, std::true_type{});
    use(first);
    use(second);
  }
  for (; i < chunk_size; i += stride) {
    const int size = vector_size<T>(i, chunk_size);
    use(aligned && size == T::lanes ? load(i, size, std::true_type{}) : load(i, size, std::false_type{}));
  }
}

}  // namespace looksam::cuda
