// bf16 products through the MKL that libtorch carries, which uses the matrix units of a machine with AMX.
#pragma once
#include <stdint.h>

namespace prefopt {

bool has_mkl_bf16();

enum class Transpose { kNo = 111, kYes = 112 };

// c (m, n) = a b + beta c, row-major, summed in fp32; leading dimensions in elements.
void matmul_mkl_bf16(Transpose a_order, Transpose b_order, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda,
                     const void* b, int64_t ldb, float beta, float* c, int64_t ldc);

}  // namespace prefopt
