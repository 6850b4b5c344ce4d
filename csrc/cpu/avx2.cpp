// All headers come before the target changes: code that they emit must run on every processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../core/vec.h"
#include "args.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LOOKSAM_VECTOR_BYTES 32
#define LOOKSAM_ISA avx2
#define LOOKSAM_ISA_NAME "avx2"
#include "chunks.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
