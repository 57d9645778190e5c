// bf16 and fp16 in memory, and their conversions to and from fp32 (round to nearest even, NaN kept) without special
// instructions.
#pragma once
#include "vector.h"

namespace prefopt::PREFOPT_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

PREFOPT_INLINE float to_float(float x) { return x; }

PREFOPT_INLINE float to_float(bf16 x) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16)); }

PREFOPT_INLINE float to_float(fp16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // the exponent's bias differs by 112; the product is exact, for subnormal numbers too
  const float finite = float_of(static_cast<int32_t>(magnitude << 13)) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(bits_of(finite)) | special | (x.bits & 0x8000u) << 16));
}

PREFOPT_INLINE void from_float(float x, float* out) { *out = x; }

PREFOPT_INLINE void from_float(float x, bf16* out) {
  const uint32_t b = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

PREFOPT_INLINE void from_float(float x, fp16* out) {
  const uint32_t b = static_cast<uint32_t>(bits_of(x));
  const uint32_t magnitude = b & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // adding 0.5 lines a subnormal result up with the last bits of the sum, which rounds it
  const uint32_t subnormal =
      static_cast<uint32_t>(bits_of(float_of(static_cast<int32_t>(magnitude)) + 0.5f)) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // 65520 and above round to infinity
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  out->bits = static_cast<uint16_t>(h | (b >> 16 & 0x8000u));
}

}  // namespace prefopt::PREFOPT_ISA
