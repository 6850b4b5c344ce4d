// Element types and their conversions. Storage is one of four types; arithmetic is float, or double for double storage.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LOOKSAM_HD __host__ __device__ __forceinline__
#else
// Always inlined, so that a translation unit built for AVX-512 can never lend its copy to the baseline build.
#define LOOKSAM_HD inline __attribute__((always_inline))
#endif

namespace looksam {

enum class Dtype : std::uint8_t { f32, f64, f16, bf16 };

struct float16 {
  std::uint16_t bits;
};
struct bfloat16 {
  std::uint16_t bits;
};

LOOKSAM_HD int size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

LOOKSAM_HD std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

LOOKSAM_HD float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The host conversions have no branches, only selects, so that loops over them vectorise on every instruction set.

LOOKSAM_HD float widen(bfloat16 x) { return float_of(std::uint32_t{x.bits} << 16); }

LOOKSAM_HD float widen(float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const std::uint32_t sign = (std::uint32_t{x.bits} & 0x8000u) << 16;
  const std::uint32_t magnitude = std::uint32_t{x.bits} & 0x7fffu;
  // Normal numbers: rebias the exponent by a product, which also carries infinity and NaN (1.9e34 = 2^-112 undone).
  const float normal = float_of((magnitude << 13) + (224u << 23)) * float_of(15u << 23);
  // Subnormal numbers: the mantissa above 0.5, then 0.5 taken off; exact, and never a subnormal float.
  const float subnormal = float_of(magnitude | (126u << 23)) - 0.5f;
  return float_of(sign | bits_of(magnitude < 0x0400u ? subnormal : normal));
#endif
}

LOOKSAM_HD bfloat16 narrow_bf16(float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

LOOKSAM_HD float16 narrow_f16(float x) {
#if defined(__CUDA_ARCH__)
  float16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  const std::uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  // Below 2^-14 the half is subnormal: adding 0.5 makes the float's own rounding (to nearest even) stop at 2^-24.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - (126u << 23);
  const std::uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, or infinity from 65520 on
  return {static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite))};
#endif
}

// as<Target>(x): x in another type, rounded to nearest even.

template <class To>
LOOKSAM_HD To as(float x) {
  return static_cast<To>(x);
}
template <class To>
LOOKSAM_HD To as(double x) {
  return static_cast<To>(x);
}
template <class To>
LOOKSAM_HD To as(float16 x) {
  return static_cast<To>(widen(x));
}
template <class To>
LOOKSAM_HD To as(bfloat16 x) {
  return static_cast<To>(widen(x));
}
template <>
LOOKSAM_HD float16 as<float16>(float x) {
  return narrow_f16(x);
}
template <>
LOOKSAM_HD float16 as<float16>(double x) {
  return narrow_f16(static_cast<float>(x));
}
template <>
LOOKSAM_HD bfloat16 as<bfloat16>(float x) {
  return narrow_bf16(x);
}
template <>
LOOKSAM_HD bfloat16 as<bfloat16>(double x) {
  return narrow_bf16(static_cast<float>(x));
}

}  // namespace looksam
