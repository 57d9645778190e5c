// The contract between host.cpp and the kernels: raw pointers, sizes, and a table of functions per instruction set and
// dtype.
//
// T counts only the rows that have a target; `rows` holds their positions in hidden. Strides are in elements.
// `workers` calls of each function share its work; they write disjoint memory, so no barrier is needed within one.
#pragma once
#include <stdint.h>

#include "../cpu/isa.h"
#include "../cpu/scratchpad.h"

namespace prefopt {

struct Operands {
  const void* hidden;       // (rows, H)
  const int64_t* rows;      // (T,)
  const void* weight;       // (V, H)
  const int64_t* targets;   // (T,), all in [0, V)
  const float* bias;        // (V,) or null
  const float* low_hidden;  // (rows, R), contiguous, or null
  const void* low_weight;   // (V, R), or null
  int64_t hidden_stride, weight_stride, low_weight_stride;
  int64_t T, H, V, R;                 // R 0: no low-rank operand
  bool low_weight_is_float;           // otherwise of hidden's dtype
  float scale, softcap, temperature;  // softcap 0: none
};

// Sizes that follow from an instruction set's tiles. padded_tokens and padded_hidden are the leading dimensions of
// buffers.
struct Layout {
  int64_t panels, padded_tokens, padded_hidden;
  int64_t lanes;          // floats in a register
  int64_t tile_rows;      // vocabulary rows of a tile
  int64_t element_bytes;  // of a packed element
  int64_t hidden_bytes;   // all of hidden, packed as the second operand of the logits
  int64_t tokens_bytes;   // all of hidden, packed as the second operand of the head's gradient
  int64_t scratch_bytes;  // of one worker
};

// Running sums of a row over the vocabulary, each (splits, padded_tokens): with m the maximum, sum + rest =
// sum exp(z - m), rest being what the running sum lost to rounding, spread = sum exp(z - m) (z - m), logits = sum z,
// target = z at the target (0 in other splits), gap + gap_rest = sum exp(z - m) (z - z') with z' the logits of
// Forward::ref.
struct Partials {
  float *max, *sum, *rest, *spread, *logits, *target, *gap, *gap_rest;
  float* product;  // (splits, T, padded_hidden): sum exp(z - m) slope W without the target's term, or null
};

struct Forward {
  Operands in;
  Layout layout;
  Partials out;
  char* hidden_packed;
  float* low_packed;
  char* scratch;
  int64_t splits, groups;  // of the vocabulary, of the tokens
  bool want_spread, want_logits;
  float* product_scale;  // (splits, T): exp(m - lse) scale / temperature, or null
  float* target_scale;   // (T,): (1 - p) d z / d raw at the target, or null
  void* unit;            // (rows, H), contiguous, or null
  // The reference model of linear_kl, or null: its logits are made beside those of every tile. Of its scratch and
  // splits nothing is read: a worker's buffers for it come after the worker's own.
  const Forward* ref;
};

// Gradients of sum(dlogp logp + dlse lse + dentropy entropy + dkl kl), for one chunk [begin, end) of the vocabulary at
// a time. Per row: factor = dlse - dlogp and gap = E[z - z'], so that
// dz = p (factor - dentropy (log p + entropy) + dkl (z - z' - gap)) + dlogp at the target.
struct Backward {
  Operands in;
  Layout layout;
  const Forward* ref;                                // of which the operands and packed buffers are used, or null
  float *lse, *factor, *dlogp, *entropy, *dentropy;  // (padded_tokens,), 0 beyond T; dentropy may be null
  float *dkl, *gap;                                  // the same, read where there is a ref
  int32_t* target_ids;                               // (padded_tokens,), -1 beyond T
  char *hidden_packed, *tokens_packed;
  float *low_packed, *low_by_token;
  char *weight_packed, *dz_by_token, *dz_by_row;  // of the chunk; null where no gradient needs them
  float* dz_low;                                  // of the chunk, panels of (chunk rows, width), or null
  float* dbias_parts;                             // (panels, chunk rows) or null
  char* scratch;
  int64_t begin, end;
  bool first_chunk;         // of those that add to dhidden
  int64_t parts;            // of the vocabulary
  float* dhidden_parts;     // (parts, T, padded_hidden) sums, or null
  float* dhidden_sums;      // of this part
  void* dhidden;            // (rows, H) contiguous, or null
  void* dweight;            // (V, H) contiguous, or null
  float* dbias;             // (V,) or null
  float* dlow_hidden_sums;  // (R, padded_tokens) of this part, or null
  void* dlow_weight;        // (V, R) contiguous, or null
};

struct Kernels {
  void (*layout)(const Operands&, Layout*);
  void (*pack_hidden)(const Operands&, const Layout&, char* hidden_packed, int64_t worker, int64_t workers);
  void (*pack_tokens)(const Operands&, const Layout&, char* tokens_packed, int64_t worker, int64_t workers);
  void (*pack_low)(const Operands&, float* low_packed, float* low_by_token, int64_t worker, int64_t workers);
  void (*forward)(const Forward&, int64_t worker, int64_t workers);
  void (*write_unit)(const Forward&, int64_t worker, int64_t workers);
  void (*pack_weight)(const Backward&, int64_t worker, int64_t workers);
  void (*logit_gradient)(const Backward&, int64_t worker, int64_t workers);
  void (*add_dhidden)(const Backward&, int64_t worker, int64_t workers);
  void (*write_dhidden)(const Backward&, int64_t worker, int64_t workers);
  void (*write_dweight)(const Backward&, int64_t worker, int64_t workers);
  void (*add_dlow_hidden)(const Backward&, int64_t worker, int64_t workers);
  void (*write_dlow_weight)(const Backward&, int64_t worker, int64_t workers);
};

// The tables, each defined by the arch_*.cpp of its namespace.
namespace generic {
extern const Kernels kFloat32, kBfloat16, kFloat16;
}
namespace avx2 {
extern const Kernels kFloat32, kBfloat16, kFloat16;
}
namespace avx512 {
extern const Kernels kFloat32, kBfloat16, kFloat16;
}
namespace avx512_bf16 {
extern const Kernels kBfloat16;
}
namespace avx512_bf16_mkl {
extern const Kernels kBfloat16;
}

}  // namespace prefopt
