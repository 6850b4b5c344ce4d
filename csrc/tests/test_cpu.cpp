// The CPU ops on plain arrays, each in storage of its exact size so that AddressSanitizer sees every overrun.
//
// Every instruction set, dtype, odd size and partition of the chunks against one element at a time in double.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>

#include "../core/dtype.h"
#include "../cpu/ops.h"

using namespace looksam;

namespace {

int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++failures <= 20) {                       \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

// A tensor that starts `shift` elements into its storage.
struct Array {
  Dtype dtype;
  std::int64_t size;
  std::vector<char> storage;
  void* data;

  Array(Dtype dtype, std::int64_t size, int shift = 0)
      : dtype(dtype),
        size(size),
        storage((size + shift) * size_of(dtype) + 1),
        data(storage.data() + shift * size_of(dtype)) {}
  Array(const Array&) = delete;

  double get(std::int64_t i) const {
    switch (dtype) {
      case Dtype::f32: return static_cast<const float*>(data)[i];
      case Dtype::f64: return static_cast<const double*>(data)[i];
      case Dtype::f16: return widen(static_cast<const float16*>(data)[i]);
      default: return widen(static_cast<const bfloat16*>(data)[i]);
    }
  }
  void set(std::int64_t i, double x) {
    switch (dtype) {
      case Dtype::f32: static_cast<float*>(data)[i] = static_cast<float>(x); break;
      case Dtype::f64: static_cast<double*>(data)[i] = x; break;
      case Dtype::f16: static_cast<float16*>(data)[i] = as<float16>(x); break;
      default: static_cast<bfloat16*>(data)[i] = as<bfloat16>(x);
    }
  }
  void fill(int seed, double least) {
    std::srand(seed);
    for (std::int64_t i = 0; i < size; ++i) set(i, least + std::rand() / (RAND_MAX + 1.0));
  }
};

// Rounding of one store of a number of size 1 to 4.
double ulp(Dtype dtype) {
  return dtype == Dtype::f64 ? 1e-15 : dtype == Dtype::f32 ? 5e-7 : dtype == Dtype::f16 ? 2e-3 : 2e-2;
}

struct Owned {
  std::vector<std::unique_ptr<Array>> arrays;
  std::vector<void*> data;
  std::vector<Dtype> dtype;
  Column column() const { return {data.data(), dtype.data()}; }
  void add(Dtype type, std::int64_t size, int shift, int seed, double least = 0.5) {
    arrays.push_back(std::make_unique<Array>(type, size, shift));
    arrays.back()->fill(seed, least);
    data.push_back(arrays.back()->data);
    dtype.push_back(type);
  }
  double get(std::size_t row, std::int64_t i) const { return arrays[row]->get(i); }
};

// Runs the parts last first and of uneven sizes: nothing may depend on who does what when.
void uneven(std::int64_t count, std::int64_t, const cpu::Body& body) {
  for (std::int64_t last = count; last > 0;) {
    const std::int64_t first = last > 3 ? last - 3 : 0;
    body(first, last);
    last = first;
  }
}
void whole(std::int64_t count, std::int64_t, const cpu::Body& body) {
  if (count > 0) body(0, count);
}

const std::vector<std::int64_t> kSizes = {
    0, 1, 3, 31, 33, 255, 256, 257, 4097, kChunk - 1, kChunk + 1, 3 * kChunk + 5, 9 * kChunk + 1};
const Dtype kDtypes[] = {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16};

struct Fixture {
  Owned w, b, g, s, state[kMaxStates], q;
  std::vector<std::int64_t> sizes;
  ChunkList chunks;

  explicit Fixture(bool master) {
    int seed = 1;
    for (const Dtype type : kDtypes) {
      const Dtype wide = type == Dtype::f64 ? Dtype::f64 : Dtype::f32;
      for (const std::int64_t size : kSizes) {
        const int shift = seed % 3;
        w.add(type, size, shift, ++seed);
        b.add(master ? wide : type, size, shift, ++seed);
        for (Owned* column : {&g, &s}) column->add(type, size, shift, ++seed);
        // The first may be a mean square, and the second the mean.
        state[0].add(wide, size, shift, ++seed, 3);
        for (Owned* column : {&state[1], &state[2], &state[3], &q}) column->add(wide, size, shift, ++seed);
        sizes.push_back(size);
      }
    }
    chunks = ChunkList(sizes);
  }
};

void test_conversions() {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float16 half{static_cast<std::uint16_t>(bits)};
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    if (bits & 0x8000) value = -value;
    const float wide = widen(half);
    CHECK(std::isnan(value) ? std::isnan(wide) : wide == value && std::signbit(wide) == std::signbit(value), "%x",
          bits);
    if (!std::isnan(value)) CHECK(narrow_f16(wide).bits == bits, "%x", bits);
    const bfloat16 brain{static_cast<std::uint16_t>(bits)};
    if (!std::isnan(widen(brain))) CHECK(narrow_bf16(widen(brain)).bits == bits, "%x", bits);
    if (std::isfinite(widen(brain))) {
      CHECK(narrow_bf16(float_of(bits << 16 | 0x8000)).bits == bits + (bits & 1), "%x", bits);
      CHECK(narrow_bf16(float_of(bits << 16 | 0x8001)).bits == bits + 1, "%x", bits);
      CHECK(narrow_bf16(float_of(bits << 16 | 0x7fff)).bits == bits, "%x", bits);
    }
    if (exponent == 31) continue;
    // Half way to the next half rounds to the even one, a little more rounds up.
    const float next =
        exponent == 30 && mantissa == 1023 ? std::copysign(65536.0f, wide) : widen(float16{std::uint16_t(bits + 1)});
    const float middle = (wide + next) / 2;
    CHECK(narrow_f16(middle).bits == bits + (bits & 1), "%x", bits);
    CHECK(narrow_f16(std::nextafter(middle, next)).bits == bits + 1, "%x", bits);
  }
  CHECK(narrow_f16(NAN).bits == 0x7e00, "NaN");
  CHECK(narrow_bf16(NAN).bits == 0x7fc0, "NaN");
  CHECK(narrow_f16(1e30f).bits == 0x7c00, "overflow");
}

