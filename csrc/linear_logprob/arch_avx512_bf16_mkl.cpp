// avx512_bf16+mkl: bf16 products by MKL; the softmax and the gradient of the logits are the kernels' own.
#include "../cpu/matmul_mkl_bf16.h"
#include "params.h"
#if PREFOPT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include <immintrin.h>
#define PREFOPT_ISA avx512_bf16_mkl
#define PREFOPT_LANES 16
#include "kernels.h"

namespace prefopt::avx512_bf16_mkl {

// Row-major bf16, as MKL reads it: no pairs, and no multiply-add.
struct RowMajor {
  static constexpr int kStep = 1, kUnitBytes = 2;
  using Unit = bf16;
  static PREFOPT_INLINE void put(char* out, vf x, vf) { put_row(out, x); }
  static PREFOPT_INLINE void put_row(char* out, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
};

constexpr int64_t kRows = 512, kPanel = 512;  // a tile: 1 MiB of logits and half of that of p, in a 2 MiB L2

// body(Constant<N>, first column) for every N registers of `width` columns
template <class Body>
void each_columns(int64_t width, const Body& body) {
  int64_t c = 0;
  for (; width - c >= 3 * kLanes; c += 3 * kLanes) body(Constant<3>{}, c);
  if (width - c == 2 * kLanes) body(Constant<2>{}, c);
  if (width - c == kLanes) body(Constant<1>{}, c);
}

// The panels of tokens for everything but the products.
struct Columns {
  template <class Body>
  static void each(int64_t tokens, const Body& body) {
    const int64_t padded = divide_up(tokens, kLanes) * kLanes;
    for (int64_t token = 0; token < padded; token += kPanel)
      each_columns(min_of(padded - token, kPanel), [&](auto registers, int64_t c) { body(registers, token + c); });
  }
};

// Buffers of one worker.
struct MklScratch {
  float* low;   // first, for low_rank.h
  float* z;     // (kRows, kPanel)
  char* p;      // (kRows, kPanel) bf16, forward only
  float* head;  // (kHeadRows, H), backward only
  int64_t bytes;
  MklScratch(Carver carver, const Operands& in)
      : low(carver.take<float>(low_scratch(in.R, kRows))),
        z(carver.take<float>(kRows * kPanel)),
        p(carver.take<char>(kRows * kPanel * 2)),
        head(carver.take<float>(kHeadRows * in.H)),
        bytes(carver.bytes()) {}
};

template <class Call>
MklScratch mkl_scratch(const Call& call, int64_t worker) {
  return {Carver(call.scratch + worker * call.layout.scratch_bytes), call.in};
}

// The worker's buffers for the reference model; its own where there is none.
template <class Call>
MklScratch mkl_ref_scratch(const Call& call, int64_t worker, const MklScratch& own) {
  if (!call.ref) return own;
  return {Carver(call.scratch + worker * call.layout.scratch_bytes + own.bytes), call.ref->in};
}

// Rows of the low-rank operands of the policy and of the reference model.
struct LowTiles {
  LowTile own, ref;
};

template <class Call>
LowTiles low_tiles(const Call& call, int64_t v, int64_t count, const MklScratch& scratch, const MklScratch& ref) {
  return {low_tile<bf16>(call.in, v, count, scratch.low),
          call.ref ? low_tile<bf16>(call.ref->in, v, count, ref.low) : LowTile{}};
}

void mkl_layout(const Operands& in, Layout* out) {
  out->panels = divide_up(in.T, kPanel);
  out->padded_tokens = divide_up(in.T, kLanes) * kLanes;
  out->padded_hidden = divide_up(in.H, kLanes) * kLanes;
  out->lanes = kLanes;
  out->tile_rows = kRows;
  out->element_bytes = 2;
  out->hidden_bytes = out->padded_tokens * in.H * 2;
  out->tokens_bytes = 0;  // hidden_packed serves both products
  out->scratch_bytes = MklScratch(Carver(nullptr), in).bytes;
}

const uint16_t* weight_row(const Operands& in, int64_t row) {
  return static_cast<const uint16_t*>(in.weight) + row * in.weight_stride;
}

void mkl_pack_hidden(const Operands& in, const Layout& layout, char* hidden_packed, int64_t worker, int64_t workers) {
  const Rows<bf16> rows = hidden_rows<bf16>(in);
  bf16* out = reinterpret_cast<bf16*>(hidden_packed);
  const int64_t N = layout.padded_tokens;
  for (int64_t i = N * worker / workers; i < N * (worker + 1) / workers; i++) {
    // filled up with the last token and not with 0, which times an infinite weight would be NaN
    __builtin_memcpy(out + i * in.H, rows[min_of(i, in.T - 1)], static_cast<uint64_t>(in.H * 2));
  }
}

void nothing_to_pack(const Operands&, const Layout&, char*, int64_t, int64_t) {}
void nothing_to_pack(const Backward&, int64_t, int64_t) {}

// z = W h^T of `count` vocabulary rows for the panel of tokens that starts at `token`
template <class Call>
void raw_logits(const Call& call, int64_t v, int64_t count, int64_t token, int64_t width, float* z) {
  const Operands& in = call.in;
  matmul_mkl_bf16(Transpose::kNo, Transpose::kYes, count, width, in.H, weight_row(in, v), in.weight_stride,
                  call.hidden_packed + token * in.H * 2, in.H, 0, z, width);
}

// z of N registers of tokens, from the raw products with the head
template <int N, class Call>
void finish_logits(const Call& call, const LowTile& low, int64_t v, int64_t count, int64_t token, int64_t width,
                   float* z) {
  add_low_logits<N>(call.in, low, count, call.low_packed, token, z, width);
  transform<N>(call.in, v, count, z, width);
}

void forward_tile(const Forward& call, const MklScratch& scratch, const MklScratch& ref_scratch, const LowTiles& low,
                  int64_t v, int64_t count, bool first_tile, int64_t split, int64_t panel) {
  const Operands& in = call.in;
  const int64_t token = panel * kPanel, width = min_of(call.layout.padded_tokens - token, kPanel);
  const int64_t valid = min_of(in.T - token, width), columns = call.layout.padded_hidden;
  float *z = scratch.z, *out = call.out.product ? call.out.product + (split * in.T + token) * columns : nullptr;
  raw_logits(call, v, count, token, width, z);
  if (call.ref) raw_logits(*call.ref, v, count, token, width, ref_scratch.z);
  each_columns(width, [&](auto registers, int64_t c) {
    constexpr int N = decltype(registers)::value;
    vf moved[N];
    finish_logits<N>(call, low.own, v, count, token + c, width, z + c);
    char* p = scratch.p + c * 2;
    if (call.ref) {
      float* ref_z = ref_scratch.z + c;
      finish_logits<N>(*call.ref, low.ref, v, count, token + c, width, ref_z);
      softmax_columns<RowMajor, N, false>(*call.ref, ref_z, nullptr, width, nullptr, 0, v, count, first_tile, split,
                                          token + c, moved);
      softmax_columns<RowMajor, N, true>(call, z + c, ref_z, width, p, width * 2, v, count, first_tile, split,
                                         token + c, moved);
    } else {
      softmax_columns<RowMajor, N, false>(call, z + c, nullptr, width, p, width * 2, v, count, first_tile, split,
                                          token + c, moved);
    }
    if (out && !first_tile) scale_product<N>(out + c * columns, columns, min_of(valid - c, N * kLanes), moved);
  });
  if (!out) return;
  matmul_mkl_bf16(Transpose::kYes, Transpose::kNo, valid, in.H, count, scratch.p, width, weight_row(in, v),
                  in.weight_stride, first_tile ? 0.f : 1.f, out, columns);
}

void mkl_forward(const Forward& call, int64_t worker, int64_t workers) {
  const Operands& in = call.in;
  const MklScratch scratch = mkl_scratch(call, worker), ref_scratch = mkl_ref_scratch(call, worker, scratch);
  for (int64_t task = worker; task < call.splits * call.groups; task += workers) {
    const int64_t split = task % call.splits, group = task / call.splits;
    const int64_t begin = in.V * split / call.splits, end = in.V * (split + 1) / call.splits;
    const int64_t last_panel = call.layout.panels * (group + 1) / call.groups;
    for (int64_t v = begin; v < end; v += kRows) {
      const int64_t count = min_of(end - v, kRows);
      const LowTiles low = low_tiles(call, v, count, scratch, ref_scratch);
      for (int64_t panel = call.layout.panels * group / call.groups; panel < last_panel; panel++)
        forward_tile(call, scratch, ref_scratch, low, v, count, v == begin, split, panel);
    }
  }
}

void mkl_logit_gradient(const Backward& call, int64_t worker, int64_t workers) {
  const MklScratch scratch = mkl_scratch(call, worker), ref_scratch = mkl_ref_scratch(call, worker, scratch);
  int64_t loaded = -1;
  LowTiles low{};
  const int64_t rows = call.end - call.begin, panels = call.layout.panels, stride = call.layout.padded_tokens * 2;
  const int64_t tasks = divide_up(rows, kRows) * panels;
  for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers; task++) {
    const int64_t v = call.begin + task / panels * kRows, panel = task % panels, token = panel * kPanel;
    const int64_t count = min_of(call.end - v, kRows), width = min_of(call.layout.padded_tokens - token, kPanel);
    if (v != loaded) low = low_tiles(call, v, count, scratch, ref_scratch);
    loaded = v;
    raw_logits(call, v, count, token, width, scratch.z);
    if (call.ref) raw_logits(*call.ref, v, count, token, width, ref_scratch.z);
    float* dbias = call.dbias_parts ? call.dbias_parts + panel * rows + v - call.begin : nullptr;
    each_columns(width, [&](auto registers, int64_t c) {
      constexpr int N = decltype(registers)::value;
      float *z = scratch.z + c, *ref_z = call.ref ? ref_scratch.z + c : nullptr;
      char* by_token = call.dz_by_token + (v - call.begin) * stride + (token + c) * 2;
      finish_logits<N>(call, low.own, v, count, token + c, width, z);
      if (ref_z) finish_logits<N>(*call.ref, low.ref, v, count, token + c, width, ref_z);
      gradient_columns<RowMajor, N>(call, z, ref_z, width, by_token, stride, dbias, c > 0, v, count, token + c);
    });
  }
}

void mkl_add_dhidden(const Backward& call, int64_t worker, int64_t workers) {
  const int64_t T = call.in.T, first = T * worker / workers, count = T * (worker + 1) / workers - first;
  const int64_t columns = call.layout.padded_hidden;
  if (count == 0) return;
  matmul_mkl_bf16(Transpose::kYes, Transpose::kNo, count, call.in.H, call.end - call.begin,
                  call.dz_by_token + first * 2, call.layout.padded_tokens, weight_row(call.in, call.begin),
                  call.in.weight_stride, call.first_chunk ? 0.f : 1.f, call.dhidden_sums + first * columns, columns);
}

void mkl_write_dweight(const Backward& call, int64_t worker, int64_t workers) {
  const int64_t H = call.in.H, N = call.layout.padded_tokens, rows = call.end - call.begin;
  float* sums = mkl_scratch(call, worker).head;
  const int64_t first = rows * worker / workers, last = rows * (worker + 1) / workers;
  write_dbias(call, first, last);
  for (int64_t r = first; r < last && call.dweight; r += kHeadRows) {
    const int64_t count = min_of(last - r, kHeadRows);
    matmul_mkl_bf16(Transpose::kNo, Transpose::kNo, count, H, N, call.dz_by_row + r * N * 2, N, call.hidden_packed, H,
                    0, sums, H);
    bf16* out = static_cast<bf16*>(call.dweight) + (call.begin + r) * H;
    for (int64_t i = 0; i < count * H; i++) from_float(sums[i], out + i);
  }
}

const Kernels kBfloat16 = {
    .layout = mkl_layout,
    .pack_hidden = mkl_pack_hidden,
    .pack_tokens = nothing_to_pack,
    .pack_low = pack_low<Columns>,
    .forward = mkl_forward,
    .write_unit = write_unit<bf16>,
    .pack_weight = nothing_to_pack,
    .logit_gradient = mkl_logit_gradient,
    .add_dhidden = mkl_add_dhidden,
    .write_dhidden = write_dhidden<bf16>,
    .write_dweight = mkl_write_dweight,
    .add_dlow_hidden = add_dlow_hidden<bf16, Columns>,
    .write_dlow_weight = write_dlow_weight<bf16, Columns>,
};

}  // namespace prefopt::avx512_bf16_mkl
#endif
