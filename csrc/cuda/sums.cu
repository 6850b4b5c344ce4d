#include <algorithm>

#include "dispatch.cuh"

namespace looksam::cuda {

void sums(Kind kind, const LargeSums& launch, int groups, Stream stream) {
  // Blocks there must be, for the coefficients of a table without elements.
  const std::int64_t blocks = std::max<std::int64_t>((launch.args.chunks_here + kChunksABlock - 1) / kChunksABlock, 1);
  const std::int32_t passed = launch.args.passed_to != nullptr ? launch.args.rows.count : 0;
  with_types(kind, [&](auto types) {
    using T = decltype(types);
    if (passed > SmallSums::rows || groups > SmallSums::groups)
      return execute<SumsBody<T, LargeSums>>("sums", blocks, launch, stream);
    SmallSums small;
    small.args = launch.args;
    std::copy_n(launch.group, groups, small.group);
    std::copy_n(launch.column.low, passed, small.column.low);
    std::copy_n(launch.column.high, passed, small.column.high);
    execute<SumsBody<T, SmallSums>>("sums", blocks, small, stream);
  });
}

void lars(const LarsArgs& args, Stream stream) {
  execute<LarsBody>("lars", (args.rule.rows + kThreads - 1) / kThreads, args, stream);
}

}  // namespace looksam::cuda
