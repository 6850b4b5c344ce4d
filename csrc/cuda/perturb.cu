#include "dispatch.cuh"

namespace looksam::cuda {

void perturb(Kind kind, std::int64_t blocks, const PerturbArgs& args, Stream stream) {
  with_types(kind, [&](auto types) { execute<PerturbBody<decltype(types)>>("perturb", blocks, args, stream); });
}

}  // namespace looksam::cuda
