// The chunk bodies. Compiled once per instruction set, by baseline.cpp, avx2.cpp and avx512.cpp, which define
// LOOKSAM_ISA and include nothing else after switching the target: no std template may be instantiated in here.
//
// A chunk is worked off in tiles that stay in the first-level cache. A column of the arithmetic's own type is used in
// place; any other is converted tile by tile. So each loop below exists for float and for double only, whatever the mix
// of dtypes, and memory sees each column once. Lanes of sums are fixed, and nothing is contracted to fused
// multiply-adds: all instruction sets give the same bits.

#include "../core/vec.h"
#include "args.h"

#if !defined(LOOKSAM_ISA)
#error "define LOOKSAM_ISA"
#endif

#define LOOKSAM_VECTORIZE _Pragma("GCC ivdep")

namespace looksam::cpu {
namespace {

constexpr int kTile = 256;
constexpr int kStepTile = 128;  // of a step, which has many columns under way
constexpr int kAhead = 256;     // elements

template <class T>
struct alignas(64) Tile {
  T at[kTile];
};

// One tensor, from the current tile on.
struct Span {
  void* data;
  Dtype dtype;
};

inline Span span(const Column& column, std::int32_t row, std::int64_t offset) {
  if (!column.has(row)) return {nullptr, Dtype::f32};
  const Dtype dtype = column.dtype[row];
  return {static_cast<char*>(column.data[row]) + offset * size_of(dtype), dtype};
}

inline Span advance(Span x, int elements) {
  if (x.data != nullptr) x.data = static_cast<char*>(x.data) + elements * size_of(x.dtype);
  return x;
}

template <class T>
constexpr Dtype dtype_of = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;

template <class To, class From>
inline void convert(To* to, const From* from, int size) {
  LOOKSAM_VECTORIZE
  for (int i = 0; i < size; ++i) to[i] = as<To>(from[i]);
}

template <class T>
void widen_to(T* to, Span from, int size) {
  switch (from.dtype) {
    case Dtype::f32: return convert(to, static_cast<const float*>(from.data), size);
    case Dtype::f64: return convert(to, static_cast<const double*>(from.data), size);
    case Dtype::f16: return convert(to, static_cast<const float16*>(from.data), size);
    case Dtype::bf16: return convert(to, static_cast<const bfloat16*>(from.data), size);
  }
}

template <class T>
void narrow_to(Span to, const T* from, int size) {
  switch (to.dtype) {
    case Dtype::f32: return convert(static_cast<float*>(to.data), from, size);
    case Dtype::f64: return convert(static_cast<double*>(to.data), from, size);
    case Dtype::f16: return convert(static_cast<float16*>(to.data), from, size);
    case Dtype::bf16: return convert(static_cast<bfloat16*>(to.data), from, size);
  }
}

// Asks the memory for as many elements of x, kAhead after them.
inline void prefetch(Span x, int size) {
  const char* later = static_cast<const char*>(x.data) + kAhead * size_of(x.dtype);
  for (int i = 0; i < size * static_cast<int>(size_of(x.dtype)); i += 64) __builtin_prefetch(later + i);
}

// Asks the memory for the beginning of a row.
inline void prefetch(const Column& column, std::int32_t row) {
  if (column.has(row)) __builtin_prefetch(column.data[row]);
}

// How many chunks ahead: of many small rows each begins somewhere else. Of a few they are in the cache.
constexpr std::int64_t kChunksAhead = 3, kManyChunks = 512;

// Reading: the tensor itself where it has the type of the arithmetic, else its values in `tile`.
template <class T>
inline T* values(Span x, int size, Tile<T>& tile, bool ahead) {
  if (x.data == nullptr) return nullptr;
  if (ahead && size % kStepTile == 0) prefetch(x, size);  // else the row ends here
  if (x.dtype == dtype_of<T>) return static_cast<T*>(x.data);
  widen_to(tile.at, x, size);
  return tile.at;
}

// Writing: where results for `x` go, and, once they are there, x <- results unless they went straight into it.
template <class T>
inline T* target_of(Span x, Tile<T>& tile) {
  return x.dtype == dtype_of<T> ? static_cast<T*>(x.data) : tile.at;
}
template <class T>
inline void put(Span x, const T* results, int size) {
  if (x.data != nullptr && x.data != results) narrow_to(x, results, size);
}

// to <- from of one dtype, past the caches if it streams; but never the end of a row, as lines of which it fills a part
// would be slow.
inline void copy(Span to, const void* from, int size, bool streams) {
  if (!streams || size % kStepTile != 0) {
    __builtin_memcpy(to.data, from, static_cast<std::size_t>(size) * size_of(to.dtype));
    return;
  }
  switch (size_of(to.dtype)) {
    case 2: return stream_copy(static_cast<std::uint16_t*>(to.data), static_cast<const std::uint16_t*>(from), size);
    case 4: return stream_copy(static_cast<float*>(to.data), static_cast<const float*>(from), size);
    default: return stream_copy(static_cast<double*>(to.data), static_cast<const double*>(from), size);
  }
}

// w <- b, bit for bit, or rounded from the master copy.
template <class T>
inline void restore(Span w, Span b, int size, Tile<T>& tile) {
  if (w.dtype == b.dtype) {
    __builtin_memcpy(w.data, b.data, static_cast<std::size_t>(size) * size_of(w.dtype));
  } else {
    put(w, values(b, size, tile, false), size);
  }
}

// As put(), past the caches if it streams and nothing has to be converted.
template <class T>
inline void write_once(Span x, const T* results, int size, bool streams) {
  if (x.dtype == dtype_of<T>) {
    copy(x, results, size, streams);
  } else {
    put(x, results, size);
  }
}

// As many elements in double as a register holds. The intrinsics stand here because compilers make shuffles through
// memory of a generic conversion.
#if LOOKSAM_VECTOR_BYTES == 64
using Doubles = __m512d;
inline Doubles doubles(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
inline Doubles doubles(const double* x) { return _mm512_loadu_pd(x); }
#elif LOOKSAM_VECTOR_BYTES == 32
using Doubles = __m256d;
inline Doubles doubles(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
inline Doubles doubles(const double* x) { return _mm256_loadu_pd(x); }
#else
using Doubles = double __attribute__((vector_size(16)));
template <class T>
inline Doubles doubles(const T* x) {
  return Doubles{static_cast<double>(x[0]), static_cast<double>(x[1])};
}
#endif

// An inner product in double, in 32 fixed lanes.
struct InnerProduct {
  static constexpr int kLanes = 32, kWidth = sizeof(Doubles) / sizeof(double), kVectors = kLanes / kWidth;
  static constexpr int kAtOnce = 4;  // vectors that stay in registers, of three products, too

  Doubles lane[kVectors];

  void clear() {
    for (Doubles& some : lane) some = Doubles{};
  }

  // At most a tile.
  template <class T>
  inline void add(const T* x, const T* y, int size) {
    const int whole = size / kLanes * kLanes;
    for (int first = 0; first < kVectors; first += kAtOnce) {
      Doubles sum[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) sum[k] = lane[first + k];
      for (int i = first * kWidth; i < whole; i += kLanes)
        for (int k = 0; k < kAtOnce; ++k) sum[k] += doubles(x + i + k * kWidth) * doubles(y + i + k * kWidth);
      for (int k = 0; k < kAtOnce; ++k) lane[first + k] = sum[k];
    }
    add_rest(x, y, whole, size);
  }

  // xx, xy and yy at once: each element is converted once.
  template <class T>
  static inline void add_three(const T* x, const T* y, int size, InnerProduct* three) {
    const int whole = size / kLanes * kLanes;
    for (int first = 0; first < kVectors; first += kAtOnce) {
      Doubles xx[kAtOnce], xy[kAtOnce], yy[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k)
        xx[k] = three[0].lane[first + k], xy[k] = three[1].lane[first + k], yy[k] = three[2].lane[first + k];
      for (int i = first * kWidth; i < whole; i += kLanes)
        for (int k = 0; k < kAtOnce; ++k) {
          const Doubles of_x = doubles(x + i + k * kWidth), of_y = doubles(y + i + k * kWidth);
          xx[k] += of_x * of_x;
          xy[k] += of_x * of_y;
          yy[k] += of_y * of_y;
        }
      for (int k = 0; k < kAtOnce; ++k)
        three[0].lane[first + k] = xx[k], three[1].lane[first + k] = xy[k], three[2].lane[first + k] = yy[k];
    }
    three[0].add_rest(x, x, whole, size);
    three[1].add_rest(x, y, whole, size);
    three[2].add_rest(y, y, whole, size);
  }

  // The elements from `begin`, a multiple of kLanes, on: fewer than kLanes.
  template <class T>
  inline void add_rest(const T* x, const T* y, int begin, int size) {
    for (int i = begin; i < size; ++i)
      lane[(i - begin) / kWidth][(i - begin) % kWidth] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  }

  // Of at most kLanes elements altogether, at once: each lane would hold one product, so the bits are those of total().
  template <class T>
  static double of_few(const T* x, const T* y, int size) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
    return sum;
  }

  // Of `size` elements altogether: lanes that no element has reached are 0.
  double total(int size) const {
    double sum = 0;
    const int used = size < kLanes ? size : kLanes;
    for (int i = 0; i < used; ++i) sum += lane[i / kWidth][i % kWidth];
    return sum;
  }
};

// sums
// ------------------------------------------------------------------------------------------------------------------

// One chunk whose sums are being made, tile by tile.
struct Summing {
  Chunk chunk;
  Span operand[kMaxOperands];
  InnerProduct product[kMaxPairs];
};

// out <- x / root, the T x of a Preconditioner
template <class T>
inline const T* precondition(T* out, const T* x, const T* root, int size) {
  LOOKSAM_VECTORIZE
  for (int i = 0; i < size; ++i) out[i] = over_root(x[i], root[i]);
  return out;
}

// The roots of a tile; v is where its second moment begins.
template <class T>
inline void roots(T* out, const T* g, Span v, const Preconditioner<T>& p, int size, Tile<T>& tile, bool ahead) {
  const T* moment = values(v, size, tile, ahead);
  LOOKSAM_VECTORIZE
  for (int i = 0; i < size; ++i) out[i] = p.root(g[i], moment[i]);
}

// The operands of one tile, from `begin` of the chunk on.
template <class T>
struct Operands {
  int size;
  const T* x[kMaxOperands];
  Tile<T> tile[kMaxOperands], weights;

  Operands(const SumsArgs& a, const Summing& at, int begin)
      : size(at.chunk.size - begin < kTile ? at.chunk.size - begin : kTile) {
    for (int k = 0; k < a.operands; ++k) {
      x[k] = values(advance(at.operand[k], begin), size, tile[k], a.memory.ahead);
      if (!a.operand[k].adaptive || x[k] == nullptr || a.eta == nullptr) continue;
      const double eta = a.eta[at.chunk.row];
      if (eta != eta) continue;
      const T* w = values(span(a.w, at.chunk.row, at.chunk.offset + begin), size, weights, a.memory.ahead);
      T* scaled = tile[k].at;
      LOOKSAM_VECTORIZE
      for (int i = 0; i < size; ++i) scaled[i] = adaptive_scale(w[i], static_cast<T>(eta)) * x[k][i];
      x[k] = scaled;
    }
    if (a.numbers != nullptr && x[a.gradient] != nullptr) precondition_operands(a, at, begin);
  }
  void precondition_operands(const SumsArgs& a, const Summing& at, int begin) {
    Tile<T> moment;
    const Span v = span(a.v, at.chunk.row, at.chunk.offset + begin);
    roots(weights.at, x[a.gradient], v, Preconditioner<T>(a.numbers, a.map.rows, at.chunk.row), size, moment,
          a.memory.ahead);
    for (int k = 0; k < a.operands; ++k)
      if (a.operand[k].adaptive && x[k] != nullptr) x[k] = precondition(tile[k].at, x[k], weights.at, size);
  }
  bool has(const SumsArgs& a, int pair) const { return x[a.x[pair]] != nullptr && x[a.y[pair]] != nullptr; }
};

// Are the pairs from p on xx, xy and yy of two operands?
inline bool are_three(const SumsArgs& a, int p) {
  return p + 2 < a.pairs && a.x[p] == a.y[p] && a.x[p + 1] == a.x[p] && a.y[p + 1] == a.x[p + 2] &&
         a.x[p + 2] == a.y[p + 2];
}

template <class T>
void sums_tile(const SumsArgs& a, Summing& at, int begin) {
  const Operands<T> of(a, at, begin);
  for (int p = 0; p < a.pairs; ++p) {
    if (!of.has(a, p)) continue;
    if (are_three(a, p) && of.has(a, p + 2)) {
      InnerProduct::add_three(of.x[a.x[p]], of.x[a.y[p + 2]], of.size, at.product + p);
      p += 2;
    } else {
      at.product[p].add(of.x[a.x[p]], of.x[a.y[p]], of.size);
    }
  }
}

// A chunk of at most InnerProduct::kLanes elements: models have many such tensors, in which lanes cost more than sums.
template <class T>
void sums_short(const SumsArgs& a, const Summing& at, std::int64_t index) {
  const Operands<T> of(a, at, 0);
  for (int p = 0; p < a.pairs; ++p)
    a.partial[p * a.map.chunks + index] = of.has(a, p) ? InnerProduct::of_few(of.x[a.x[p]], of.x[a.y[p]], of.size) : 0;
}

// Chunks from several places in turns, a tile of each: a sum reads one or two tensors, and there are cores that do not
// fill the memory's bandwidth from as few places.
void sums(const SumsArgs& a, std::int64_t first, std::int64_t last) {
  Summing place[MemoryUse::kPlaces];
  const int places = a.memory.places();
  const std::int64_t share = (last - first + places - 1) / places;
  for (std::int64_t i = 0; i < share; ++i) {
    int longest = 0;
    for (int n = 0; n < places; ++n) {
      const std::int64_t index = first + n * share + i;
      Summing& at = place[n];
      at.chunk = index < last ? a.map.at(index) : Chunk{};
      for (int k = 0; k < a.operands; ++k) at.operand[k] = span(a.operand[k].column, at.chunk.row, at.chunk.offset);
      if (at.chunk.size > 0 && at.chunk.size <= InnerProduct::kLanes) {
        in_double(a.w, at.chunk.row) ? sums_short<double>(a, at, index) : sums_short<float>(a, at, index);
        at.chunk.size = 0;
        continue;
      }
      longest = longest < at.chunk.size ? at.chunk.size : longest;
      for (int p = 0; p < a.pairs; ++p) at.product[p].clear();
    }
    for (int begin = 0; begin < longest; begin += kTile) {
      for (int n = 0; n < places; ++n) {
        Summing& at = place[n];
        if (begin >= at.chunk.size) continue;
        in_double(a.w, at.chunk.row) ? sums_tile<double>(a, at, begin) : sums_tile<float>(a, at, begin);
      }
    }
    for (int n = 0; n < places; ++n)
      for (int p = 0; p < a.pairs && place[n].chunk.size > 0; ++p)
        a.partial[p * a.map.chunks + first + n * share + i] = place[n].product[p].total(place[n].chunk.size);
  }
}

// sum_i c_i x_i over the inputs of one row.
template <class T>
struct Combination {
  int terms = 0;
  int input[kMaxInputs] = {};
  T c[kMaxInputs] = {};

  Combination(const double* coefficient, const Column* columns, int inputs, const ChunkMap& map, std::int32_t row) {
    for (int i = 0; i < inputs && coefficient != nullptr; ++i) {
      c[terms] = static_cast<T>(coefficient[i * map.rows + row]);
      input[terms] = i;
      terms += c[terms] != T(0) && columns[i].has(row);  // a zero takes its input out, whatever that holds
    }
  }

  // The values; the input itself where it is the only term, times 1.
  const T* of(const T* const* x, int size, Tile<T>& tile) const {
    T* out = tile.at;
    if (terms == 1 && c[0] == T(1)) return x[input[0]];
    const T *x0 = x[input[0]], *x1 = x[input[1]], *x2 = x[input[2]];
    const T c0 = c[0], c1 = c[1], c2 = c[2];
    switch (terms) {
      case 0:
        LOOKSAM_VECTORIZE
        for (int i = 0; i < size; ++i) out[i] = T(0);
        break;
      case 1:
        LOOKSAM_VECTORIZE
        for (int i = 0; i < size; ++i) out[i] = c0 * x0[i];
        break;
      case 2:
        LOOKSAM_VECTORIZE
        for (int i = 0; i < size; ++i) out[i] = c0 * x0[i] + c1 * x1[i];
        break;
      default:
        LOOKSAM_VECTORIZE
        for (int i = 0; i < size; ++i) out[i] = c0 * x0[i] + c1 * x1[i] + c2 * x2[i];
    }
    return out;
  }

  // The values in `tile`, for inputs that are about to be written.
  const T* copy_of(const T* const* x, int size, Tile<T>& tile) const {
    const T* found = of(x, size, tile);
    if (found == tile.at) return found;
    LOOKSAM_VECTORIZE
    for (int i = 0; i < size; ++i) tile.at[i] = found[i];
    return tile.at;
  }
};

template <class T>
void add(T* out, const T* x, int size) {
  LOOKSAM_VECTORIZE
  for (int i = 0; i < size; ++i) out[i] += x[i];
}

// The inputs from one offset on; those that are not of the arithmetic's type are converted into `tile`.
template <class T>
struct Inputs {
  const T* at[kMaxInputs] = {};

  template <class Args>
  Inputs(const Args& a, std::int32_t row, std::int64_t offset, int size, Tile<T>* tile) {
    for (int i = 0; i < a.inputs; ++i) at[i] = values(span(a.input[i], row, offset), size, tile[i], a.memory.ahead);
  }
};

// New weights of bfloat16, before they are stored.
template <class T>
void round_stochastically(T* x, Rounding rounding, std::int32_t row, std::int64_t offset, int size) {
  if (!rounding.stochastic) return;
  const HashSpan random(rounding.key, row, offset);
  std::uint32_t hash[kTile];
  LOOKSAM_VECTORIZE
  for (int i = 0; i < size; ++i) hash[i] = random.hash(i);
  LOOKSAM_VECTORIZE
  for (int i = 0; i < size; ++i) x[i] = stochastically_rounded(x[i], hash[i]);
}

// perturb
// ---------------------------------------------------------------------------------------------------------------

template <class T>
void perturb_chunk(const PerturbArgs& a, const Chunk chunk) {
  const bool from_b = a.from_b[chunk.row] != 0;
  const double eta = a.eta != nullptr ? a.eta[chunk.row] : __builtin_nan("");
  const Combination<T> ascent(a.c, a.input, a.inputs, a.map, chunk.row);
  Tile<T> input_tile[kMaxInputs], e_tile, w_tile, origin_tile, out_tile;
  for (int begin = 0; begin < chunk.size; begin += kTile) {
    const int size = chunk.size - begin < kTile ? chunk.size - begin : kTile;
    const std::int64_t offset = chunk.offset + begin;
    const Span w_span = span(a.w, chunk.row, offset), b_span = span(a.b, chunk.row, offset);
    if (!from_b) copy(b_span, w_span.data, size, a.memory.streams);
    if (ascent.terms == 0) {
      if (from_b) restore(w_span, b_span, size, out_tile);
      continue;
    }
    const T* w = values(w_span, size, w_tile, a.memory.ahead);
    const T* origin = from_b ? values(b_span, size, origin_tile, a.memory.ahead) : w;
    const Inputs<T> x(a, chunk.row, offset, size, input_tile);
    const T* e = ascent.of(x.at, size, e_tile);
    if (a.mask.present()) {
      const MaskSpan mask(a.mask, chunk.row, offset);
      std::uint32_t hash[kTile];
      T* kept = e_tile.at;
      LOOKSAM_VECTORIZE
      for (int i = 0; i < size; ++i) hash[i] = mask.hash(i);
      LOOKSAM_VECTORIZE
      for (int i = 0; i < size; ++i) {
        const T moved = e[i];
        kept[i] = hash[i] < mask.threshold ? moved : T(-0.0);  // origin + -0.0 has origin's bits
      }
      e = kept;
    }
    T* out = target_of(w_span, out_tile);
    if (a.numbers != nullptr) {
      Tile<T> root, moment;
      const Span v = span(a.v, chunk.row, offset);
      roots(root.at, x.at[0], v, Preconditioner<T>(a.numbers, a.map.rows, chunk.row), size, moment, a.memory.ahead);
      e = precondition(e_tile.at, e, root.at, size);
    }
    if (eta != eta) {
      LOOKSAM_VECTORIZE
      for (int i = 0; i < size; ++i) out[i] = perturbed(origin[i], T(1), e[i]);
    } else {
      LOOKSAM_VECTORIZE
      for (int i = 0; i < size; ++i) {
        const T t = adaptive_scale(w[i], static_cast<T>(eta));
        out[i] = perturbed(origin[i], t * t, e[i]);
      }
    }
    if (a.rounding != nullptr) round_stochastically(out, a.rounding[chunk.row], chunk.row, offset, size);
    put(w_span, out, size);
  }
}

void perturb(const PerturbArgs& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t i = first; i < last; ++i) {
    const Chunk chunk = a.map.at(i);
    if (!a.input[0].has(chunk.row)) continue;
    in_double(a.w, a.b, chunk.row) ? perturb_chunk<double>(a, chunk) : perturb_chunk<float>(a, chunk);
  }
  stream_fence();
}

// step
// ------------------------------------------------------------------------------------------------------------------

template <class T>
void restore_chunk(const StepArgs& a, const Chunk chunk) {
  Tile<T> tile;
  for (int begin = 0; begin < chunk.size; begin += kTile) {
    const int size = chunk.size - begin < kTile ? chunk.size - begin : kTile;
    const std::int64_t offset = chunk.offset + begin;
    restore(span(a.w, chunk.row, offset), span(a.b, chunk.row, offset), size, tile);
  }
}

// The new weights go into the master copy where there is one, and from there to w; target_of() and put() of both.
template <class T>
struct Weights {
  Span w, b;
  bool w_was_read, streams;
  Tile<T>& tile;