void test_chunks() {
  const std::int64_t huge = (std::int64_t{1} << 31) + 7;
  const ChunkList list({5, huge, 0, kChunk});
  const ChunkMap map = list.map();
  CHECK(map.chunks == 1 + (huge + kChunk - 1) / kChunk + 1, "%lld", static_cast<long long>(map.chunks));
  const Chunk last = map.at(map.chunks - 2);
  CHECK(last.row == 1 && last.offset + last.size == huge && last.size == 7, "%d", last.size);
  const Chunk whole_chunk = map.at(map.chunks - 1);
  CHECK(whole_chunk.row == 3 && whole_chunk.offset == 0 && whole_chunk.size == kChunk, "%d", whole_chunk.row);
}

std::vector<double> test_sums(const cpu::ParallelFor& parallel_for) {
  const Fixture f(false);
  const double some_eta = 0.25;
  std::vector<double> eta;
  for (std::size_t row = 0; row < f.sizes.size(); ++row) eta.push_back(row % 2 ? some_eta : NAN);
  cpu::SumsArgs args = {};
  args.map = f.chunks.map();
  args.w = f.w.column();
  args.eta = eta.data();
  args.operands = 3;
  args.operand[0] = {f.g.column(), false}, args.operand[1] = {f.s.column(), false},
  args.operand[2] = {f.g.column(), true};
  args.pairs = 3;
  args.x[0] = 0, args.y[0] = 0, args.x[1] = 0, args.y[1] = 1, args.x[2] = 2, args.y[2] = 2;
  std::vector<double> values(3 * f.sizes.size());
  cpu::sums(args, values.data(), parallel_for);
  for (std::size_t row = 0; row < f.sizes.size(); ++row) {
    double truth[3] = {};
    for (std::int64_t i = 0; i < f.sizes[row]; ++i) {
      const double g = f.g.get(row, i), t = row % 2 ? std::fabs(f.w.get(row, i)) + some_eta : 1;
      truth[0] += g * g, truth[1] += g * f.s.get(row, i), truth[2] += t * g * t * g;
    }
    for (int p = 0; p < 3; ++p) {
      const double value = values[p * f.sizes.size() + row];
      CHECK(std::fabs(value - truth[p]) <= 3e-7 * truth[p], "pair %d row %zu: %.17g, not %.17g", p, row, value,
            truth[p]);
    }
  }
  return values;
}

