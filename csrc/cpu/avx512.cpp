// All headers come before the target changes: code that they emit must run on every processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../core/vec.h"
#include "args.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define LOOKSAM_VECTOR_BYTES 64
#define LOOKSAM_ISA avx512
#define LOOKSAM_ISA_NAME "avx512"
#include "chunks.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
