// The backward of a trainable head, of the bias and through the entropy: the logits of a chunk of the vocabulary are
// computed again, turned into dz, and multiplied with W (hidden's gradient) and with hidden (the head's gradient).
#pragma once
#include "kernel_common.h"

namespace prefopt::PREFOPT_ISA {

template <class Dot, class Element>
struct BackwardPass : Common<Dot, Element> {
  using Base = Common<Dot, Element>;
  using Base::kStep;
  using Base::units;
  using typename Base::Scratch;
  using typename Base::Tile;
  static constexpr int64_t kPanelBlock = 4;  // panels whose dz stays in the second-level cache for all groups of W
  static constexpr int64_t kElementBytes = Dot::kUnitBytes / kStep;  // of a packed element

  static void pack_weight(const Backward& call, int64_t worker, int64_t workers) {
    const int64_t groups = call.layout.padded_hidden / kGroup;
    pack_columns<Dot, kGroup>(Base::weight_rows(call.in, call.begin), call.end - call.begin, call.in.H,
                              groups * worker / workers, groups * (worker + 1) / workers,
                              reinterpret_cast<int32_t*>(call.weight_packed));
  }

  static void logit_gradient(const Backward& call, int64_t worker, int64_t workers) {
    const Panels panels(call.in.T);
    const Scratch scratch(call.scratch + worker * call.layout.backward_bytes, call.in.H, call.layout.padded_hidden,
                          call.in.R);
    const int64_t tasks = divide_up(call.end - call.begin, kTileRows) * panels.count;
    int64_t loaded = -1;
    Tile tile{};
    for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers; task++) {
      const int64_t v = call.begin + task / panels.count * kTileRows, panel = task % panels.count;
      const int64_t count = call.end - v < kTileRows ? call.end - v : kTileRows;
      if (v != loaded) tile = Base::weight_tile(call.in, v, count, scratch);
      loaded = v;
      panels.visit(panel, [&](auto width) {
        gradient_panel<decltype(width)::value>(call, scratch, tile, v, count, panel,
                                               panels.first_vector(panel) * kLanes);
      });
    }
  }

  template <int N>
  static void gradient_panel(const Backward& call, const Scratch& scratch, const Tile& tile, int64_t v, int64_t count,
                             int64_t panel, int64_t token) {
    constexpr int kWidth = N * kLanes;
    Base::template logits<N>(call.in, tile, v, count, call.hidden_packed, call.low_packed, token, scratch.z);
    const int64_t rows = call.end - call.begin, row = v - call.begin;
    char* by_token = call.dz_by_token + (token * units(rows) + row / kStep * kWidth) * 4;
    float* dbias = call.dbias_parts ? call.dbias_parts + panel * rows + row : nullptr;
    gradient_columns<N>(call, scratch.z, kWidth, by_token, kWidth * 4, dbias, false, v, count, token);
  }

  // dz of a tile for N registers of tokens, in the layouts of all products, and summed over the tokens for the bias.
  // z_stride in floats; by_token_stride in bytes, of kStep rows; add_bias: another column of the panel came before.
  template <int N>
  static void gradient_columns(const Backward& call, const float* z, int64_t z_stride, char* by_token,
                               int64_t by_token_stride, float* dbias, bool add_bias, int64_t v, int64_t count,
                               int64_t token) {
    const int64_t row_bytes = call.layout.padded_tokens * kElementBytes;
    char* by_row = call.dz_by_row + (v - call.begin) * row_bytes + token * kElementBytes;
    float* low = call.dz_low ? call.dz_low + token * (call.end - call.begin) + (v - call.begin) * N * kLanes : nullptr;
    for (int64_t r = 0; r < count; r += kStep, by_token += by_token_stride) {
      for (int n = 0; n < N; n++) {
        vf dz[2] = {splat(0.f), splat(0.f)};
        for (int s = 0; s < kStep && r + s < count; s++) {
          dz[s] = gradient(call, load(z + (r + s) * z_stride + n * kLanes), v + r + s, token + n * kLanes);
          if (call.dz_by_row) Dot::put_row(by_row + (r + s) * row_bytes + n * kLanes * kElementBytes, dz[s]);
          if (low) store(low + ((r + s) * N + n) * kLanes, dz[s]);
          if (dbias) dbias[r + s] = (n || add_bias ? dbias[r + s] : 0) + sum_of(dz[s]);
        }
        if (call.dz_by_token) Dot::put(by_token + n * kLanes * Dot::kUnitBytes, dz[0], dz[1]);
      }
    }
  }

