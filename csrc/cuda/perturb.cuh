// perturb: b <- w, w <- w + T^2 sum_i c_i x_i, in the rows that have the first input and the elements that the mask
// keeps; with a preconditioner w <- w + T sum_i c_i x_i, its g the first input.
#pragma once

#include <type_traits>

#include "../core/masks.h"
#include "block.cuh"
#include "table.cuh"

namespace looksam::cuda {

struct PerturbArgs {
  ChunkMap map;
  Rows rows;
  std::int32_t inputs;
  const Ref* input[kMaxInputs];
  const Ref *w, *b;
  const double* eta;      // [rows], NaN where T = 1; null: everywhere
  const Ref* v;           // a preconditioner's second moment; null: there is none
  const double* numbers;  // and its numbers, [4, rows of the whole table]
  const double* c;        // [inputs, rows of the whole table]
  Mask mask;
  const Ref* count;  // scalars of type float; null: everything is rounded to nearest
  std::uint32_t rounding_key;
  Bits perturbed;  // rows that start from b and leave it alone, as those do whose b is a master copy
};

template <class T>
struct PerturbBody {
  using Wide = typename T::Wide;
  static constexpr int kBlocksPerProcessor = T::blocks_per_processor;

  struct Shared {};

  template <class Block>
  LOOKSAM_HD static void run(const Block& block, Shared&, const PerturbArgs& a) {
    const Chunk chunk = a.map.at(a.rows.first_chunk + block.index());
    if (!at(a.input[0], chunk.row).present()) return;
    const Combination<T> combination(a.c, a.inputs, a.map.rows, chunk.row);
    const bool preconditioned = a.v != nullptr;
    const auto span = [&](int i) {
      const bool read = combination.c[i] != 0 || (preconditioned && i == 0);
      return Span<T>(read ? at(a.input[i], chunk.row) : Ref{0}, chunk.offset);
    };
    const Span<T> x[kMaxInputs] = {span(0), span(1), span(2)};
    const Span<T> w(a.w[chunk.row], chunk.offset), b(a.b[chunk.row], chunk.offset);
    const bool from_b = w.narrow() != b.narrow() || a.perturbed.has(chunk.row - a.rows.first);
    const bool moves = !combination.is_zero();
    const double eta = a.eta != nullptr ? a.eta[chunk.row] : 0;
    const bool scaled = a.eta != nullptr && eta == eta;
    // w is read where the perturbation starts from it, or is scaled with it.
    const Span<T> current(!from_b || scaled ? a.w[chunk.row] : Ref{0}, chunk.offset);
    const StateSpan<T> v(at(a.v, chunk.row), chunk.offset);
    const MaskSpan mask(a.mask, chunk.row, chunk.offset);
    Rounding rounding = {};
    if (has_bfloat16<T> && a.count != nullptr && w.narrow() && b.narrow())
      rounding = {rounding_key(a.rounding_key, WrittenBy::perturb,
                               *reinterpret_cast<const float*>(a.count[chunk.row].data()) + 1),
                  true};
    const bool aligned =
        w.aligned() && b.aligned() && x[0].aligned() && x[1].aligned() && x[2].aligned() && v.aligned();

    for_each_vector<T>(block, chunk.size, aligned, [&](int i, int size, bool whole) {
      struct Loaded {
        Raw<T> x[kMaxInputs], w, v, b;
      };
      const auto load = [&](auto is_whole) {
        constexpr bool kWhole = decltype(is_whole)::value;
        Loaded loaded = {{x[0].template load<kWhole>(i, size), x[1].template load<kWhole>(i, size),
                          x[2].template load<kWhole>(i, size)},
                         current.template load<kWhole>(i, size),
                         v.template load<kWhole>(i, size),
                         {}};
        if (from_b) loaded.b = b.template load<kWhole>(i, size);
        return loaded;
      };
      const Loaded loaded = whole ? load(std::true_type{}) : load(std::false_type{});

      const Vector<T> before = loaded.w.values();
      const Vector<T> origin = from_b ? loaded.b.values() : before;
      Vector<T> moved = origin;
      if (moves) {
        const Vector<T> inputs[kMaxInputs] = {loaded.x[0].values(), loaded.x[1].values(), loaded.x[2].values()};
        Vector<T> e = combination.of(inputs);
        if (a.mask.present())
          for (int k = 0; k < T::lanes; ++k)
            if (!mask.keeps(i + k)) e.lane[k] = Wide(-0.0);  // origin + -0.0 has origin's bits
        if (preconditioned) {
          const Preconditioner<Wide> p(a.numbers, a.map.rows, chunk.row);
          const Vector<T> moment = loaded.v.values();
          for (int k = 0; k < T::lanes; ++k)
            e.lane[k] = over_root(e.lane[k], p.root(inputs[0].lane[k], moment.lane[k]));
        }
        for (int k = 0; k < T::lanes; ++k) {
          const Wide t = scaled ? adaptive_scale(before.lane[k], static_cast<Wide>(eta)) : Wide(1);
          moved.lane[k] = looksam::perturbed(origin.lane[k], t * t, e.lane[k]);
        }
        round_stochastically<T>(moved, rounding, chunk, i);
      }
      const auto store = [&](auto is_whole) {
        constexpr bool kWhole = decltype(is_whole)::value;
        if (!from_b) b.template store<kWhole, Cache::stream>(i, size, origin);
        w.template store<kWhole>(i, size, moved);
      };
      whole ? store(std::true_type{}) : store(std::false_type{});
    });
  }
};

}  // namespace looksam::cuda
