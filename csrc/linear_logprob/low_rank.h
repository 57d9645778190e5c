// The low-rank operand on the head, raw logits += low_hidden low_weight^T, and its two gradients. All of it in fp32,
// whatever the instruction set multiplies hidden and the head in: with R columns against H it costs little.
//
// `Cut` is how an instruction set divides its tokens into panels, in which the packed low_hidden and dz_low are stored.
#pragma once
#include "panels.h"
#include "params.h"

namespace prefopt::PREFOPT_ISA {

// Rows of low_weight, (rows, R) in fp32.
struct LowTile {
  const float* data;
  int64_t stride;  // floats
};

// floats that a worker needs for a tile of low_weight, or for the sums of a tile of its gradient
constexpr int64_t low_scratch(int64_t R, int64_t tile_rows) {
  return R == 0 ? 0 : tile_rows * (R > kPanelWidth ? R : kPanelWidth);
}

// by_panel: panels of tokens, each (R, width). by_token, or null: panels of R, each (T, width).
template <class Cut>
void pack_low(const Operands& in, float* by_panel, float* by_token, int64_t worker, int64_t workers) {
  int64_t task = 0;
  Cut::each(in.T, [&](auto registers, int64_t first) {
    if (task++ % workers != worker) return;
    const int64_t width = decltype(registers)::value * kLanes;
    float* out = by_panel + first * in.R;
    for (int64_t i = 0; i < width; i++) {
      // filled up with the last token, as hidden is
      const float* row = in.low_hidden + in.rows[min_of(first + i, in.T - 1)] * in.R;
      for (int64_t r = 0; r < in.R; r++) out[r * width + i] = row[r];
    }
  });
  if (!by_token) return;
  Panels::each(in.R, [&](auto registers, int64_t first) {
    const int64_t width = decltype(registers)::value * kLanes;
    float* out = by_token + first * in.T;
    for (int64_t t = in.T * worker / workers; t < in.T * (worker + 1) / workers; t++)
      for (int64_t r = 0; r < width; r++)
        out[t * width + r] = first + r < in.R ? in.low_hidden[in.rows[t] * in.R + first + r] : 0.f;
  });
}

// Rows [first, first + count) of low_weight: in place where they are fp32, else converted.
template <class Element>
LowTile low_tile(const Operands& in, int64_t first, int64_t count, float* scratch) {
  if (in.R == 0) return {nullptr, 0};
  if (in.low_weight_is_float) {
    return {static_cast<const float*>(in.low_weight) + first * in.low_weight_stride, in.low_weight_stride};
  }
  for (int64_t v = 0; v < count; v++) {
    const Element* row = static_cast<const Element*>(in.low_weight) + (first + v) * in.low_weight_stride;
    for (int64_t r = 0; r < in.R; r++) scratch[v * in.R + r] = to_float(row[r]);
  }
  return {scratch, in.R};
}

// z (count, N registers) += the tile's part of the raw logits, for the panel of tokens that starts at `token`
template <int N>
void add_low_logits(const Operands& in, const LowTile& tile, int64_t count, const float* by_panel, int64_t token,
                    float* z, int64_t z_stride) {
  if (in.R == 0) return;
  add_blocks<DotF32, N>(count, in.R, reinterpret_cast<const char*>(tile.data), tile.stride * 4,
                        reinterpret_cast<const char*>(by_panel + token * in.R), z, z_stride, true);
}

// dlow_hidden^T (R, padded_tokens) += low_weight^T dz over the chunk
template <class Element, class Cut>
void add_dlow_hidden(const Backward& call, int64_t worker, int64_t workers) {
  const Operands& in = call.in;
  const int64_t rows = call.end - call.begin;
  float* scratch = reinterpret_cast<float*>(call.scratch + worker * call.layout.scratch_bytes);
  for (int64_t v = 0; v < rows; v += call.layout.tile_rows) {
    const int64_t count = min_of(rows - v, call.layout.tile_rows);
    const LowTile low = low_tile<Element>(in, call.begin + v, count, scratch);
    int64_t task = 0;
    Cut::each(in.T, [&](auto registers, int64_t token) {
      if (task++ % workers != worker) return;
      constexpr int N = decltype(registers)::value;
      multiply<DotF32, kVocabularyRows, N>(in.R, count, reinterpret_cast<const char*>(low.data), 4, low.stride * 4,
                                           call.dz_low + token * rows + v * N * kLanes, call.dlow_hidden_sums + token,
                                           call.layout.padded_tokens, !(call.first_chunk && v == 0));
    });
  }
}

// Rows [row, row + count) of dlow_weight's chunk, for N registers of columns, summed over all tokens and rounded once
template <class Element, class Cut, int N>
void dlow_weight_block(const Backward& call, float* sums, int64_t row, int64_t count, int64_t column) {
  constexpr int kWidth = N * kLanes;
  const Operands& in = call.in;
  const int64_t rows = call.end - call.begin;
  Cut::each(in.T, [&](auto registers, int64_t token) {
    const int64_t panel = decltype(registers)::value * kLanes;
    const float* low = call.low_by_token + column * in.T + token * kWidth;
    multiply<DotF32, kVocabularyRows, N>(count, min_of(in.T - token, panel),
                                         reinterpret_cast<const char*>(call.dz_low + token * rows + row * panel),
                                         panel * 4, 4, low, sums, kWidth, token > 0);
  });
  for (int64_t v = 0; v < count; v++) {
    const int64_t at = (call.begin + row + v) * in.R + column;
    for (int64_t r = 0; r < min_of(in.R - column, kWidth); r++) {
      if (in.low_weight_is_float) {
        static_cast<float*>(call.dlow_weight)[at + r] = sums[v * kWidth + r];
      } else {
        from_float(sums[v * kWidth + r], static_cast<Element*>(call.dlow_weight) + at + r);
      }
    }
  }
}

// dlow_weight (V, R) of the chunk
template <class Element, class Cut>
void write_dlow_weight(const Backward& call, int64_t worker, int64_t workers) {
  const int64_t rows = call.end - call.begin, last = rows * (worker + 1) / workers;
  float* sums = reinterpret_cast<float*>(call.scratch + worker * call.layout.scratch_bytes);
  for (int64_t v = rows * worker / workers; v < last; v += call.layout.tile_rows) {
    Panels::each(call.in.R, [&](auto registers, int64_t column) {
      constexpr int N = decltype(registers)::value;
      dlow_weight_block<Element, Cut, N>(call, sums, v, min_of(last - v, call.layout.tile_rows), column);
    });
  }
}

}  // namespace prefopt::PREFOPT_ISA
