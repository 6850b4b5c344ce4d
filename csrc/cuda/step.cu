#include "dispatch.cuh"

namespace looksam::cuda {

void step(Kind kind, std::int64_t blocks, const StepArgs& args, Stream stream) {
  with_types(kind, [&](auto types) {
    with_update(args.base, [&](auto update) {
      execute<StepBody<decltype(types), decltype(update)>>("step", blocks, args, stream);
    });
  });
}

void lamb_apply(Kind kind, std::int64_t blocks, const StepArgs& args, Stream stream) {
  with_types(kind, [&](auto types) { execute<LambBody<decltype(types)>>("step, second pass", blocks, args, stream); });
}

}  // namespace looksam::cuda
