// The contract between launch_cpu.cpp and the kernels: raw pointers, sizes, and one table of functions per instruction
// set.
//
// T counts only the rows that have a target; `rows` says where they are in hidden. Strides are in elements.
// `worker` of `workers` calls of each function share its work; they write disjoint memory, and nobody waits.
#pragma once
#include <stdint.h>

namespace prefopt {

struct Operands {
  const void* hidden;       // (rows, H)
  const int64_t* rows;      // (T,)
  const void* weight;       // (V, H)
  const int64_t* targets;   // (T,), all in [0, V)
  const float* bias;        // (V,) or null
  const float* low_hidden;  // (T, R), contiguous, or null
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
  int64_t hidden_bytes;      // all of hidden, packed as the second operand of the logits
  int64_t tokens_bytes;      // all of hidden, packed as the second operand of the head's gradient
  int64_t low_bytes;         // all of low_hidden, packed as the second operand of the logits
  int64_t low_tokens_bytes;  // all of low_hidden, packed as the second operand of low_weight's gradient
  int64_t dz_low_bytes;      // part of chunk_bytes: of dz in fp32 for the gradients of the low-rank operand
  int64_t tile_rows;         // vocabulary rows of a tile
  int64_t forward_bytes;     // scratch of one worker in the forward
  int64_t chunk_bytes;       // buffers of the backward for one vocabulary row of a chunk, all tokens
  int64_t backward_bytes;    // scratch of one worker in the backward
  bool packs_pairs;          // a packed element takes 2 bytes, otherwise 4
};

// Running sums of a row over the vocabulary, each (splits, padded_tokens): with m the maximum,
// sum + low = sum exp(z - m), low being what the running sum lost to rounding, spread = sum exp(z - m) (z - m), total =
// sum z, target = z at the target (0 in other splits).
struct Partials {
  float *max, *sum, *low, *spread, *total, *target;
  float* product;  // (splits, T, padded_hidden): sum exp(z - m) slope W without the target's term, or null
};

struct Forward {
  Operands in;
  Layout layout;
  Partials out;
  const char *hidden_packed, *low_packed;
  char* scratch;
  int64_t splits, groups;  // of the vocabulary, of the tokens
  bool want_spread, want_total;
};

struct FinishUnit {
  Operands in;
  Layout layout;
  const float* product;  // (splits, T, padded_hidden)
  const float* share;    // (splits, T): exp(m - lse) / temperature * scale
  const float* own;      // (T,): (1 - p) d z / d raw at the target
  int64_t splits;
  void* unit;  // (T, H), contiguous
};

// Gradients of sum(dlogp logp + dlse lse + dentropy entropy), for one chunk [begin, end) of the vocabulary at a time.
// Per row: factor = dlse - dlogp, so that dz = p (factor - dentropy (log p + entropy)) + dlogp at the target.
struct Backward {
  Operands in;
  Layout layout;
  const float *lse, *factor, *dlogp, *dentropy,
      *entropy;               // (padded_tokens,), 0 beyond T; dentropy null when not wanted
  const int32_t* target_ids;  // (padded_tokens,), -1 beyond T
  const char *hidden_packed, *tokens_packed, *low_packed, *low_by_token;
  char *weight_packed, *dz_by_token, *dz_by_row;  // of the chunk; null where no gradient needs them
  float* dz_low;                                  // of the chunk, panels of (chunk rows, width), or null
  float* dbias_parts;                             // (panels, chunk rows) or null
  char* scratch;
  int64_t begin, end;
  bool first_chunk;    // of those that add to dhidden
  float* dhidden;      // (T, padded_hidden) sums, or null
  void* dweight;       // (V, H) contiguous, or null
  float* dbias;        // (V,) or null
  float* dlow_hidden;  // (R, padded_tokens) sums, or null
  void* dlow_weight;   // (V, R) contiguous, or null
};

struct Kernels {
  void (*layout)(const Operands&, Layout*);
  void (*pack_hidden)(const Operands&, const Layout&, char* hidden_packed, int64_t worker, int64_t workers);
  void (*pack_tokens)(const Operands&, const Layout&, char* tokens_packed, int64_t worker, int64_t workers);
  void (*pack_low)(const Operands&, char* low_packed, char* low_by_token, int64_t worker, int64_t workers);
  void (*forward)(const Forward&, int64_t worker, int64_t workers);
  void (*finish_unit)(const FinishUnit&, int64_t worker, int64_t workers);
  void (*pack_weight)(const Backward&, int64_t worker, int64_t workers);
  void (*logit_gradient)(const Backward&, int64_t worker, int64_t workers);
  void (*add_dhidden)(const Backward&, int64_t worker, int64_t workers);
  void (*write_head_gradient)(const Backward&, int64_t worker, int64_t workers);
  void (*add_low_hidden_gradient)(const Backward&, int64_t worker, int64_t workers);
  void (*write_low_weight_gradient)(const Backward&, int64_t worker, int64_t workers);
};

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// One instruction set: its name, whether this machine has it, and its kernels by dtype.
struct Isa {
  const char* name;
  bool (*available)();
  Kernels kernels[3];
};

extern const Isa kIsaGeneric, kIsaAvx2, kIsaAvx512, kIsaAvx512Bf16, kIsaMklBf16;

}  // namespace prefopt
