// Host side of linear_logprob on the CPU: tensors to parameters, choice of instruction set, division of the work.
//
// Python has checked the arguments and allocated every buffer (ops/linear_logprob/backend_cpu.py); the checks here only
// keep a wrong caller from writing outside of them.
#include "launch_cpu.h"

#include <algorithm>

#include "linear_logprob.h"
#include "x86.h"
#if PREFOPT_X86
#include <cpuid.h>
#endif

namespace prefopt {

using torch::stable::Tensor;

#if PREFOPT_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// CPUID leaf 7: AMX-BF16 (bit 22) and AMX-TILE (bit 24); MKL asks the kernel for the tiles' state itself
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
}
#else
bool has_amx() { return false; }
#endif

namespace {

constexpr int64_t kProductBytes = 32 << 20;  // of partial products: bounds the splits of the vocabulary
constexpr int64_t kGroupTokens = 1024;       // whose hidden states and products stay in the caches while W passes by
constexpr int64_t kChunkBytes = 32 << 20;    // of the backward's buffers for one chunk of the vocabulary
constexpr int64_t kChunkRows = 1024;         // 64 packed columns of so many rows fit the second-level cache

const Isa* const kIsas[] = {&kIsaMklBf16, &kIsaAvx512Bf16, &kIsaAvx512, &kIsaAvx2, &kIsaGeneric};

bool present(const Isa* isa) { return isa->available && isa->available(); }

const Kernels& kernels_of(const std::string& name, const Tensor& hidden) {
  using torch::headeronly::ScalarType;
  for (const Isa* isa : kIsas) {
    if (name != isa->name) continue;
    STD_TORCH_CHECK(present(isa), "this machine does not have the instruction set ", name);
    switch (hidden.scalar_type()) {
      case ScalarType::Float:
        return isa->kernels[kFloat32];
      case ScalarType::BFloat16:
        return isa->kernels[kBfloat16];
      case ScalarType::Half:
        return isa->kernels[kFloat16];
      default:
        STD_TORCH_CHECK(false, "hidden has a dtype without a kernel");
    }
  }
  STD_TORCH_CHECK(false, "unknown instruction set ", name);
}

template <class T>
T* pointer(const Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data_ptr());
}

template <class T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

Operands operands(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const Tensor& targets,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& low_hidden,
                  const std::optional<Tensor>& low_weight, double scale, double softcap, double temperature) {
  STD_TORCH_CHECK(hidden.stride(1) == 1 && weight.stride(1) == 1, "rows of hidden and weight must be contiguous");
  Operands in{};
  in.hidden = hidden.data_ptr();
  in.rows = pointer<const int64_t>(rows);
  in.weight = weight.data_ptr();
  in.targets = pointer<const int64_t>(targets);
  in.bias = pointer<const float>(bias);
  in.hidden_stride = hidden.stride(0);
  in.weight_stride = weight.stride(0);
  in.T = rows.size(0);
  in.H = hidden.size(1);
  in.V = weight.size(0);
  if (low_hidden && low_weight) {
    in.R = low_hidden->size(1);
    STD_TORCH_CHECK(low_hidden->numel() == in.T * in.R && low_weight->size(0) == in.V && low_weight->size(1) == in.R,
                    "low_hidden or low_weight has the wrong shape");
    STD_TORCH_CHECK(low_weight->stride(1) == 1, "rows of low_weight must be contiguous");
    in.low_hidden = pointer<const float>(low_hidden);
    in.low_weight = low_weight->data_ptr();
    in.low_weight_stride = low_weight->stride(0);
    in.low_weight_is_float = low_weight->scalar_type() == torch::headeronly::ScalarType::Float;
  }
  in.scale = static_cast<float>(scale);
  in.softcap = static_cast<float>(softcap);
  in.temperature = static_cast<float>(temperature);
  return in;
}

// Each worker runs once; at::parallel_for gives every index to one thread.
template <class Body>
void each_worker(int64_t workers, const Body& body) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) body(worker, workers);
  });
}

