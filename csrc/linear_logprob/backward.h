// The backward of a trainable head, of the bias and through the entropy: the logits of a chunk of the vocabulary are
// computed again, turned into dz, and multiplied with W (hidden's gradient) and with hidden (the head's gradient).
#pragma once
#include "logits.h"

namespace prefopt::PREFOPT_ISA {

// Panels whose dz stays in the second-level cache for all groups of W.
constexpr int64_t kPanelBlock = 4;

template <class Dot, class Element>
void pack_weight(const Backward& call, int64_t worker, int64_t workers) {
  const int64_t groups = call.layout.padded_hidden / kGroup;
  pack_columns<Dot, kGroup>(weight_rows<Element>(call.in, call.begin), call.end - call.begin, call.in.H,
                            groups * worker / workers, groups * (worker + 1) / workers,
                            reinterpret_cast<int32_t*>(call.weight_packed));
}

// Gradient in the raw logits of vocabulary row v, for the register of tokens that starts at `token`. ref_z: the
// reference model's logits, where there is one.
PREFOPT_INLINE vf logit_slope(const Backward& call, vf z, const float* ref_z, int64_t v, int64_t token) {
  const vf log_p = z - load(call.lse + token);
  vf factor = load(call.factor + token);
  if (call.dentropy) {
    // exp(-100) is 0 here: the bound keeps 0 * -inf out
    const vf spread = max_of(splat(-100.f), log_p) + load(call.entropy + token);
    factor = factor - load(call.dentropy + token) * spread;
  }
  vi target;
  __builtin_memcpy(&target, call.target_ids + token, sizeof target);
  const vi hit = (vi)(target == splat_bits(static_cast<int32_t>(v)));
  const vf p = exp_of(log_p);
  vf dz = p * factor + select(hit, load(call.dlogp + token), splat(0.f));
  if (ref_z) {
    const vf gap = z - load(ref_z) - load(call.gap + token);
    dz += select((vi)(p > splat(0.f)), p * load(call.dkl + token) * gap, splat(0.f));
  }
  const vf slope = splat(call.in.scale / call.in.temperature);
  return call.in.softcap == 0 ? dz * slope : dz * slope * slope_of(call.in, z);
}

// dz of a tile for N registers of tokens, in the layouts of all products, and summed over the tokens for the bias.
// z_stride in floats, of ref_z too, which may be null; by_token_stride in bytes, of kStep rows; add_bias: another
// column of the panel came before.
template <class Dot, int N>
void gradient_columns(const Backward& call, const float* z, const float* ref_z, int64_t z_stride, char* by_token,
                      int64_t by_token_stride, float* dbias, bool add_bias, int64_t v, int64_t count, int64_t token) {
  const int64_t row_bytes = call.layout.padded_tokens * kElementBytes<Dot>;
  char* by_row = call.dz_by_row + (v - call.begin) * row_bytes + token * kElementBytes<Dot>;
  float* low = call.dz_low ? call.dz_low + token * (call.end - call.begin) + (v - call.begin) * N * kLanes : nullptr;
  for (int64_t r = 0; r < count; r += Dot::kStep, by_token += by_token_stride) {
    for (int n = 0; n < N; n++) {
      vf dz[2] = {splat(0.f), splat(0.f)};
      for (int s = 0; s < Dot::kStep && r + s < count; s++) {
        const int64_t at = (r + s) * z_stride + n * kLanes;
        dz[s] = logit_slope(call, load(z + at), ref_z ? ref_z + at : nullptr, v + r + s, token + n * kLanes);
        if (call.dz_by_row) Dot::put_row(by_row + (r + s) * row_bytes + n * kLanes * kElementBytes<Dot>, dz[s]);
        if (low) store(low + ((r + s) * N + n) * kLanes, dz[s]);
        if (dbias) dbias[r + s] = (n || add_bias ? dbias[r + s] : 0) + sum_of(dz[s]);
      }
      if (call.dz_by_token) Dot::put(by_token + n * kLanes * Dot::kUnitBytes, dz[0], dz[1]);
    }
  }
}

template <class Dot, int N>
void gradient_panel(const Backward& call, const Scratch<Dot>& scratch, const Scratch<Dot>& ref_scratch,
                    const Tile& tile, const Tile& ref_tile, int64_t v, int64_t count, int64_t panel, int64_t token) {
  constexpr int kWidth = N * kLanes;
  logits<Dot, N>(call, tile, v, count, token, scratch.z);
  if (call.ref) logits<Dot, N>(*call.ref, ref_tile, v, count, token, ref_scratch.z);
  const float* ref_z = call.ref ? ref_scratch.z : nullptr;
  const int64_t rows = call.end - call.begin, row = v - call.begin;
  char* by_token = call.dz_by_token + (token * units<Dot>(rows) + row / Dot::kStep * kWidth) * 4;
  float* dbias = call.dbias_parts ? call.dbias_parts + panel * rows + row : nullptr;
  gradient_columns<Dot, N>(call, scratch.z, ref_z, kWidth, by_token, kWidth * 4, dbias, false, v, count, token);
}

template <class Dot, class Element>
void logit_gradient(const Backward& call, int64_t worker, int64_t workers) {
  const Panels panels(call.in.T);
  const Scratch<Dot> scratch = scratch_of<Dot>(call, worker), ref_scratch = ref_scratch_of(call, worker, scratch);
  const int64_t tasks = divide_up(call.end - call.begin, kTileRows) * panels.count;
  int64_t loaded = -1;
  Tile tile{}, other{};
  for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers; task++) {
    const int64_t v = call.begin + task / panels.count * kTileRows, panel = task % panels.count;
    const int64_t count = min_of(call.end - v, kTileRows);
    if (v != loaded) {
      tile = weight_tile<Dot, Element>(call.in, v, count, scratch);
      other = ref_tile<Dot, Element>(call, tile, v, count, ref_scratch);
    }
    loaded = v;
    panels.visit(panel, [&](auto width) {
      gradient_panel<Dot, decltype(width)::value>(call, scratch, ref_scratch, tile, other, v, count, panel,
                                                  panels.first_vector(panel) * kLanes);
    });
  }
}

