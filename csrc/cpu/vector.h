// One vector type per instruction set, with the few functions that the kernels need.
//
// A kernel source sets PREFOPT_ISA (a namespace) and PREFOPT_LANES (floats in a register) and raises the instruction
// set with
// `#pragma GCC target` before it includes this file, so no compiler flag is needed and nothing outside its namespace is
// compiled for a machine that may not be there. No library header with inline functions may be included after the
// pragma.
#pragma once
#include <stdint.h>

namespace prefopt::PREFOPT_ISA {

constexpr int kLanes = PREFOPT_LANES;
typedef float vf __attribute__((vector_size(4 * PREFOPT_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * PREFOPT_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * PREFOPT_LANES)));

#define PREFOPT_INLINE inline __attribute__((always_inline))

PREFOPT_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

PREFOPT_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

PREFOPT_INLINE vi splat_bits(int32_t x) {
#if PREFOPT_LANES == 16
  return vi{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif PREFOPT_LANES == 8
  return vi{x, x, x, x, x, x, x, x};
#else
  return vi{x, x, x, x};
#endif
}

PREFOPT_INLINE int32_t bits_of(float x) {
  int32_t b;
  __builtin_memcpy(&b, &x, 4);
  return b;
}

PREFOPT_INLINE float float_of(int32_t b) {
  float x;
  __builtin_memcpy(&x, &b, 4);
  return x;
}

PREFOPT_INLINE vf splat(float x) { return (vf)splat_bits(bits_of(x)); }

PREFOPT_INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

// NaN in x is kept
PREFOPT_INLINE vf max_of(vf m, vf x) { return select((vi)(m >= x), m, x); }

PREFOPT_INLINE float sum_of(vf v) {
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += v[i];
  return sum;
}

// exp(x) for x up to 88, within 1 ulp; below -87.3 (where the result is not a normal number) exactly 0. NaN is kept.
PREFOPT_INLINE vf exp_of(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves round(x log2 e) in the low bits
  const vf shifted = x * splat(1.44269504f) + magic;
  const vf n = shifted - magic;
  vf r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  // minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2], coefficients as in Cephes' expf
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.f);
  // unsigned, because lanes that are selected away below may overflow
  const vu power = ((vu)shifted << 23) + (vu)splat_bits(127 << 23);
  return select((vi)(x < splat(-87.33654f)), splat(0.f), p * (vf)power);
}

// tanh(x): odd polynomial below 0.625 (coefficients as in Cephes' tanhf), through exp above
PREFOPT_INLINE vf tanh_of(vf x) {
  const vi sign = (vi)x & splat_bits(INT32_MIN);
  const vf a = (vf)((vi)x ^ sign);
  const vf square = a * a;
  vf p = splat(-5.70498872745e-3f);
  p = p * square + splat(2.06390887954e-2f);
  p = p * square + splat(-5.37397155531e-2f);
  p = p * square + splat(1.33314422036e-1f);
  p = p * square + splat(-3.33332819422e-1f);
  const vf small = p * square * a + a;
  const vf e = exp_of(a * splat(-2.f));
  const vf large = (splat(1.f) - e) / (splat(1.f) + e);
  return (vf)((vi)select((vi)(a < splat(0.625f)), small, large) | sign);
}

}  // namespace prefopt::PREFOPT_ISA
