// What both passes of linear_logprob share: tiles, panels, packing and the logits. Written once for every instruction
// set and dtype; linear_logprob.h has the contract.
//
// Logits are computed transposed, z^T = W h^T, a tile of the vocabulary by a panel of tokens at a time: a register
// holds the same vocabulary row for kLanes tokens. The softmax then needs no sum across lanes, W is read where it lies,
// and a tile of logits (at most 128 x 48 floats) never leaves the second-level cache.
#pragma once
#include "../common/gemm.h"
#include "linear_logprob.h"

namespace prefopt::PREFOPT_ISA {

// Tiles, chosen for the number of registers: a product keeps M x N sums, N columns and a broadcast in them.
#if PREFOPT_LANES == 16
constexpr int kTokenVectors = 3, kVocabularyRows = 8, kHiddenVectors = 4, kTokenRows = 6;  // 32 registers
#else
constexpr int kTokenVectors = 3, kVocabularyRows = 4, kHiddenVectors = 2, kTokenRows = 6;  // 16 registers
#endif
constexpr int kGroup = kHiddenVectors * kLanes;  // columns of H that are packed side by side
// rows of the vocabulary: a bf16 tile of H 1,024 and its packed copy fill half of a 1 MiB second-level cache
constexpr int64_t kTileRows = 128;
// of H in one running sum: a single one over H 4,096 put logp off by 2e-5, blocks of this size by less than 4e-6
constexpr int64_t kSumUnits = 512;
constexpr int64_t kHeadRows = 256;  // rows of the head's gradient that are summed at a time

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t aligned(int64_t bytes) { return divide_up(bytes, 64) * 64; }

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Tokens are cut into panels of kTokenVectors registers. A single register left over would run at half speed, so the
// last four registers make two panels of two.
struct Panels {
  int64_t vectors, full, count;
  explicit Panels(int64_t tokens) {
    vectors = divide_up(tokens, kLanes);
    full = vectors / kTokenVectors - (vectors % kTokenVectors == 1 && vectors > kTokenVectors ? 1 : 0);
    const int64_t rest = vectors - full * kTokenVectors;
    count = full + (rest == 4 ? 2 : rest > 0 ? 1 : 0);
  }
  int64_t first_vector(int64_t panel) const { return panel <= full ? panel * kTokenVectors : full * kTokenVectors + 2; }
  int64_t width(int64_t panel) const {
    const int64_t rest = vectors - full * kTokenVectors;
    return panel < full ? kTokenVectors : rest == 4 ? 2 : rest;
  }
  template <class Body>
  void visit(int64_t panel, const Body& body) const {
    const int64_t width = this->width(panel);
    if (width == 3) body(Constant<3>{});
    if (width == 2) body(Constant<2>{});
    if (width == 1) body(Constant<1>{});
  }
};

template <class Dot, class Element>
struct Common {
  using Unit = typename Dot::Unit;
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
    char* weight;  // (kTileRows, units(H)): a converted tile
    float* z;      // (kTileRows, panel)
    char* p;       // (units(kTileRows), panel) units, forward only
    char* packed;  // (groups, units(kTileRows), kGroup) units, forward only
    float* head;   // (kHeadRows, kGroup), backward only
    int64_t forward_bytes, backward_bytes;
    Scratch(char* base, int64_t H, int64_t padded_hidden) {
      const int64_t panel = kTokenVectors * kLanes;
      char* next = base;
      auto take = [&next](int64_t bytes) {
        char* at = next;
        next += aligned(bytes);
        return at;
      };
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
    const Scratch scratch(nullptr, in.H, out->padded_hidden);
    out->forward_bytes = scratch.forward_bytes;
    out->backward_bytes = scratch.backward_bytes;
    out->chunk_bytes = (2 * out->padded_tokens + out->padded_hidden) * 4 / kStep + panels.count * 4;
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
  };
  static Tile weight_tile(const Operands& in, int64_t first, int64_t count, char* scratch) {
    const Rows<Element> rows = weight_rows(in, first);
    if (kNative && in.H % kStep == 0) {
      return {reinterpret_cast<const char*>(rows.data), rows.stride * static_cast<int64_t>(sizeof(Element))};
    }
    pack_rows<Dot>(rows, count, in.H, units(in.H), 1, reinterpret_cast<int32_t*>(scratch));
    return {scratch, units(in.H) * 4};
  }

  // z (count, width): the logits of a tile and a panel
  template <int N>
  static void logits(const Operands& in, Tile tile, int64_t first, int64_t count, const char* panel, float* z) {
    constexpr int kWidth = N * kLanes;
    for (int64_t k = 0; k < units(in.H); k += kSumUnits) {
      const int64_t K = units(in.H) - k < kSumUnits ? units(in.H) - k : kSumUnits;
      multiply<Dot, kVocabularyRows, N>(count, K, tile.data + k * 4, tile.stride, 4,
                                        reinterpret_cast<const float*>(panel) + k * kWidth, z, kWidth, k > 0);
    }
    if (in.H == 0) __builtin_memset(z, 0, count * kWidth * 4);
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
