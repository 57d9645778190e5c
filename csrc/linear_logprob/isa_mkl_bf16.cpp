// bf16 products through the MKL that libtorch carries: on a machine with AMX it drives the matrix units. fp32 and fp16
// as in isa_avx512.cpp.
//
// cblas_gemm_bf16bf16f32 has a plain C signature and fp32 sums. It is a weak symbol, so a torch without it leaves this
// instruction set out, and nothing else breaks. The softmax and the gradient of the logits are the kernels' own.
#include "x86.h"
#if PREFOPT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include <immintrin.h>
#define PREFOPT_ISA mkl_bf16
#define PREFOPT_LANES 16
#include "kernel_table.h"

extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int trans_a, int trans_b, int m, int n, int k,
                                                             float alpha, const uint16_t* a, int lda, const uint16_t* b,
                                                             int ldb, float beta, float* c, int ldc);

namespace prefopt {
namespace mkl_bf16 {

// Row-major bf16, as the library wants it: no pairs, and no product of ours.
struct RowMajor {
  static constexpr int kStep = 1, kUnitBytes = 2;
  using Unit = bf16;
  static PREFOPT_INLINE void put(char* out, vf x, vf) { put_row(out, x); }
  static PREFOPT_INLINE void put_row(char* out, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
};

constexpr int64_t kRows = 512, kPanel = 512;  // a tile: 1 MiB of logits and half of that of p, in a 2 MiB L2

enum Transpose { kNo = 111, kYes = 112 };

// c (m, n) = a b + beta c, row-major, leading dimensions in elements
void product(Transpose trans_a, Transpose trans_b, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda,
             const void* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  cblas_gemm_bf16bf16f32(101, trans_a, trans_b, m, n, k, 1.f, static_cast<const uint16_t*>(a), lda,
                         static_cast<const uint16_t*>(b), ldb, beta, c, ldc);
}

// body(Constant<N>, first column) for every N registers of `width` columns
template <class Body>
void each_columns(int64_t width, const Body& body) {
  int64_t c = 0;
  for (; width - c >= 3 * kLanes; c += 3 * kLanes) body(Constant<3>{}, c);
  if (width - c == 2 * kLanes) body(Constant<2>{}, c);
  if (width - c == kLanes) body(Constant<1>{}, c);
}

// The panels of tokens in which the rest of a tile is worked on.
struct Columns {
  template <class Body>
  static void each(int64_t tokens, const Body& body) {
    const int64_t padded = divide_up(tokens, kLanes) * kLanes;
    for (int64_t token = 0; token < padded; token += kPanel)
      each_columns(padded - token < kPanel ? padded - token : kPanel,
                   [&](auto registers, int64_t c) { body(registers, token + c); });
  }
};

struct MklPass {
  using L = LowRank<bf16, Columns>;
  using F = ForwardPass<RowMajor, bf16>;
  using B = BackwardPass<RowMajor, bf16>;

  static void layout(const Operands& in, Layout* out) {
    out->panels = divide_up(in.T, kPanel);
    out->padded_tokens = divide_up(in.T, kLanes) * kLanes;
    out->padded_hidden = divide_up(in.H, kLanes) * kLanes;
    out->hidden_bytes = out->padded_tokens * in.H * 2;
    out->tokens_bytes = 0;  // hidden_packed serves both products
    out->tile_rows = kRows;
    L::layout(in, out);
    out->forward_bytes = low_bytes(in) + kRows * kPanel * 6;
    out->backward_bytes = low_bytes(in) + kRows * kPanel * 4 + kHeadRows * in.H * 4;
    out->chunk_bytes = (2 * out->padded_tokens + out->padded_hidden) * 2 + out->panels * 4 + out->dz_low_bytes;
    out->packs_pairs = true;
  }

  // A worker's scratch begins with LowRank's part.
  static int64_t low_bytes(const Operands& in) { return low_scratch(in.R, kRows) * 4; }

  static const uint16_t* weight(const Operands& in, int64_t row) {
    return static_cast<const uint16_t*>(in.weight) + row * in.weight_stride;
  }

  static void pack_hidden(const Operands& in, const Layout& layout, char* hidden_packed, int64_t worker,
                          int64_t workers) {
    const Rows<bf16> rows = F::hidden_rows(in);
    bf16* out = reinterpret_cast<bf16*>(hidden_packed);
    const int64_t N = layout.padded_tokens;
    for (int64_t i = N * worker / workers; i < N * (worker + 1) / workers; i++) {
      // filled up with the last token and not with 0, which times an infinite weight would be NaN
      __builtin_memcpy(out + i * in.H, rows[i < in.T ? i : in.T - 1], in.H * 2);
    }
  }

  static void nothing_to_pack(const Operands&, const Layout&, char*, int64_t, int64_t) {}
  static void nothing_to_pack(const Backward&, int64_t, int64_t) {}

  static int64_t panel_width(const Layout& layout, int64_t panel) {
    const int64_t left = layout.padded_tokens - panel * kPanel;
    return left < kPanel ? left : kPanel;
  }

  static void forward(const Forward& call, int64_t worker, int64_t workers) {
    const Operands& in = call.in;
    for (int64_t task = worker; task < call.splits * call.groups; task += workers) {
      const int64_t split = task % call.splits, group = task / call.splits;
      const int64_t begin = in.V * split / call.splits, end = in.V * (split + 1) / call.splits;
      char* scratch = call.scratch + worker * call.layout.forward_bytes;
      for (int64_t v = begin; v < end; v += kRows) {
        const int64_t count = end - v < kRows ? end - v : kRows;
        const LowTile low = L::tile(in, v, count, reinterpret_cast<float*>(scratch));
        for (int64_t panel = call.layout.panels * group / call.groups;
             panel < call.layout.panels * (group + 1) / call.groups; panel++) {
          forward_tile(call, scratch + low_bytes(in), low, v, count, v == begin, split, panel);
        }
      }
    }
  }