  // Gradient in the raw logits of vocabulary row v, for the register of tokens that starts at `token`.
  static PREFOPT_INLINE vf gradient(const Backward& call, vf z, int64_t v, int64_t token) {
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
    const vf dz = exp_of(log_p) * factor + select(hit, load(call.dlogp + token), splat(0.f));
    const vf slope = splat(call.in.scale / call.in.temperature);
    return call.in.softcap == 0 ? dz * slope : dz * slope * Base::slope_of(call.in, z);
  }

  // dhidden (T, H) += dz^T W over the chunk
  static void add_dhidden(const Backward& call, int64_t worker, int64_t workers) {
    const Panels panels(call.in.T);
    const int64_t groups = call.layout.padded_hidden / kGroup, K = units(call.end - call.begin);
    const int64_t tasks = divide_up(panels.count, kPanelBlock) * groups;
    for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers; task++) {
      const int64_t first = task / groups * kPanelBlock, g = task % groups;
      for (int64_t panel = first; panel < panels.count && panel < first + kPanelBlock; panel++) {
        const int64_t token = panels.first_vector(panel) * kLanes, width = panels.width(panel) * kLanes;
        const int64_t valid = call.in.T - token < width ? call.in.T - token : width;
        multiply<Dot, kTokenRows, kHiddenVectors>(valid, K, call.dz_by_token + token * K * 4, 4, width * 4,
                                                  reinterpret_cast<const float*>(call.weight_packed) + g * K * kGroup,
                                                  call.dhidden + token * call.layout.padded_hidden + g * kGroup,
                                                  call.layout.padded_hidden, !call.first_chunk);
      }
    }
  }

  // dweight (V, H) and dbias (V,) of the chunk: every row is finished here, summed in fp32 over all tokens and rounded
  // once
  static void write_head_gradient(const Backward& call, int64_t worker, int64_t workers) {
    const Scratch scratch(call.scratch + worker * call.layout.backward_bytes, call.in.H, call.layout.padded_hidden,
                          call.in.R);
    const int64_t rows = call.end - call.begin;
    const int64_t first = rows * worker / workers, last = rows * (worker + 1) / workers;
    finish_dbias(call, first, last);
    for (int64_t r = first; r < last && call.dweight; r += kHeadRows) {
      const int64_t count = last - r < kHeadRows ? last - r : kHeadRows;
      for (int64_t g = 0; g < call.layout.padded_hidden / kGroup; g++) head_block(call, scratch.head, r, count, g);
    }
  }

  static void finish_dbias(const Backward& call, int64_t first, int64_t last) {
    const int64_t rows = call.end - call.begin;
    for (int64_t r = first; r < last && call.dbias; r++) {
      float sum = 0;
      for (int64_t panel = 0; panel < call.layout.panels; panel++) sum += call.dbias_parts[panel * rows + r];
      call.dbias[call.begin + r] = sum;
    }
  }

  static void head_block(const Backward& call, float* sums, int64_t row, int64_t count, int64_t g) {
    const int64_t K = units(call.in.T), H = call.in.H, stride = call.layout.padded_tokens * kElementBytes;
    multiply<Dot, kTokenRows, kHiddenVectors>(count, K, call.dz_by_row + row * stride, stride, 4,
                                              reinterpret_cast<const float*>(call.tokens_packed) + g * K * kGroup, sums,
                                              kGroup, false);
    const int64_t width = H - g * kGroup < kGroup ? H - g * kGroup : kGroup;
    for (int64_t r = 0; r < count; r++) {
      Element* out = static_cast<Element*>(call.dweight) + (call.begin + row + r) * H + g * kGroup;
      for (int64_t h = 0; h < width; h++) from_float(sums[r * kGroup + h], out + h);
    }
  }
};

}  // namespace prefopt::PREFOPT_ISA
