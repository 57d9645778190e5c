// C (+)= A B with fp32 sums, for operands cut in 32-bit units along the contracted dimension: one float, or a pair of
// bf16.
//
// A unit of A is broadcast and multiplied with a register of units of B. That is the shape of an fp32 fused
// multiply-add and of the bf16 dot product alike, so both share every loop; `Dot` holds the one instruction that
// differs.
#pragma once
#include "formats.h"
#include "vector.h"

namespace prefopt::PREFOPT_ISA {

struct DotF32 {
  static constexpr int kStep = 1;  // elements in a 32-bit unit
  static constexpr int kUnitBytes = 4;
  using Unit = float;
  static PREFOPT_INLINE vf multiply_add(vf sum, vi a, vf b) { return sum + (vf)a * b; }
  static PREFOPT_INLINE void put(char* out, vf even, vf) { __builtin_memcpy(out, &even, sizeof even); }
  static PREFOPT_INLINE void put_row(char* out, vf x) { __builtin_memcpy(out, &x, sizeof x); }
};

// c[m][n] (+)= sum over K units of a(m, k) * b(k, n); m < M rows, N registers of columns. Strides of a in bytes, of c
// in floats.
template <class Dot, int M, int N>
PREFOPT_INLINE void multiply_tile(int64_t K, const char* a, int64_t am, int64_t ak, const float* b, float* c,
                                  int64_t cm, bool accumulate) {
  vf sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[m][n] = splat(0.f);
  for (int64_t k = 0; k < K; k++) {
    vf column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) column[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      int32_t unit;
      __builtin_memcpy(&unit, a + m * am, 4);
      const vi row = splat_bits(unit);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[m][n] = Dot::multiply_add(sum[m][n], row, column[n]);
    }
    a += ak;
    b += N * kLanes;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      float* to = c + m * cm + n * kLanes;
      store(to, accumulate ? load(to) + sum[m][n] : sum[m][n]);
    }
}

// Any number of rows: tiles of M, and the rest in tiles of 4, 2 and 1.
template <class Dot, int M, int N>
void multiply(int64_t rows, int64_t K, const char* a, int64_t am, int64_t ak, const float* b, float* c, int64_t cm,
              bool accumulate) {
  for (; rows >= M; rows -= M, a += M * am, c += M * cm) multiply_tile<Dot, M, N>(K, a, am, ak, b, c, cm, accumulate);
  if constexpr (M > 1) {
    constexpr int kNext = M > 4 ? 4 : M / 2;
    multiply<Dot, kNext, N>(rows, K, a, am, ak, b, c, cm, accumulate);
  }
}

// Rows of a matrix in memory, perhaps picked by an index.
template <class Element>
struct Rows {
  const Element* data;
  int64_t stride;        // elements
  const int64_t* index;  // or null: row i is row i
  PREFOPT_INLINE const Element* operator[](int64_t i) const { return data + (index ? index[i] : i) * stride; }
};

// out[i][k] = unit k of row i, K = ceil(length / step) units a row, the last one padded with 0.
template <class Dot, class Element>
void pack_rows(Rows<Element> rows, int64_t count, int64_t length, int64_t out_row, int64_t out_unit, int32_t* out) {
  for (int64_t i = 0; i < count; i++) {
    const Element* row = rows[i];
    int32_t* to = out + i * out_row;
    const int64_t whole = length / Dot::kStep;
    if constexpr (Dot::kStep == 2) {
      for (int64_t k = 0; k < whole; k++) __builtin_memcpy(to + k * out_unit, row + 2 * k, 4);
      if (length % 2) to[whole * out_unit] = static_cast<uint16_t>(row[length - 1].bits);
    } else {
      for (int64_t k = 0; k < whole; k++) to[k * out_unit] = bits_of(to_float(row[k]));
    }
  }
}

// out[g][i / step][j]: unit i / step of column g * kGroup + j, for columns in groups of kGroup; padded with 0 in both
// directions.
template <class Dot, int kGroup, class Element>
void pack_columns(Rows<Element> rows, int64_t count, int64_t length, int64_t first_group, int64_t last_group,
                  int32_t* out) {
  const int64_t units = (count + Dot::kStep - 1) / Dot::kStep;
  for (int64_t u = 0; u < units; u++) {
    const Element* even = rows[u * Dot::kStep];
    const Element* odd = u * Dot::kStep + 1 < count ? rows[u * Dot::kStep + 1] : nullptr;
    for (int64_t g = first_group; g < last_group; g++) {
      int32_t* to = out + (g * units + u) * kGroup;
      const int64_t j0 = g * kGroup;
      const int64_t width = length - j0 < kGroup ? length - j0 : kGroup;
      if constexpr (Dot::kStep == 1) {
        for (int64_t j = 0; j < width; j++) to[j] = bits_of(to_float(even[j0 + j]));
      } else if (odd) {
        for (int64_t j = 0; j < width; j++) to[j] = even[j0 + j].bits | static_cast<uint32_t>(odd[j0 + j].bits) << 16;
      } else {
        for (int64_t j = 0; j < width; j++) to[j] = even[j0 + j].bits;
      }
      for (int64_t j = width; j < kGroup; j++) to[j] = 0;
    }
  }
}

}  // namespace prefopt::PREFOPT_ISA