  static void forward_tile(const Forward& call, char* scratch, const LowTile& low, int64_t v, int64_t count,
                           bool first_tile, int64_t split, int64_t panel) {
    const Operands& in = call.in;
    const int64_t token = panel * kPanel, width = panel_width(call.layout, panel), columns = call.layout.padded_hidden;
    float* z = reinterpret_cast<float*>(scratch);
    char* p = scratch + kRows * kPanel * 4;
    const int64_t valid = in.T - token < width ? in.T - token : width;
    float* out = call.out.product ? call.out.product + (split * in.T + token) * columns : nullptr;
    product(kNo, kYes, count, width, in.H, weight(in, v), in.weight_stride, call.hidden_packed + token * in.H * 2, in.H,
            0, z, width);
    each_columns(width, [&](auto registers, int64_t c) {
      constexpr int N = decltype(registers)::value;
      vf moved[N];
      L::add_logits<N>(in, low, count, call.low_packed, token + c, z + c, width);
      F::transform<N>(in, v, count, z + c, width);
      F::softmax_columns<N>(call, z + c, width, p + c * 2, width * 2, v, count, first_tile, split, token + c, moved);
      const int64_t here = valid - c < N * kLanes ? valid - c : N * kLanes;
      if (out && !first_tile) F::scale_product<N>(out + c * columns, columns, here, moved);
    });
    if (out)
      product(kYes, kNo, valid, in.H, count, p, width, weight(in, v), in.weight_stride, !first_tile, out, columns);
  }

  static void logit_gradient(const Backward& call, int64_t worker, int64_t workers) {
    const Operands& in = call.in;
    char* scratch = call.scratch + worker * call.layout.backward_bytes;
    float* z = reinterpret_cast<float*>(scratch + low_bytes(in));
    int64_t loaded = -1;
    LowTile low{};
    const int64_t rows = call.end - call.begin, panels = call.layout.panels, stride = call.layout.padded_tokens * 2;
    const int64_t tasks = divide_up(rows, kRows) * panels;
    for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers; task++) {
      const int64_t v = call.begin + task / panels * kRows, panel = task % panels, token = panel * kPanel;
      const int64_t count = call.end - v < kRows ? call.end - v : kRows, width = panel_width(call.layout, panel);
      if (v != loaded) low = L::tile(in, v, count, reinterpret_cast<float*>(scratch));
      loaded = v;
      product(kNo, kYes, count, width, in.H, weight(in, v), in.weight_stride, call.hidden_packed + token * in.H * 2,
              in.H, 0, z, width);
      float* dbias = call.dbias_parts ? call.dbias_parts + panel * rows + v - call.begin : nullptr;
      each_columns(width, [&](auto registers, int64_t c) {
        constexpr int N = decltype(registers)::value;
        char* by_token = call.dz_by_token + (v - call.begin) * stride + (token + c) * 2;
        L::add_logits<N>(in, low, count, call.low_packed, token + c, z + c, width);
        F::transform<N>(in, v, count, z + c, width);
        B::gradient_columns<N>(call, z + c, width, by_token, stride, dbias, c > 0, v, count, token + c);
      });
    }
  }

  static void add_dhidden(const Backward& call, int64_t worker, int64_t workers) {
    const int64_t T = call.in.T, first = T * worker / workers, count = T * (worker + 1) / workers - first;
    if (count == 0) return;
    product(kYes, kNo, count, call.in.H, call.end - call.begin, call.dz_by_token + first * 2, call.layout.padded_tokens,
            weight(call.in, call.begin), call.in.weight_stride, !call.first_chunk,
            call.dhidden + first * call.layout.padded_hidden, call.layout.padded_hidden);
  }

  static void write_head_gradient(const Backward& call, int64_t worker, int64_t workers) {
    const int64_t H = call.in.H, N = call.layout.padded_tokens, rows = call.end - call.begin;
    float* sums = reinterpret_cast<float*>(call.scratch + worker * call.layout.backward_bytes + low_bytes(call.in) +
                                           kRows * kPanel * 4);
    const int64_t first = rows * worker / workers, last = rows * (worker + 1) / workers;
    B::finish_dbias(call, first, last);
    for (int64_t r = first; r < last && call.dweight; r += kHeadRows) {
      const int64_t count = last - r < kHeadRows ? last - r : kHeadRows;
      product(kNo, kNo, count, H, N, call.dz_by_row + r * N * 2, N, call.hidden_packed, H, 0, sums, H);
      bf16* out = static_cast<bf16*>(call.dweight) + (call.begin + r) * H;
      for (int64_t i = 0; i < count * H; i++) from_float(sums[i], out + i);
    }
  }

  static constexpr Kernels kernels() {
    return {layout,      pack_hidden,         nothing_to_pack,        L::pack,
            forward,     F::finish_unit,      nothing_to_pack,        logit_gradient,
            add_dhidden, write_head_gradient, L::add_hidden_gradient, L::write_weight_gradient};
  }
};

bool available() { return has_avx512_bf16() && cblas_gemm_bf16bf16f32; }

}  // namespace mkl_bf16

const Isa kIsaMklBf16 = {"mkl_bf16",
                         mkl_bf16::available,
                         {mkl_bf16::kernels<mkl_bf16::DotF32, float>(), mkl_bf16::MklPass::kernels(),
                          mkl_bf16::kernels<mkl_bf16::DotF32, mkl_bf16::fp16>()}};
}  // namespace prefopt
#else
namespace prefopt {
const Isa kIsaMklBf16 = {"mkl_bf16", nullptr, {}};
}
#endif
