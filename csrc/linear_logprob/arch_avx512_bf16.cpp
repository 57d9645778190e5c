// AVX-512 with the bf16 dot product: bf16 is multiplied as it lies in memory; fp32 and fp16 run on arch_avx512.cpp.
#include "params.h"
#if PREFOPT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include <immintrin.h>
#define PREFOPT_ISA avx512_bf16
#define PREFOPT_LANES 16
#include "kernels.h"

namespace prefopt::avx512_bf16 {

// A unit is a pair of neighbours along the contracted dimension; the products of a pair are summed in fp32.
struct DotBf16 {
  static constexpr int kStep = 2;
  static constexpr int kUnitBytes = 4;
  using Unit = bf16;
  static PREFOPT_INLINE vf multiply_add(vf sum, vi a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  // unit i = (even[i], odd[i])
  static PREFOPT_INLINE void put(char* out, vf even, vf odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static PREFOPT_INLINE void put_row(char* out, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
};

const Kernels kBfloat16 = kernels<DotBf16, bf16>();

}  // namespace prefopt::avx512_bf16
#endif
