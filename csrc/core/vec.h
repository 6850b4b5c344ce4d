// 16-byte accesses: the only file that knows alignment.
#pragma once

#include "dtype.h"

#if defined(__SSE2__) && !defined(__CUDACC__)
#include <emmintrin.h>
#endif

namespace looksam {

// Is memory wanted again soon, or read or written once and better kept out of the caches?
enum class Cache { keep, stream };

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T lane[size];
};

LOOKSAM_HD bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// p is aligned to 16 bytes.
template <Cache cache = Cache::keep, class T>
LOOKSAM_HD Pack<T> load(const T* p) {
  Pack<T> pack;
#if defined(__CUDA_ARCH__)
  const uint4* source = reinterpret_cast<const uint4*>(p);
  __builtin_assume(__isGlobal(source));  // tensors are; otherwise this is a slower, generic load
  const uint4 raw = cache == Cache::stream ? __ldcs(source) : *source;
  memcpy(&pack, &raw, 16);
#else
  pack = *reinterpret_cast<const Pack<T>*>(p);  // whose alignment a sanitizer checks, as it does not in memcpy
#endif
  return pack;
}

// p is aligned to 16 bytes. Streamed stores of the host are seen by other threads only after stream_fence().
template <Cache cache = Cache::keep, class T>
LOOKSAM_HD void store(T* p, const Pack<T>& pack) {
#if defined(__CUDA_ARCH__)
  uint4* const target = reinterpret_cast<uint4*>(p);
  uint4 raw;
  memcpy(&raw, &pack, 16);
  __builtin_assume(__isGlobal(target));
  if (cache == Cache::stream) {
    __stcs(target, raw);
  } else {
    *target = raw;
  }
#elif defined(__SSE2__) && !defined(__CUDACC__)
  if (cache == Cache::stream) {
    __m128i raw;
    memcpy(&raw, &pack, 16);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), raw);
  } else {
    *reinterpret_cast<Pack<T>*>(p) = pack;
  }
#else
  *reinterpret_cast<Pack<T>*>(p) = pack;
#endif
}

#if !defined(__CUDACC__)

LOOKSAM_HD void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// to <- from, size elements, past the caches: saves reading `to` for ownership. `to` is aligned to its element.
template <class T>
LOOKSAM_HD void stream_copy(T* to, const T* from, int size) {
  int i = 0;
  for (; i < size && !aligned(to + i); ++i) to[i] = from[i];
  for (; i + Pack<T>::size <= size; i += Pack<T>::size) {
    Pack<T> pack;
    memcpy(&pack, from + i, 16);
    store<Cache::stream>(to + i, pack);
  }
  for (; i < size; ++i) to[i] = from[i];
}

#endif

}  // namespace looksam
