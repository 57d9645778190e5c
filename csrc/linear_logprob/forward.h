// The forward: online softmax over tiles of the vocabulary and, for a frozen head, the unit gradient in the same pass.
#pragma once
#include "logits.h"

namespace prefopt::PREFOPT_ISA {

template <int N>
void scale_product(float* product, int64_t columns, int64_t valid, const vf* moved) {
  for (int64_t i = 0; i < valid; i++) {
    const float factor = moved[i / kLanes][i % kLanes];
    if (factor == 1) continue;
    for (int64_t h = 0; h < columns; h += kLanes) {
      float* to = product + i * columns + h;
      store(to, load(to) * splat(factor));
    }
  }
}

template <int N>
void add_logit_sums(float* totals, const float* z, int64_t z_stride, int64_t count, bool first_tile) {
  vf total[N];
  for (int n = 0; n < N; n++) total[n] = splat(0.f);
  for (int64_t r = 0; r < count; r++)
    for (int n = 0; n < N; n++) total[n] += load(z + r * z_stride + n * kLanes);
  for (int n = 0; n < N; n++) {
    float* to = totals + n * kLanes;
    store(to, first_tile ? total[n] : load(to) + total[n]);
  }
}

// sum exp(z - m) (z - m) after the maximum went from `before` to `top`; reads the old sum
template <int N>
void add_spread(const Forward& call, const float* z, int64_t z_stride, int64_t count, bool first_tile, int64_t at,
                const vf* before, const vf* top, const vf* moved) {
  vf spread[N];
  for (int n = 0; n < N; n++) spread[n] = splat(0.f);
  for (int64_t r = 0; r < count; r++) {
    for (int n = 0; n < N; n++) {
      const vf d = load(z + r * z_stride + n * kLanes) - top[n];
      spread[n] += exp_of(d) * max_of(splat(-100.f), d);  // exp(-100) is 0 here: keeps 0 * -inf out
    }
  }
  for (int n = 0; n < N; n++) {
    float* to = call.out.spread + at + n * kLanes;
    const vf sum = load(call.out.sum + at + n * kLanes);
    store(to, first_tile ? spread[n] : (load(to) + (before[n] - top[n]) * sum) * moved[n] + spread[n]);
  }
}

// sum + rest, after both shrank by `moved`, take a term in. Where p is near 1, hundreds of tiles add less than 1e-7 of
// the sum each: what the addition rounds away goes to rest (Knuth's two-sum).
PREFOPT_INLINE void add_exactly(float* sum, float* rest, vf term, vf moved, bool first) {
  const vf older = first ? splat(0.f) : load(sum) * moved, newer = older + term;
  const vf added = newer - older, lost = (older - (newer - added)) + (term - added);
  store(sum, newer);
  store(rest, first ? lost : load(rest) * moved + lost);
}

// The running sums of N registers of tokens take a tile of logits in; with a product wanted, p = exp(z - m) slope is
// written. z_stride in floats; p_stride in bytes, of kStep rows. `moved` is the factor by which the older part of the
// product shrinks. kRef: ref_z has the reference model's logits, laid out as z.
template <class Dot, int N, bool kRef>
void softmax_columns(const Forward& call, const float* z, const float* ref_z, int64_t z_stride, char* p,
                     int64_t p_stride, int64_t v, int64_t count, bool first_tile, int64_t split, int64_t token,
                     vf* moved) {
  const Operands& in = call.in;
  const int64_t at = split * call.layout.padded_tokens + token;
  float *max = call.out.max + at, *sum = call.out.sum + at, *target = call.out.target + at;
  const int64_t valid = min_of(in.T - token, N * kLanes);
  for (int64_t i = 0; i < valid; i++) {
    const int64_t y = in.targets[token + i] - v;
    if (first_tile) target[i] = 0;
    if (y >= 0 && y < count) target[i] = z[y * z_stride + i];
  }

  vf top[N], before[N];
  for (int n = 0; n < N; n++) top[n] = splat(-3.4028235e38f);  // finite, so that a tile of -inf gives 0 and not NaN
  for (int64_t r = 0; r < count; r++)
    for (int n = 0; n < N; n++) top[n] = max_of(top[n], load(z + r * z_stride + n * kLanes));
  for (int n = 0; n < N; n++) {
    before[n] = first_tile ? top[n] : load(max + n * kLanes);
    top[n] = max_of(before[n], top[n]);
    moved[n] = exp_of(before[n] - top[n]);
  }
  if (call.want_spread) add_spread<N>(call, z, z_stride, count, first_tile, at, before, top, moved);
  if (call.want_logits) add_logit_sums<N>(call.out.logits + at, z, z_stride, count, first_tile);

  // a sum of its own per tile: one running sum over 150,000 terms would lose 1e-5 of itself to rounding
  vf tile_sum[N], tile_gap[N];
  for (int n = 0; n < N; n++) tile_sum[n] = tile_gap[n] = splat(0.f);
  const bool capped = in.softcap != 0, product = call.out.product != nullptr;
  for (int64_t r = 0; r < count; r += Dot::kStep) {
    for (int n = 0; n < N; n++) {
      vf e[2] = {splat(0.f), splat(0.f)};
      for (int s = 0; s < Dot::kStep; s++) {
        if (r + s >= count) break;
        const vf logit = load(z + (r + s) * z_stride + n * kLanes);
        e[s] = exp_of(logit - top[n]);
        tile_sum[n] += e[s];
        if constexpr (kRef) {  // a token that the policy bans counts for nothing, whatever its logits
          const vf gap = logit - load(ref_z + (r + s) * z_stride + n * kLanes);
          tile_gap[n] += select((vi)(e[s] > splat(0.f)), e[s] * gap, splat(0.f));
        }
        if (capped && product) e[s] = e[s] * slope_of(in, logit);
      }
      if (product) Dot::put(p + r / Dot::kStep * p_stride + n * kLanes * Dot::kUnitBytes, e[0], e[1]);
    }
  }
  // The target's own term stays out of the product: where p is near 1 it would cancel against W[y] after its
  // rounding.
  for (int64_t i = 0; i < valid && product; i++) {
    const int64_t y = in.targets[token + i] - v;
    if (y >= 0 && y < count)
      __builtin_memset(p + y / Dot::kStep * p_stride + i * Dot::kUnitBytes + y % Dot::kStep * kElementBytes<Dot>, 0,
                       kElementBytes<Dot>);
  }
  for (int n = 0; n < N; n++) {
    const int64_t column = at + n * kLanes;
    add_exactly(sum + n * kLanes, call.out.rest + column, tile_sum[n], moved[n], first_tile);
    if constexpr (kRef)
      add_exactly(call.out.gap + column, call.out.gap_rest + column, tile_gap[n], moved[n], first_tile);
    store(max + n * kLanes, top[n]);
  }
}

template <class Dot, int N>
void forward_panel(const Forward& call, const Scratch<Dot>& scratch, const Scratch<Dot>& ref_scratch, const Tile& tile,
                   const Tile& ref_tile, int64_t v, int64_t count, bool first_tile, int64_t split, int64_t token) {
  constexpr int kWidth = N * kLanes;
  const float *z = scratch.z, *ref_z = ref_scratch.z;
  logits<Dot, N>(call, tile, v, count, token, scratch.z);
  vf moved[N];
  if (call.ref) {
    logits<Dot, N>(*call.ref, ref_tile, v, count, token, ref_scratch.z);
    softmax_columns<Dot, N, false>(*call.ref, ref_z, nullptr, kWidth, nullptr, 0, v, count, first_tile, split, token,
                                   moved);
    softmax_columns<Dot, N, true>(call, z, ref_z, kWidth, scratch.p, kWidth * Dot::kUnitBytes, v, count, first_tile,
                                  split, token, moved);
  } else {
    softmax_columns<Dot, N, false>(call, z, nullptr, kWidth, scratch.p, kWidth * Dot::kUnitBytes, v, count, first_tile,
                                   split, token, moved);
  }
  if (!call.out.product) return;
  const int64_t columns = call.layout.padded_hidden, K = units<Dot>(count);
  const int64_t valid = min_of(call.in.T - token, kWidth);
  float* product = call.out.product + (split * call.in.T + token) * columns;
  if (!first_tile) scale_product<N>(product, columns, valid, moved);
  for (int64_t g = 0; g < columns / kGroup; g++) {
    const float* packed = reinterpret_cast<const float*>(scratch.packed) + g * K * kGroup;
    multiply<Dot, kTokenRows, kHiddenVectors>(valid, K, scratch.p, 4, kWidth * 4, packed, product + g * kGroup, columns,
                                              !first_tile);
  }
}

template <class Dot, class Element>
void forward(const Forward& call, int64_t worker, int64_t workers) {
  const Operands& in = call.in;
  const Panels panels(in.T);
  const Scratch<Dot> scratch = scratch_of<Dot>(call, worker), ref_scratch = ref_scratch_of(call, worker, scratch);
  for (int64_t task = worker; task < call.splits * call.groups; task += workers) {
    const int64_t split = task % call.splits, group = task / call.splits;
    const int64_t tiles = divide_up(in.V, kVocabularyRows);
    const int64_t begin = tiles * split / call.splits * kVocabularyRows;
    const int64_t end = min_of(tiles * (split + 1) / call.splits * kVocabularyRows, in.V);
    const int64_t first_panel = panels.count * group / call.groups;
    const int64_t last_panel = panels.count * (group + 1) / call.groups;
    for (int64_t v = begin; v < end; v += kTileRows) {
      const int64_t count = min_of(end - v, kTileRows);
      const Tile tile = weight_tile<Dot, Element>(in, v, count, scratch);
      const Tile other = ref_tile<Dot, Element>(call, tile, v, count, ref_scratch);
      if (call.out.product) {
        pack_columns<Dot, kGroup>(weight_rows<Element>(in, v), count, in.H, 0, call.layout.padded_hidden / kGroup,
                                  scratch.packed);
      }
      for (int64_t panel = first_panel; panel < last_panel; panel++) {
        panels.visit(panel, [&](auto width) {
          forward_panel<Dot, decltype(width)::value>(call, scratch, ref_scratch, tile, other, v, count, v == begin,
                                                     split, panels.first_vector(panel) * kLanes);
        });
      }
    }
  }
}

// unit = slope (1 - p[y]) W[y] - sum over splits of product_scale * product, subtracted in fp32 and rounded once
template <class Element>
void write_unit(const Forward& call, int64_t worker, int64_t workers) {
  const Operands& in = call.in;
  const int64_t columns = call.layout.padded_hidden;
  for (int64_t i = in.T * worker / workers; i < in.T * (worker + 1) / workers; i++) {
    const Element* target = weight_rows<Element>(in, in.targets[i])[0];
    Element* out = static_cast<Element*>(call.unit) + in.rows[i] * in.H;
    for (int64_t h = 0; h < in.H; h++) {
      float value = call.target_scale[i] * to_float(target[h]);
      for (int64_t s = 0; s < call.splits; s++)
        value -= call.product_scale[s * in.T + i] * call.out.product[(s * in.T + i) * columns + h];
      from_float(value, out + h);
    }
  }
}

}  // namespace prefopt::PREFOPT_ISA
