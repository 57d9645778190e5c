// What both passes of linear_logprob share: tiles, panels, packing and the logits. Written once for every instruction
// set and dtype; linear_logprob.h has the contract.
//
// Logits are computed transposed, z^T = W h^T, a tile of the vocabulary by a panel of tokens at a time: a register
// holds the same vocabulary row for kLanes tokens. The softmax then needs no sum across lanes, W is read where it lies,
// and a tile of logits (at most 128 x 48 floats) never leaves the second-level cache.
#pragma once
#include "kernel_low_rank.h"
#include "linear_logprob.h"
#include "panels.h"

namespace prefopt::PREFOPT_ISA {

template <class Dot, class Element>
struct Common {
  using Unit = typename Dot::Unit;
  using Low = LowRank<Element, Panels>;
  static constexpr int kStep = Dot::kStep;
  // the dot product reads these elements as they are; others are converted a tile at a time
  static constexpr bool kNative = sizeof(Unit) == sizeof(Element) && !__is_same(Element, fp16);

  static int64_t units(int64_t elements) { return divide_up(elements, kStep); }

  static Rows<Element> hidden_rows(const Operands& in) {
    return {static_cast<const Element*>(in.hidden), in.hidden_stride, in.rows};
  }
  static Rows<Element> weight_rows(const Operands& in, int64_t first) {
    return {static_cast<const Element*>(in.weight) + first * in.weight_stride, in.weight_stride, nullptr};
  }

  // Scratch of one worker, carved from a buffer.
  struct Scratch {
    float* low;    // first, for LowRank
    char* weight;  // (kTileRows, units(H)): a converted tile
    float* z;      // (kTileRows, panel)
    char* p;       // (units(kTileRows), panel) units, forward only
    char* packed;  // (groups, units(kTileRows), kGroup) units, forward only
    float* head;   // (kHeadRows, kGroup), backward only
    int64_t forward_bytes, backward_bytes;
    Scratch(char* base, int64_t H, int64_t padded_hidden, int64_t R) {
      const int64_t panel = kTokenVectors * kLanes;
      char* next = base;
      auto take = [&next](int64_t bytes) {
        char* at = next;
        next += aligned(bytes);
        return at;
      };
      low = reinterpret_cast<float*>(take(low_scratch(R, kTileRows) * 4));
      weight = take(kTileRows * units(H) * 4);
      z = reinterpret_cast<float*>(take(kTileRows * panel * 4));
      char* shared = next;
      p = take(units(kTileRows) * panel * 4);
      packed = take(units(kTileRows) * padded_hidden * 4);
      forward_bytes = next - base;
      next = shared;
      head = reinterpret_cast<float*>(take(kHeadRows * kGroup * 4));
      backward_bytes = next - base;
    }
  };

  static void layout(const Operands& in, Layout* out) {
    const Panels panels(in.T);
    out->panels = panels.count;
    out->packs_pairs = kStep == 2;
    out->padded_tokens = panels.vectors * kLanes;
    out->padded_hidden = divide_up(in.H, kGroup) * kGroup;
    out->hidden_bytes = out->padded_tokens * units(in.H) * 4;
    out->tokens_bytes = units(in.T) * out->padded_hidden * 4;
    out->tile_rows = kTileRows;
    const Scratch scratch(nullptr, in.H, out->padded_hidden, in.R);
    out->forward_bytes = scratch.forward_bytes;
    out->backward_bytes = scratch.backward_bytes;
    Low::layout(in, out);
    out->chunk_bytes = (2 * out->padded_tokens + out->padded_hidden) * 4 / kStep + panels.count * 4 + out->dz_low_bytes;
  }

  // panels of (units(H), width): the second operand of the logits
  static void pack_hidden(const Operands& in, const Layout&, char* hidden_packed, int64_t worker, int64_t workers) {
    const Panels panels(in.T);
    const int64_t K = units(in.H);
    for (int64_t p = panels.count * worker / workers; p < panels.count * (worker + 1) / workers; p++) {
      const int64_t first = panels.first_vector(p) * kLanes, width = panels.width(p) * kLanes;
      const int64_t count = in.T - first < width ? in.T - first : width;
      int32_t* out = reinterpret_cast<int32_t*>(hidden_packed) + first * K;
      Rows<Element> rows = hidden_rows(in);
      rows.index += first;
      pack_rows<Dot>(rows, count, in.H, 1, width, out);
      // The panel is filled up with its last token and not with 0, which times an infinite weight would be NaN
      for (int64_t k = 0; k < K; k++)
        for (int64_t i = count; i < width; i++) out[k * width + i] = out[k * width + count - 1];
    }
  }

  static void pack_tokens(const Operands& in, const Layout& layout, char* tokens_packed, int64_t worker,
                          int64_t workers) {
    const int64_t groups = layout.padded_hidden / kGroup;
    pack_columns<Dot, kGroup>(hidden_rows(in), in.T, in.H, groups * worker / workers, groups * (worker + 1) / workers,
                              reinterpret_cast<int32_t*>(tokens_packed));
  }

  // A tile of the head as first operand: in place where the dot product can read it, else converted.
  struct Tile {
    const char* data;
    int64_t stride;  // bytes
    LowTile low;
  };
  static Tile weight_tile(const Operands& in, int64_t first, int64_t count, const Scratch& scratch) {
    const LowTile low = Low::tile(in, first, count, scratch.low);
    const Rows<Element> rows = weight_rows(in, first);
    if (kNative && in.H % kStep == 0) {
      return {reinterpret_cast<const char*>(rows.data), rows.stride * static_cast<int64_t>(sizeof(Element)), low};
    }
    pack_rows<Dot>(rows, count, in.H, units(in.H), 1, reinterpret_cast<int32_t*>(scratch.weight));
    return {scratch.weight, units(in.H) * 4, low};
  }

  // z (count, N registers): the logits of a tile for the panel that starts at `token`
  template <int N>
  static void logits(const Operands& in, const Tile& tile, int64_t first, int64_t count, const char* hidden_packed,
                     const char* low_packed, int64_t token, float* z) {
    constexpr int kWidth = N * kLanes;
    add_blocks<Dot, N>(count, units(in.H), tile.data, tile.stride, hidden_packed + token * units(in.H) * 4, z, kWidth,
                       false);
    if (in.H == 0) __builtin_memset(z, 0, count * kWidth * 4);
    Low::template add_logits<N>(in, tile.low, count, low_packed, token, z, kWidth);
    transform<N>(in, first, count, z, kWidth);
  }

  // Raw products to logits, N registers of columns, in place.
  template <int N>
  static void transform(const Operands& in, int64_t first, int64_t count, float* z, int64_t stride) {
    const float factor = in.scale / in.temperature;
    if (!in.bias && in.softcap == 0 && factor == 1) return;
    const vf inner = splat(in.softcap == 0 ? factor : in.scale / in.softcap),
             outer = splat(in.softcap / in.temperature);
    for (int64_t v = 0; v < count; v++) {
      const vf bias = splat(in.bias ? in.bias[first + v] : 0.f);
      for (int n = 0; n < N; n++) {
        float* at = z + v * stride + n * kLanes;
        const vf scaled = (load(at) + bias) * inner;
        store(at, in.softcap == 0 ? scaled : tanh_of(scaled) * outer);
      }
    }
  }

  // 1 - tanh^2, from the transformed logit
  static PREFOPT_INLINE vf slope_of(const Operands& in, vf z) {
    const vf t = z * splat(in.temperature / in.softcap);
    return splat(1.f) - t * t;
  }
};

}  // namespace prefopt::PREFOPT_ISA
