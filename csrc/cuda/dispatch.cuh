// A Kind, known at run time, as the Types of a body.
#pragma once

#if defined(LOOKSAM_HARNESS)
#include "../harness/execute.h"
#else
#include "execute.cuh"
#endif

namespace looksam::cuda {

template <class Run>
void with_types(Kind kind, const Run& run) {
  switch (kind) {
    case Kind::f32: return run(Types<float, float>{});
    case Kind::bf16: return run(Types<float, bfloat16>{});
    case Kind::f16: return run(Types<float, float16>{});
    case Kind::f64: return run(Types<double, float>{});
  }
}

}  // namespace looksam::cuda