// Hashes computed from the mask's description: beyond 2^32, too, where no test has a tensor.
void test_mask() {
  struct Known {
    std::int32_t row;
    std::int64_t offset;
    int i;
    std::uint32_t hash;
  };
  for (const Known& known : {Known{7, 5 * 8192, 11, 0x8288ca6e}, Known{7, 3 * (1LL << 32) + 5 * 8192, 11, 0x6a6db28b},
                             Known{0, (1LL << 32) - 8192, 8191, 0xaa3b798b}}) {
    const bool above = MaskSpan({0x12345678, known.hash}, known.row, known.offset).keeps(known.i);
    const bool below = MaskSpan({0x12345678, known.hash + 1}, known.row, known.offset).keeps(known.i);
    CHECK(!above && below, "row %d offset %lld", known.row, static_cast<long long>(known.offset));
  }
}

std::vector<double> test_perturb_and_step(Base base, bool master, const cpu::ParallelFor& parallel_for) {
  Fixture f(master), before(master);
  const std::size_t rows = f.sizes.size();
  const std::vector<double> c(rows, 0.125);
  std::vector<unsigned char> from_b;
  for (std::size_t row = 0; row < rows; ++row) from_b.push_back(f.b.dtype[row] != f.w.dtype[row]);
  cpu::PerturbArgs perturb = {};
  perturb.map = f.chunks.map();
  perturb.w = f.w.column(), perturb.b = f.b.column(), perturb.from_b = from_b.data();
  perturb.inputs = 1, perturb.input[0] = f.g.column(), perturb.c = c.data();
  const bool masked = base == Base::grad;
  if (masked) perturb.mask = {17, 0x60000000};
  cpu::perturb(perturb, parallel_for);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < f.sizes[row]; ++i) {
      const double origin = from_b[row] ? before.b.get(row, i) : before.w.get(row, i);
      const double moved = origin + 0.125 * f.g.get(row, i);
      const double expected =
          !masked || MaskSpan(perturb.mask, static_cast<std::int32_t>(row), 0).keeps(static_cast<int>(i)) ? moved
                                                                                                          : origin;
      CHECK(std::fabs(f.w.get(row, i) - expected) <= ulp(f.w.dtype[row]), "row %zu element %lld", row,
            static_cast<long long>(i));
      CHECK(f.b.get(row, i) == origin, "row %zu element %lld: backup", row, static_cast<long long>(i));
    }
  }

  BaseHyper h = {};
  h.lr = 0.01;
  if (base != Base::grad) {
    with_update(base, [&](auto update) {
      double value = 0.1;
      for (const Option& option : decltype(update)::reads) {
        if (option.number != nullptr) h.*option.number = value, value += 0.17;
        if (option.flag != nullptr) h.*option.flag = true;
      }
    });
  }
  const int states =
      base == Base::grad ? 0 : with_update(base, [](auto update) { return states_of<decltype(update)>; });
  const std::vector<const BaseHyper*> base_of_row(rows, &h);
  std::vector<cpu::StepRow> plan(rows, {cpu::Action::update, true, 0, base_scalars(h, 3)});
  std::vector<double> d(2 * rows), q(2 * rows), post(2 * rows), q_sq(rows);
  for (std::size_t row = 0; row < rows; ++row)
    d[row] = 1, d[rows + row] = 0.25, q[row] = 1, q[rows + row] = -0.5, post[row] = 0.125;
  cpu::StepArgs step = {};
  step.map = f.chunks.map();
  step.base = base;
  step.inputs = 2;
  step.input[0] = f.s.column(), step.input[1] = f.g.column();
  step.d = d.data(), step.q = q.data(), step.post = post.data();
  step.w = f.w.column(), step.b = f.b.column(), step.written = f.q.column();
  for (int k = 0; k < states; ++k) step.state[k] = f.state[k].column();
  cpu::step(step, plan.data(), base_of_row.data(), q_sq.data(), parallel_for);

  std::vector<double> results;
  for (std::size_t row = 0; row < rows; ++row) {
    std::vector<double> new_w, new_state[kMaxStates];
    double norm = 0, ww = 0, uu = 0;
    for (std::int64_t i = 0; i < f.sizes[row]; ++i) {
      const double s = before.s.get(row, i), g = before.g.get(row, i), dir = s + 0.25 * g;
      const double w = from_b[row] ? before.b.get(row, i) : before.w.get(row, i);
      double x[kMaxStates];
      for (int k = 0; k < kMaxStates; ++k) x[k] = before.state[k].get(row, i);
      norm += (s - 0.5 * g) * (s - 0.5 * g);
      const double result = base == Base::grad ? w : with_update(base, [&](auto update) {
        return update_of<decltype(update)>(w, dir, x[0], x[1], x[2], x[3], plan[row].scalars);
      });
      ww += w * w, uu += result * result;
      new_w.push_back(result);
      for (int k = 0; k < kMaxStates; ++k) new_state[k].push_back(x[k]);
    }
    CHECK(std::fabs(q_sq[row] - norm) <= 1e-6 * norm, "row %zu: ||q||^2", row);
    for (std::int64_t i = 0; i < f.sizes[row]; ++i) {
      const Dtype wide = f.state[0].dtype[row];
      const double s = before.s.get(row, i), g = before.g.get(row, i);
      const double w = from_b[row] ? before.b.get(row, i) : before.w.get(row, i);
      if (in_two_phases(base)) new_w[i] = Lamb::apply(w, new_w[i], trust_ratio(ww, uu, h), plan[row].scalars);
      if (base != Base::grad) new_w[i] += 0.125 * s;
      const auto element = static_cast<long long>(i);
      CHECK(std::fabs(f.w.get(row, i) - new_w[i]) <= ulp(f.w.dtype[row]), "w: row %zu element %lld", row, element);
      if (from_b[row] && base != Base::grad)
        CHECK(std::fabs(f.b.get(row, i) - new_w[i]) <= ulp(wide), "b: row %zu element %lld", row, element);
      for (int k = 0; k < kMaxStates; ++k)
        CHECK(std::fabs(f.state[k].get(row, i) - new_state[k][i]) <= 4 * ulp(wide), "state %d: row %zu element %lld", k,
              row, element);
      if (base == Base::grad)
        CHECK(std::fabs(f.s.get(row, i) - (s + 0.25 * g)) <= ulp(f.s.dtype[row]), "x: row %zu element %lld", row,
              element);
      CHECK(std::fabs(f.q.get(row, i) - (s - 0.5 * g)) <= ulp(wide), "q: row %zu element %lld", row, element);
      for (const Owned* column : {&f.w, &f.b, &f.state[0], &f.state[1], &f.state[2], &f.state[3], &f.q})
        results.push_back(column->get(row, i));
    }
    results.push_back(q_sq[row]);
  }
  return results;
}

}  // namespace

int main() {
  test_conversions();
  test_chunks();
  test_mask();
  std::vector<std::vector<double>> first;
  for (const cpu::Kernels* kernels : cpu::available_isas()) {
    cpu::use_isa(kernels->name);
    for (const cpu::ParallelFor& parallel_for : {cpu::ParallelFor(whole), cpu::ParallelFor(uneven)}) {
      std::vector<std::vector<double>> results = {test_sums(parallel_for)};
      for_each_base([&](const char*, Base base) {
        for (const bool master : {false, true}) results.push_back(test_perturb_and_step(base, master, parallel_for));
      });
      if (first.empty()) first = results;
      CHECK(results == first, "%s: not the bits of %s", kernels->name, cpu::available_isas().front()->name);
    }
    std::printf("%s: %d failures so far\n", kernels->name, failures);
  }
  return failures == 0 ? 0 : 1;
}