  T* target_for_new() const {
    return b.data != nullptr ? target_of(b, tile) : w_was_read ? target_of(w, tile) : tile.at;
  }
  void put_new(const T* results, int size) const {
    put(b, results, size);
    w_was_read ? put(w, results, size) : write_once(w, results, size, streams);
  }
};

// The update of a tile: out <- new weights, or lamb's u.
template <class Update, class T>
void update_tile(T* out, const T* w, const T* d, T* const* state, int size, const UpdateScalars<T>& scalars) {
  const UpdateScalars<T> h = scalars;  // a local one: the compiler then knows that it is none of the outputs
  T *x0 = state[0], *x1 = state[1], *x2 = state[2], *x3 = state[3];
  LOOKSAM_VECTORIZE
  for (int i = 0; i < size; ++i) out[i] = update_of<Update>(w[i], d[i], x0[i], x1[i], x2[i], x3[i], h);
}

template <class T>
void step_chunk(const StepArgs& a, std::int64_t index) {
  const Chunk chunk = a.map.at(index);
  const StepRow& row = a.row[chunk.row];
  const UpdateScalars<T> h = row.scalars.to<T>();
  const auto update = with_update(a.base, [](auto base) { return &update_tile<decltype(base), T>; });
  const bool two_phases = with_update(a.base, [](auto base) { return decltype(base)::two_phases; });
  const Combination<T> direction(a.d, a.input, a.inputs, a.map, chunk.row);
  const Combination<T> second(a.q, a.input, a.inputs, a.map, chunk.row);
  const Combination<T> post(a.post, a.input, a.inputs, a.map, chunk.row);
  const bool master = is_master(a.b, a.w, chunk.row);
  InnerProduct qq, ww, uu;
  if (a.q != nullptr) qq.clear();
  if (two_phases) ww.clear(), uu.clear();
  Tile<T> input_tile[kMaxInputs], d_tile, q_tile, post_tile, origin_tile, out_tile, state_tile[kMaxStates];

  for (int begin = 0; begin < chunk.size; begin += kStepTile) {
    const int size = chunk.size - begin < kStepTile ? chunk.size - begin : kStepTile;
    const std::int64_t offset = chunk.offset + begin;
    const Inputs<T> x(a, chunk.row, offset, size, input_tile);
    const T* d = direction.of(x.at, size, d_tile);
    // Before anything is written: what is written, a state or w may be one of the inputs.
    const T* added = post.terms > 0 && !two_phases ? post.copy_of(x.at, size, post_tile) : nullptr;
    const T* q = a.q != nullptr && a.written.has(chunk.row) ? second.of(x.at, size, q_tile) : nullptr;

    const Span w_span = span(a.w, chunk.row, offset), b_span = span(a.b, chunk.row, offset);
    const T* w = values(row.from_b ? b_span : w_span, size, origin_tile, a.memory.ahead);
    if (a.base == Base::grad) {
      if (row.from_b) restore(w_span, b_span, size, out_tile);
    } else {
      const Weights<T> target{w_span, master ? b_span : Span{nullptr, Dtype::f32}, !row.from_b, a.memory.streams,
                              out_tile};
      T* out = two_phases ? static_cast<T*>(a.u) + offset : target.target_for_new();
      Span state_span[kMaxStates];
      T* state[kMaxStates];
      for (int k = 0; k < kMaxStates; ++k) {
        state_span[k] = span(a.state[k], chunk.row, offset);
        state[k] = state_span[k].data != nullptr ? values(state_span[k], size, state_tile[k], a.memory.ahead)
                                                 : state_tile[k].at;
      }
      update(out, w, d, state, size, h);
      for (int k = 0; k < kMaxStates; ++k) put(state_span[k], state[k], size);
      if (two_phases) {
        ww.add(w, w, size);
        uu.add(out, out, size);
      } else {
        if (added != nullptr) add(out, added, size);
        round_stochastically(out, row.rounding, chunk.row, offset, size);
        target.put_new(out, size);
      }
    }
    if (q != nullptr) {
      qq.add(q, q, size);
      write_once(span(a.written, chunk.row, offset), q, size, a.memory.streams);
    }
    // Last, because q may be the first input itself.
    if (a.base == Base::grad) put(span(a.input[0], chunk.row, offset), d, size);
  }
  if (a.q != nullptr) a.q_sq[index] = qq.total(chunk.size);
  if (two_phases) a.w_sq[index] = ww.total(chunk.size), a.u_sq[index] = uu.total(chunk.size);
}

void step(const StepArgs& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t i = first; i < last; ++i) {
    if (last - first >= kManyChunks && i + kChunksAhead < last) {
      const std::int32_t later = a.map.row_of[i + kChunksAhead];
      for (const Column& column : {a.w, a.b, a.written, a.input[0], a.input[1], a.input[2]}) prefetch(column, later);
      for (const Column& column : a.state) prefetch(column, later);
    }
    const Chunk chunk = a.map.at(i);
    const bool wide = in_double(a.w, a.b, chunk.row);
    switch (a.row[chunk.row].action) {
      case Action::skip: break;
      case Action::restore: wide ? restore_chunk<double>(a, chunk) : restore_chunk<float>(a, chunk); break;
      case Action::update: wide ? step_chunk<double>(a, i) : step_chunk<float>(a, i);
    }
  }
  stream_fence();
}

template <class T>
void lamb_apply_chunk(const StepArgs& a, const Chunk chunk) {
  const StepRow& row = a.row[chunk.row];
  const UpdateScalars<T> h = row.scalars.to<T>();
  const T trust_ratio = static_cast<T>(row.trust_ratio);
  const Combination<T> post(a.post, a.input, a.inputs, a.map, chunk.row);
  const bool master = is_master(a.b, a.w, chunk.row);
  Tile<T> input_tile[kMaxInputs], post_tile, origin_tile, out_tile;
  for (int begin = 0; begin < chunk.size; begin += kStepTile) {
    const int size = chunk.size - begin < kStepTile ? chunk.size - begin : kStepTile;
    const std::int64_t offset = chunk.offset + begin;
    const Span w_span = span(a.w, chunk.row, offset), b_span = span(a.b, chunk.row, offset);
    const T* w = values(row.from_b ? b_span : w_span, size, origin_tile, a.memory.ahead);
    const T* u = values(Span{static_cast<T*>(a.u) + offset, dtype_of<T>}, size, out_tile, a.memory.ahead);
    const Weights<T> target{w_span, master ? b_span : Span{nullptr, Dtype::f32}, !row.from_b, a.memory.streams,
                            out_tile};
    T* out = target.target_for_new();
    LOOKSAM_VECTORIZE
    for (int i = 0; i < size; ++i) out[i] = Lamb::apply(w[i], u[i], trust_ratio, h);
    if (post.terms > 0) {
      const Inputs<T> x(a, chunk.row, offset, size, input_tile);
      add(out, post.of(x.at, size, post_tile), size);
    }
    round_stochastically(out, row.rounding, chunk.row, offset, size);
    target.put_new(out, size);
  }
}

void lamb_apply(const StepArgs& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t i = last - 1; i >= first; --i) {
    const Chunk chunk = a.map.at(i);
    if (a.row[chunk.row].action != Action::update) continue;
    in_double(a.w, a.b, chunk.row) ? lamb_apply_chunk<double>(a, chunk) : lamb_apply_chunk<float>(a, chunk);
  }
}

}  // namespace

const Kernels LOOKSAM_ISA = {LOOKSAM_ISA_NAME, sums, perturb, step, lamb_apply};

}  // namespace looksam::cpu