// dhidden (T, H) += dz^T W over the chunk
template <class Dot>
void add_dhidden(const Backward& call, int64_t worker, int64_t workers) {
  const Panels panels(call.in.T);
  const int64_t groups = call.layout.padded_hidden / kGroup, K = units<Dot>(call.end - call.begin);
  const int64_t tasks = divide_up(panels.count, kPanelBlock) * groups;
  for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers; task++) {
    const int64_t first = task / groups * kPanelBlock, g = task % groups;
    for (int64_t panel = first; panel < panels.count && panel < first + kPanelBlock; panel++) {
      const int64_t token = panels.first_vector(panel) * kLanes, width = panels.width(panel) * kLanes;
      const int64_t valid = min_of(call.in.T - token, width);
      multiply<Dot, kTokenRows, kHiddenVectors>(valid, K, call.dz_by_token + token * K * 4, 4, width * 4,
                                                reinterpret_cast<const float*>(call.weight_packed) + g * K * kGroup,
                                                call.dhidden_sums + token * call.layout.padded_hidden + g * kGroup,
                                                call.layout.padded_hidden, !call.first_chunk);
    }
  }
}

// dhidden: the sums of the parts, added in their order and rounded once
template <class Element>
void write_dhidden(const Backward& call, int64_t worker, int64_t workers) {
  const Operands& in = call.in;
  const int64_t columns = call.layout.padded_hidden;
  for (int64_t i = in.T * worker / workers; i < in.T * (worker + 1) / workers; i++) {
    Element* out = static_cast<Element*>(call.dhidden) + in.rows[i] * in.H;
    for (int64_t h = 0; h < in.H; h++) {
      float sum = call.dhidden_parts[i * columns + h];
      for (int64_t part = 1; part < call.parts; part++) sum += call.dhidden_parts[(part * in.T + i) * columns + h];
      from_float(sum, out + h);
    }
  }
}

inline void write_dbias(const Backward& call, int64_t first, int64_t last) {
  const int64_t rows = call.end - call.begin;
  for (int64_t r = first; r < last && call.dbias; r++) {
    float sum = 0;
    for (int64_t panel = 0; panel < call.layout.panels; panel++) sum += call.dbias_parts[panel * rows + r];
    call.dbias[call.begin + r] = sum;
  }
}

template <class Dot, class Element>
void dweight_block(const Backward& call, float* sums, int64_t row, int64_t count, int64_t g) {
  const int64_t K = units<Dot>(call.in.T), H = call.in.H, stride = call.layout.padded_tokens * kElementBytes<Dot>;
  multiply<Dot, kTokenRows, kHiddenVectors>(count, K, call.dz_by_row + row * stride, stride, 4,
                                            reinterpret_cast<const float*>(call.tokens_packed) + g * K * kGroup, sums,
                                            kGroup, false);
  const int64_t width = min_of(H - g * kGroup, kGroup);
  for (int64_t r = 0; r < count; r++) {
    Element* out = static_cast<Element*>(call.dweight) + (call.begin + row + r) * H + g * kGroup;
    for (int64_t h = 0; h < width; h++) from_float(sums[r * kGroup + h], out + h);
  }
}

// dweight (V, H) and dbias (V,) of the chunk: every row is finished here, summed in fp32 over all tokens and rounded
// once
template <class Dot, class Element>
void write_dweight(const Backward& call, int64_t worker, int64_t workers) {
  const Scratch<Dot> scratch = scratch_of<Dot>(call, worker);
  const int64_t rows = call.end - call.begin;
  const int64_t first = rows * worker / workers, last = rows * (worker + 1) / workers;
  write_dbias(call, first, last);
  for (int64_t r = first; r < last && call.dweight; r += kHeadRows) {
    const int64_t count = min_of(last - r, kHeadRows);
    for (int64_t g = 0; g < call.layout.padded_hidden / kGroup; g++)
      dweight_block<Dot, Element>(call, scratch.head, r, count, g);
  }
}

}  // namespace prefopt::PREFOPT_ISA
