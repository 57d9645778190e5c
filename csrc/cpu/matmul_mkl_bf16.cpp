// cblas_gemm_bf16bf16f32 has a plain C signature and is a weak symbol: a torch without it only lacks this provider.
#include "matmul_mkl_bf16.h"

extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int trans_a, int trans_b, int m, int n, int k,
                                                             float alpha, const uint16_t* a, int lda, const uint16_t* b,
                                                             int ldb, float beta, float* c, int ldc);

namespace prefopt {

bool has_mkl_bf16() { return cblas_gemm_bf16bf16f32; }

void matmul_mkl_bf16(Transpose a_order, Transpose b_order, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda,
                     const void* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  constexpr int kRowMajor = 101;
  cblas_gemm_bf16bf16f32(kRowMajor, static_cast<int>(a_order), static_cast<int>(b_order), static_cast<int>(m),
                         static_cast<int>(n), static_cast<int>(k), 1.f, static_cast<const uint16_t*>(a),
                         static_cast<int>(lda), static_cast<const uint16_t*>(b), static_cast<int>(ldb), beta, c,
                         static_cast<int>(ldc));
}

}  // namespace prefopt
