// The low-rank operand on the head, raw logits += low_hidden low_weight^T, and its two gradients. All of it in fp32,
// whatever the instruction set multiplies hidden and the head in: with R columns against H it costs little.
//
// `Cut` says in which panels an instruction set works on its tokens; the packed low_hidden and dz_low lie in them.
#pragma once
#include "linear_logprob.h"
#include "panels.h"

namespace prefopt::PREFOPT_ISA {

// Rows of low_weight, (rows, R) in fp32.
struct LowTile {
  const float* data;
  int64_t stride;  // floats
};

// floats that a worker needs for a tile of low_weight, or for the sums of a tile of its gradient
constexpr int64_t low_scratch(int64_t R, int64_t tile_rows) {
  constexpr int64_t kSums = kTokenVectors * kLanes;
  return R == 0 ? 0 : tile_rows * (R > kSums ? R : kSums);
}

template <class Element, class Cut>
struct LowRank {
  static void layout(const Operands& in, Layout* out) {
    out->low_bytes = out->padded_tokens * in.R * 4;
    out->low_tokens_bytes = in.T * divide_up(in.R, kLanes) * kLanes * 4;
    out->dz_low_bytes = in.R ? out->padded_tokens * 4 : 0;
  }

  // by_panel: panels of tokens, each (R, width). by_token, or null: panels of R, each (T, width).
  static void pack(const Operands& in, char* by_panel, char* by_token, int64_t worker, int64_t workers) {
    int64_t task = 0;
    Cut::each(in.T, [&](auto registers, int64_t first) {
      if (task++ % workers != worker) return;
      const int64_t width = decltype(registers)::value * kLanes;
      float* out = reinterpret_cast<float*>(by_panel) + first * in.R;
      for (int64_t i = 0; i < width; i++) {
        // filled up with the last token, as hidden is
        const float* row = in.low_hidden + (first + i < in.T ? first + i : in.T - 1) * in.R;
        for (int64_t r = 0; r < in.R; r++) out[r * width + i] = row[r];
      }
    });
    if (!by_token) return;
    Panels::each(in.R, [&](auto registers, int64_t first) {
      const int64_t width = decltype(registers)::value * kLanes;
      float* out = reinterpret_cast<float*>(by_token) + first * in.T;
      for (int64_t t = in.T * worker / workers; t < in.T * (worker + 1) / workers; t++)
        for (int64_t r = 0; r < width; r++)
          out[t * width + r] = first + r < in.R ? in.low_hidden[t * in.R + first + r] : 0.f;
    });
  }

  // Rows [first, first + count) of low_weight: in place where they are fp32, else converted.
  static LowTile tile(const Operands& in, int64_t first, int64_t count, float* scratch) {
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
  static void add_logits(const Operands& in, const LowTile& tile, int64_t count, const char* by_panel, int64_t token,
                         float* z, int64_t z_stride) {
    if (in.R == 0) return;
    add_blocks<DotF32, N>(count, in.R, reinterpret_cast<const char*>(tile.data), tile.stride * 4,
                          by_panel + token * in.R * 4, z, z_stride, true);
  }

  // dlow_hidden^T (R, padded_tokens) += low_weight^T dz over the chunk
  static void add_hidden_gradient(const Backward& call, int64_t worker, int64_t workers) {
    const Operands& in = call.in;
    const int64_t rows = call.end - call.begin, tile_rows = call.layout.tile_rows;
    float* scratch = reinterpret_cast<float*>(call.scratch + worker * call.layout.backward_bytes);
    for (int64_t v = 0; v < rows; v += tile_rows) {
      const int64_t count = rows - v < tile_rows ? rows - v : tile_rows;
      const LowTile low = tile(in, call.begin + v, count, scratch);
      int64_t task = 0;
      Cut::each(in.T, [&](auto registers, int64_t token) {
        if (task++ % workers != worker) return;
        constexpr int N = decltype(registers)::value;
        multiply<DotF32, kVocabularyRows, N>(in.R, count, reinterpret_cast<const char*>(low.data), 4, low.stride * 4,
                                             call.dz_low + token * rows + v * N * kLanes, call.dlow_hidden + token,
                                             call.layout.padded_tokens, !(call.first_chunk && v == 0));
      });
    }
  }

  // dlow_weight (V, R) of the chunk: every row is finished here, summed over all tokens and rounded once
  static void write_weight_gradient(const Backward& call, int64_t worker, int64_t workers) {
    const int64_t rows = call.end - call.begin, tile_rows = call.layout.tile_rows;
    const int64_t first = rows * worker / workers, last = rows * (worker + 1) / workers;
    float* sums = reinterpret_cast<float*>(call.scratch + worker * call.layout.backward_bytes);
    for (int64_t v = first; v < last; v += tile_rows) {
      const int64_t count = last - v < tile_rows ? last - v : tile_rows;
      Panels::each(call.in.R, [&](auto registers, int64_t column) {
        weight_gradient_block<decltype(registers)::value>(call, sums, v, count, column);
      });
    }
  }

  template <int N>
  static void weight_gradient_block(const Backward& call, float* sums, int64_t row, int64_t count, int64_t column) {
    constexpr int kWidth = N * kLanes;
    const Operands& in = call.in;
    const int64_t rows = call.end - call.begin;
    const float* low = reinterpret_cast<const float*>(call.low_by_token) + column * in.T;
    Cut::each(in.T, [&](auto registers, int64_t token) {
      const int64_t panel = decltype(registers)::value * kLanes, tokens = in.T - token < panel ? in.T - token : panel;
      multiply<DotF32, kVocabularyRows, N>(count, tokens,
                                           reinterpret_cast<const char*>(call.dz_low + token * rows + row * panel),
                                           panel * 4, 4, low + token * kWidth, sums, kWidth, token > 0);
    });
    const int64_t width = in.R - column < kWidth ? in.R - column : kWidth;
    for (int64_t v = 0; v < count; v++) {
      const int64_t at = (call.begin + row + v) * in.R + column;
      for (int64_t r = 0; r < width; r++) {
        if (in.low_weight_is_float) {
          static_cast<float*>(call.dlow_weight)[at + r] = sums[v * kWidth + r];
        } else {
          from_float(sums[v * kWidth + r], static_cast<Element*>(call.dlow_weight) + at + r);
        }
      }
    }
  }
};

}  // namespace prefopt::PREFOPT_ISA