// Hands out 64-byte aligned parts of the workspace.
class Workspace {
 public:
  explicit Workspace(const Tensor& buffer) : next_(pointer<char>(buffer)), end_(next_ + buffer.numel()) {}
  char* take(int64_t bytes) {
    char* at = next_;
    next_ += (bytes + 63) / 64 * 64;
    STD_TORCH_CHECK(next_ <= end_, "the workspace is too small");
    return at;
  }

 private:
  char *next_, *end_;
};

}  // namespace

// Best first. MKL's product is the best where the machine has AMX, and elsewhere behind all others: there it runs at a
// fifth of the speed of kIsaAvx512Bf16 (measured on a Zen 5), and serves the tests.
std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa* isa : kIsas)
    if (present(isa)) names.push_back(isa->name);
  if (!has_amx() && present(&kIsaMklBf16)) std::rotate(names.begin(), names.begin() + 1, names.end());
  return names;
}

// {padded_tokens, padded_hidden, forward: splits, groups, bytes of its workspace, backward: parts, chunk rows, bytes}
std::vector<int64_t> linear_logprob_plan(const Tensor& hidden, const Tensor& weight, int64_t tokens, int64_t rank,
                                         bool product, std::string isa) {
  Operands in{};
  in.T = tokens;
  in.H = hidden.size(1);
  in.V = weight.size(0);
  in.R = rank;
  Layout layout{};
  kernels_of(isa, hidden).layout(in, &layout);
  const int64_t workers = torch::stable::get_num_threads();
  // Splitting the vocabulary reads and packs W once in all, so it comes before splitting the tokens
  int64_t splits = std::min(workers, std::max<int64_t>(1, in.V / layout.tile_rows));
  if (product) {
    const int64_t bytes = in.T * layout.padded_hidden * 4;
    splits = std::min(splits, std::max<int64_t>(1, kProductBytes / std::max<int64_t>(1, bytes)));
  }
  const int64_t groups = std::max((workers + splits - 1) / splits, (in.T + kGroupTokens - 1) / kGroupTokens);
  // The backward needs no meeting of the workers where each has a part of the vocabulary, and of dhidden, to itself
  const int64_t parts = splits == workers ? workers : 1;
  const int64_t rows = std::min({kChunkRows, kChunkBytes / (parts * layout.chunk_bytes), (in.V + parts - 1) / parts});
  const int64_t chunk = std::max<int64_t>(1, (rows + layout.tile_rows - 1) / layout.tile_rows) * layout.tile_rows;
  const int64_t slack = 10 * 64;  // alignment of the buffers: as many as the backward takes
  return {layout.padded_tokens,
          layout.padded_hidden,
          splits,
          groups,
          layout.hidden_bytes + layout.low_bytes + workers * layout.forward_bytes + slack,
          parts,
          chunk,
          layout.hidden_bytes + layout.tokens_bytes + layout.low_bytes + layout.low_tokens_bytes +
              workers * layout.backward_bytes + parts * (chunk * layout.chunk_bytes + slack)};
}

void linear_logprob_forward(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const Tensor& targets,
                            std::optional<Tensor> bias, std::optional<Tensor> low_hidden,
                            std::optional<Tensor> low_weight, double scale, double softcap, double temperature,
                            bool want_spread, bool want_total, const Tensor& partials, std::optional<Tensor> product,
                            const Tensor& workspace, int64_t splits, int64_t groups, std::string isa) {
  const Kernels& kernels = kernels_of(isa, hidden);
  Forward call{};
  call.in = operands(hidden, rows, weight, targets, bias, low_hidden, low_weight, scale, softcap, temperature);
  kernels.layout(call.in, &call.layout);
  const int64_t rows_out = splits * call.layout.padded_tokens;
  STD_TORCH_CHECK(partials.numel() == 6 * rows_out, "partials has the wrong size");
  STD_TORCH_CHECK(!product || product->numel() == splits * call.in.T * call.layout.padded_hidden,
                  "product has the wrong size");
  float* sums = pointer<float>(partials);
  call.out = {sums,
              sums + rows_out,
              sums + 2 * rows_out,
              sums + 3 * rows_out,
              sums + 4 * rows_out,
              sums + 5 * rows_out,
              pointer<float>(product)};
  call.splits = splits;
  call.groups = groups;
  call.want_spread = want_spread;
  call.want_total = want_total;
  const int64_t workers = torch::stable::get_num_threads();
  Workspace space(workspace);
  char* hidden_packed = space.take(call.layout.hidden_bytes);
  char* low_packed = space.take(call.layout.low_bytes);
  call.hidden_packed = hidden_packed;
  call.low_packed = low_packed;
  call.scratch = space.take(workers * call.layout.forward_bytes);
  each_worker(workers, [&](int64_t w, int64_t n) {
    kernels.pack_hidden(call.in, call.layout, hidden_packed, w, n);
    if (call.in.R) kernels.pack_low(call.in, low_packed, nullptr, w, n);
  });
  each_worker(workers, [&](int64_t w, int64_t n) { kernels.forward(call, w, n); });
}

