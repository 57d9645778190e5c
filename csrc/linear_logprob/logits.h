// What both passes share: packing, scratch and the logits. Written once for every instruction set and dtype.
//
// Logits are computed transposed, z^T = W h^T, a tile of the vocabulary by a panel of tokens at a time: a register
// holds the same vocabulary row for kLanes tokens. The softmax then needs no sum across lanes, W is read in place, and
// a tile of logits (at most 128 x 48 floats) never leaves the second-level cache.
//
// `Dot` is the multiply-add of a product (gemm.h), `Element` the dtype of hidden and weight. What depends on Dot alone
// is compiled once for all dtypes.
#pragma once
#include "low_rank.h"

namespace prefopt::PREFOPT_ISA {

template <class Dot>
constexpr int64_t units(int64_t elements) {
  return divide_up(elements, Dot::kStep);
}

// Bytes of a packed element.
template <class Dot>
constexpr int64_t kElementBytes = Dot::kUnitBytes / Dot::kStep;

template <class Element>
Rows<Element> hidden_rows(const Operands& in) {
  return {static_cast<const Element*>(in.hidden), in.hidden_stride, in.rows};
}

template <class Element>
Rows<Element> weight_rows(const Operands& in, int64_t first) {
  return {static_cast<const Element*>(in.weight) + first * in.weight_stride, in.weight_stride, nullptr};
}

// Buffers of one worker.
template <class Dot>
struct Scratch {
  float* low;       // for low_rank.h
  int32_t* weight;  // (kTileRows, units(H)): a converted tile
  float* z;         // (kTileRows, panel)
  char* p;          // (units(kTileRows), panel) units, forward only
  int32_t* packed;  // (groups, units(kTileRows), kGroup) units, forward only
  float* head;      // (kHeadRows, kGroup), backward only
  int64_t bytes;
  Scratch(Carver carver, const Operands& in, int64_t padded_hidden)
      : low(carver.take<float>(low_scratch(in.R, kTileRows))),
        weight(carver.take<int32_t>(kTileRows * units<Dot>(in.H))),
        z(carver.take<float>(kTileRows * kPanelWidth)),
        p(carver.take<char>(units<Dot>(kTileRows) * kPanelWidth * 4)),
        packed(carver.take<int32_t>(units<Dot>(kTileRows) * padded_hidden)),
        head(carver.take<float>(kHeadRows * kGroup)),
        bytes(carver.bytes()) {}
};

template <class Dot, class Call>
Scratch<Dot> scratch_of(const Call& call, int64_t worker) {
  return {Carver(call.scratch + worker * call.layout.scratch_bytes), call.in, call.layout.padded_hidden};
}

// The worker's buffers for the reference model; its own where there is none.
template <class Dot, class Call>
Scratch<Dot> ref_scratch_of(const Call& call, int64_t worker, const Scratch<Dot>& own) {
  if (!call.ref) return own;
  return {Carver(call.scratch + worker * call.layout.scratch_bytes + own.bytes), call.ref->in,
          call.ref->layout.padded_hidden};
}

template <class Dot>
void layout(const Operands& in, Layout* out) {
  const Panels panels(in.T);
  out->panels = panels.count;
  out->padded_tokens = panels.vectors * kLanes;
  out->padded_hidden = divide_up(in.H, kGroup) * kGroup;
  out->lanes = kLanes;
  out->tile_rows = kTileRows;
  out->element_bytes = kElementBytes<Dot>;
  out->hidden_bytes = out->padded_tokens * units<Dot>(in.H) * 4;
  out->tokens_bytes = units<Dot>(in.T) * out->padded_hidden * 4;
  out->scratch_bytes = Scratch<Dot>(Carver(nullptr), in, out->padded_hidden).bytes;
}

// panels of (units(H), width): the second operand of the logits
template <class Dot, class Element>
void pack_hidden(const Operands& in, const Layout&, char* hidden_packed, int64_t worker, int64_t workers) {
  const Panels panels(in.T);
  const int64_t K = units<Dot>(in.H);
  for (int64_t p = panels.count * worker / workers; p < panels.count * (worker + 1) / workers; p++) {
    const int64_t first = panels.first_vector(p) * kLanes, width = panels.width(p) * kLanes;
    const int64_t count = min_of(in.T - first, width);
    int32_t* out = reinterpret_cast<int32_t*>(hidden_packed) + first * K;
    Rows<Element> rows = hidden_rows<Element>(in);
    rows.index += first;
    pack_rows<Dot>(rows, count, in.H, 1, width, out);
    // The panel is filled up with its last token and not with 0, which times an infinite weight would be NaN
    for (int64_t k = 0; k < K; k++)
      for (int64_t i = count; i < width; i++) out[k * width + i] = out[k * width + count - 1];
  }
}

template <class Dot, class Element>
void pack_tokens(const Operands& in, const Layout& layout, char* tokens_packed, int64_t worker, int64_t workers) {
  const int64_t groups = layout.padded_hidden / kGroup;
  pack_columns<Dot, kGroup>(hidden_rows<Element>(in), in.T, in.H, groups * worker / workers,
                            groups * (worker + 1) / workers, reinterpret_cast<int32_t*>(tokens_packed));
}

// A tile of the head as first operand: in place where the dot product can read it, else converted.
struct Tile {
  const char* data;
  int64_t stride;  // bytes
  LowTile low;
};

template <class Dot, class Element>
Tile weight_tile(const Operands& in, int64_t first, int64_t count, const Scratch<Dot>& scratch) {
  constexpr bool kNative = __is_same(Element, typename Dot::Unit);
  const LowTile low = low_tile<Element>(in, first, count, scratch.low);
  const Rows<Element> rows = weight_rows<Element>(in, first);
  if (kNative && in.H % Dot::kStep == 0) {
    return {reinterpret_cast<const char*>(rows.data), rows.stride * static_cast<int64_t>(sizeof(Element)), low};
  }
  pack_rows<Dot>(rows, count, in.H, units<Dot>(in.H), 1, scratch.weight);
  return {reinterpret_cast<const char*>(scratch.weight), units<Dot>(in.H) * 4, low};
}

inline bool same_head(const Operands& a, const Operands& b) {
  return a.weight == b.weight && a.weight_stride == b.weight_stride && a.H == b.H;
}

// The reference model's tile of the same rows: the policy's, converted once, where they have one head.
template <class Dot, class Element, class Call>
Tile ref_tile(const Call& call, const Tile& tile, int64_t first, int64_t count, const Scratch<Dot>& scratch) {
  if (!call.ref) return tile;
  const Operands& ref = call.ref->in;
  if (!same_head(ref, call.in)) return weight_tile<Dot, Element>(ref, first, count, scratch);
  return {tile.data, tile.stride, low_tile<Element>(ref, first, count, scratch.low)};
}

// Raw products to logits, N registers of columns, in place.
template <int N>
void transform(const Operands& in, int64_t first, int64_t count, float* z, int64_t stride) {
  const float factor = in.scale / in.temperature;
  if (!in.bias && in.softcap == 0 && factor == 1) return;
  const vf inner = splat(in.softcap == 0 ? factor : in.scale / in.softcap), outer = splat(in.softcap / in.temperature);
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
PREFOPT_INLINE vf slope_of(const Operands& in, vf z) {
  const vf t = z * splat(in.temperature / in.softcap);
  return splat(1.f) - t * t;
}

// z (count, N registers): the logits of a tile for the panel that starts at `token`
template <class Dot, int N, class Call>
void logits(const Call& call, const Tile& tile, int64_t first, int64_t count, int64_t token, float* z) {
  constexpr int kWidth = N * kLanes;
  const Operands& in = call.in;
  const int64_t K = units<Dot>(in.H);
  add_blocks<Dot, N>(count, K, tile.data, tile.stride, call.hidden_packed + token * K * 4, z, kWidth, false);
  if (in.H == 0) __builtin_memset(z, 0, static_cast<uint64_t>(count * kWidth * 4));
  add_low_logits<N>(in, tile.low, count, call.low_packed, token, z, kWidth);
  transform<N>(in, first, count, z, kWidth);
}

}  // namespace prefopt::PREFOPT_ISA