void linear_logprob_finish_unit(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const Tensor& targets,
                                const Tensor& product, const Tensor& share, const Tensor& own, const Tensor& unit,
                                std::string isa) {
  const Kernels& kernels = kernels_of(isa, hidden);
  FinishUnit call{};
  call.in = operands(hidden, rows, weight, targets, std::nullopt, std::nullopt, std::nullopt, 1, 0, 1);
  kernels.layout(call.in, &call.layout);
  call.splits = product.size(0);
  call.product = pointer<const float>(product);
  call.share = pointer<const float>(share);
  call.own = pointer<const float>(own);
  call.unit = unit.data_ptr();
  each_worker(torch::stable::get_num_threads(), [&](int64_t w, int64_t n) { kernels.finish_unit(call, w, n); });
}

// coefficients: (5, padded_tokens) fp32: lse, factor, dlogp, dentropy, entropy
void linear_logprob_backward(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const Tensor& targets,
                             std::optional<Tensor> bias, std::optional<Tensor> low_hidden,
                             std::optional<Tensor> low_weight, double scale, double softcap, double temperature,
                             const Tensor& coefficients, const Tensor& target_ids, bool through_entropy,
                             std::optional<Tensor> dhidden, std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                             std::optional<Tensor> dlow_hidden, std::optional<Tensor> dlow_weight,
                             const Tensor& workspace, int64_t parts, int64_t chunk, std::string isa) {
  const Kernels& kernels = kernels_of(isa, hidden);
  Backward call{};
  call.in = operands(hidden, rows, weight, targets, bias, low_hidden, low_weight, scale, softcap, temperature);
  kernels.layout(call.in, &call.layout);
  const Layout& layout = call.layout;
  STD_TORCH_CHECK(coefficients.numel() == 5 * layout.padded_tokens, "coefficients has the wrong size");
  STD_TORCH_CHECK(target_ids.numel() == layout.padded_tokens, "target_ids has the wrong size");
  STD_TORCH_CHECK(!dhidden || dhidden->numel() == parts * call.in.T * layout.padded_hidden,
                  "dhidden has the wrong size");
  STD_TORCH_CHECK(!dlow_hidden || dlow_hidden->numel() == parts * call.in.R * layout.padded_tokens,
                  "dlow_hidden has the wrong size");
  STD_TORCH_CHECK(!dlow_weight || dlow_weight->numel() == call.in.V * call.in.R, "dlow_weight has the wrong size");
  const float* rows_in = pointer<const float>(coefficients);
  call.lse = rows_in;
  call.factor = rows_in + layout.padded_tokens;
  call.dlogp = rows_in + 2 * layout.padded_tokens;
  call.dentropy = through_entropy ? rows_in + 3 * layout.padded_tokens : nullptr;
  call.entropy = rows_in + 4 * layout.padded_tokens;
  call.target_ids = pointer<const int32_t>(target_ids);
  call.dweight = pointer<void>(dweight);
  call.dbias = pointer<float>(dbias);
  call.dlow_weight = pointer<void>(dlow_weight);
  const int64_t workers = torch::stable::get_num_threads();
  Workspace space(workspace);
  char* hidden_packed = space.take(layout.hidden_bytes);
  char* tokens_packed = space.take(layout.tokens_bytes);
  call.hidden_packed = hidden_packed;
  call.tokens_packed = tokens_packed;
  char* low_packed = space.take(layout.low_bytes);
  char* low_by_token = space.take(layout.low_tokens_bytes);
  call.low_packed = low_packed;
  call.low_by_token = low_by_token;
  call.scratch = space.take(workers * layout.backward_bytes);
  each_worker(workers, [&](int64_t w, int64_t n) {
    kernels.pack_hidden(call.in, layout, hidden_packed, w, n);
    if (dweight) kernels.pack_tokens(call.in, layout, tokens_packed, w, n);
    if (call.in.R) kernels.pack_low(call.in, low_packed, dlow_weight ? low_by_token : nullptr, w, n);
  });

  std::vector<Backward> calls(parts, call);
  for (int64_t part = 0; part < parts; part++) {
    Backward& mine = calls[part];
    // layout.chunk_bytes is the sum of these five, for a row of the vocabulary
    const int64_t unit = layout.packs_pairs ? 2 : 4;
    char* by_token = space.take(chunk * layout.padded_tokens * unit);
    char* by_row = space.take(chunk * layout.padded_tokens * unit);
    char* weight_packed = space.take(chunk * layout.padded_hidden * unit);
    float* dbias_parts = reinterpret_cast<float*>(space.take(chunk * layout.panels * 4));
    float* dz_low = reinterpret_cast<float*>(space.take(chunk * layout.dz_low_bytes));
    mine.dhidden = dhidden ? pointer<float>(dhidden) + part * call.in.T * layout.padded_hidden : nullptr;
    mine.dz_by_token = dhidden ? by_token : nullptr;
    mine.weight_packed = dhidden ? weight_packed : nullptr;
    mine.dz_by_row = dweight ? by_row : nullptr;
    mine.dbias_parts = dbias ? dbias_parts : nullptr;
    mine.dz_low = dlow_hidden || dlow_weight ? dz_low : nullptr;
    mine.dlow_hidden = dlow_hidden ? pointer<float>(dlow_hidden) + part * call.in.R * layout.padded_tokens : nullptr;
  }
  const auto each_chunk = [&](int64_t part, const auto& body) {
    Backward& mine = calls[part];
    const int64_t last = call.in.V * (part + 1) / parts;
    mine.first_chunk = true;
    for (mine.begin = call.in.V * part / parts; mine.begin < last; mine.begin = mine.end, mine.first_chunk = false) {
      mine.end = std::min(mine.begin + chunk, last);
      body(mine);
    }
  };
  const auto logits_pass = [&](const Backward& mine, int64_t w, int64_t n) {
    if (dhidden) kernels.pack_weight(mine, w, n);
    kernels.logit_gradient(mine, w, n);
  };
  const auto products_pass = [&](const Backward& mine, int64_t w, int64_t n) {
    if (dhidden) kernels.add_dhidden(mine, w, n);
    if (dweight || dbias) kernels.write_head_gradient(mine, w, n);
    if (dlow_hidden) kernels.add_low_hidden_gradient(mine, w, n);
    if (dlow_weight) kernels.write_low_weight_gradient(mine, w, n);
  };
  if (parts == 1) {  // the workers share each chunk, and meet between its passes
    each_chunk(0, [&](const Backward& mine) {
      each_worker(workers, [&](int64_t w, int64_t n) { logits_pass(mine, w, n); });
      each_worker(workers, [&](int64_t w, int64_t n) { products_pass(mine, w, n); });
    });
    return;
  }
  each_worker(parts, [&](int64_t part, int64_t) {
    calls[part].scratch = call.scratch + part * layout.backward_bytes;
    each_chunk(part, [&](const Backward& mine) {
      logits_pass(mine, 0, 1);
      products_pass(mine, 0, 1);
    });
  });
}

}  // namespace prefopt
