// Host side of linear_logprob: checks tensors, plans the buffers, divides the work and combines its parts. Each pass is
// one call from Python (ops/linear_logprob/cpu.py), which allocates the outputs.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cpu/tensors.h"

namespace prefopt {

namespace {

constexpr int64_t kProductBytes = 32 << 20;  // of partial products: bounds the splits of the vocabulary
constexpr int64_t kGroupTokens = 1024;       // whose hidden states and products stay in the caches while W passes by
constexpr int64_t kChunkBytes = 32 << 20;    // of the backward's buffers for one chunk of the vocabulary
constexpr int64_t kChunkRows = 1024;         // 64 packed columns of so many rows fit the second-level cache

const Kernels& kernels_for(const std::string& instruction_set, ScalarType dtype) {
  const KernelSet& set = kernel_set(instruction_set);
  if (dtype == ScalarType::Float) return *set.float32;
  if (dtype == ScalarType::BFloat16) return *set.bfloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, "hidden has a dtype without a kernel");
  return *set.float16;
}

// A matrix whose rows are contiguous and do not overlap.
const void* checked_rows(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  " has the wrong shape");
  STD_TORCH_CHECK(tensor.stride(1) == 1, "rows of ", name, " are not contiguous");
  return tensor.data_ptr();
}

// Each worker runs once; torch's parallel_for gives every index to one thread.
template <class Body>
void each_worker(int64_t workers, const Body& body) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) body(worker, workers);
  });
}

// The operands of a call, and the rows that have a target.
struct Call {
  const Kernels& kernels;
  ScalarType dtype;
  int64_t tokens;  // rows of hidden
  std::vector<int64_t> rows, targets;
  Operands in{};
  Layout layout{};
  int64_t workers, splits, groups;

  Call(const Tensor& hidden, const Tensor& weight, const Tensor& ids, const std::optional<Tensor>& bias,
       const std::optional<Tensor>& low_hidden, const std::optional<Tensor>& low_weight, double scale, double softcap,
       double temperature, bool product, const std::string& instruction_set)
      : kernels(kernels_for(instruction_set, hidden.scalar_type())),
        dtype(hidden.scalar_type()),
        tokens(hidden.size(0)),
        workers(torch::stable::get_num_threads()) {
    in.H = hidden.size(1);
    in.V = weight.size(0);
    STD_TORCH_CHECK(weight.scalar_type() == dtype, "weight is not of hidden's dtype");
    in.hidden = checked_rows(hidden, "hidden", tokens, in.H);
    in.weight = checked_rows(weight, "weight", in.V, in.H);
    in.hidden_stride = hidden.stride(0);
    in.weight_stride = weight.stride(0);
    in.bias = checked<const float>(bias, "bias", {in.V});
    STD_TORCH_CHECK(low_hidden.has_value() == low_weight.has_value(), "low_hidden and low_weight come together");
    if (low_hidden) {
      in.R = low_weight->size(1);
      in.low_hidden = checked<const float>(low_hidden, "low_hidden", {tokens, in.R});
      in.low_weight = checked_rows(*low_weight, "low_weight", in.V, in.R);
      in.low_weight_stride = low_weight->stride(0);
      in.low_weight_is_float = low_weight->scalar_type() == ScalarType::Float;
      STD_TORCH_CHECK(in.low_weight_is_float || low_weight->scalar_type() == dtype,
                      "low_weight is neither fp32 nor of hidden's dtype");
    }
    const int64_t* y = checked<const int64_t>(ids, "targets", {tokens});
    for (int64_t i = 0; i < tokens; i++) {
      if (y[i] < 0) continue;
      STD_TORCH_CHECK(y[i] < in.V, "a target is not below the size of the vocabulary");
      rows.push_back(i);
      targets.push_back(y[i]);
    }
    in.T = static_cast<int64_t>(rows.size());
    in.rows = rows.data();
    in.targets = targets.data();
    in.scale = static_cast<float>(scale);
    in.softcap = static_cast<float>(softcap);
    in.temperature = static_cast<float>(temperature);
    kernels.layout(in, &layout);
    // Splitting the vocabulary reads and packs W once in all, so it comes before splitting the tokens
    splits = std::min(workers, std::max<int64_t>(1, in.V / layout.tile_rows));
    if (product) {
      const int64_t bytes = in.T * layout.padded_hidden * 4;
      splits = std::min(splits, std::max<int64_t>(1, kProductBytes / std::max<int64_t>(1, bytes)));
    }
    groups = std::max((workers + splits - 1) / splits, (in.T + kGroupTokens - 1) / kGroupTokens);
  }
  Call(const Call&) = delete;
};

// Outputs of the forward, each (tokens,), 0 where there is no target, or null.
struct Outputs {
  float *logp, *lse, *entropy, *mean_logit;
  bool* is_top1;
};

// Combines the splits of the vocabulary for one token. In fp64, which costs nothing at this size and keeps
// log(1 + 1e-6) exact.
void combine(const Forward& call, const Outputs& out, int64_t i) {
  const Operands& in = call.in;
  const auto at = [&](const float* sums, int64_t split) -> double {
    return sums[split * call.layout.padded_tokens + i];
  };
  double top = at(call.out.max, 0);
  for (int64_t s = 1; s < call.splits; s++) {
    const double m = at(call.out.max, s);
    if (m > top || isnan(m)) top = m;
  }
  double sum = 0, spread = 0, logits = 0, target = 0;
  for (int64_t s = 0; s < call.splits; s++) {
    const double moved = at(call.out.max, s) - top, own = at(call.out.sum, s) + at(call.out.rest, s);
    sum += exp(moved) * own;
    if (call.want_spread) spread += exp(moved) * (at(call.out.spread, s) + moved * own);
    if (call.want_logits) logits += at(call.out.logits, s);
    target += at(call.out.target, s);
  }
  const double log_sum = log(sum), lse = top + log_sum, logp = (target - top) - log_sum;  // log_sum is 0 or more
  const int64_t row = in.rows[i];
  out.logp[row] = static_cast<float>(logp);
  out.lse[row] = static_cast<float>(lse);
  if (out.entropy) out.entropy[row] = static_cast<float>(log_sum - spread * exp(-log_sum));  // lse - E[z]
  if (out.mean_logit) out.mean_logit[row] = static_cast<float>(logits / static_cast<double>(in.V));
  if (out.is_top1) out.is_top1[row] = target >= top;
  if (!call.unit) return;
  const double factor = static_cast<double>(in.scale) / in.temperature;
  const double tanh = in.softcap == 0 ? 0 : target * in.temperature / in.softcap;
  call.target_scale[i] = static_cast<float>((1 - tanh * tanh) * factor * -expm1(logp));
  for (int64_t s = 0; s < call.splits; s++)
    call.product_scale[s * in.T + i] = static_cast<float>(exp(at(call.out.max, s) - lse) * factor);
}

}  // namespace

void linear_logprob_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                            std::optional<Tensor> bias, std::optional<Tensor> low_hidden,
                            std::optional<Tensor> low_weight, double scale, double softcap, double temperature,
                            const Tensor& logp, const Tensor& lse, std::optional<Tensor> entropy,
                            std::optional<Tensor> mean_logit, std::optional<Tensor> is_top1, std::optional<Tensor> unit,
                            std::string instruction_set) {
  const Call own(hidden, weight, targets, bias, low_hidden, low_weight, scale, softcap, temperature, unit.has_value(),
                 instruction_set);
  const std::vector<int64_t> shape = {own.tokens};
  const Outputs out = {.logp = checked<float>(logp, "logp", shape),
                       .lse = checked<float>(lse, "lse", shape),
                       .entropy = checked<float>(entropy, "entropy", shape),
                       .mean_logit = checked<float>(mean_logit, "mean_logit", shape),
                       .is_top1 = checked<bool>(is_top1, "is_top1", shape)};
  Forward call{};
  call.in = own.in;
  call.layout = own.layout;
  call.unit = unit ? checked(*unit, "unit", own.dtype, {own.tokens, own.in.H}) : nullptr;
  if (own.in.T == 0) return;
  call.splits = own.splits;
  call.groups = own.groups;
  call.want_spread = entropy.has_value();
  call.want_logits = mean_logit.has_value();
  const Layout& layout = call.layout;
  const int64_t T = own.in.T, sums = own.splits * layout.padded_tokens;
  const Scratchpad buffers([&](Carver& carver) {
    for (float** each :
         {&call.out.max, &call.out.sum, &call.out.rest, &call.out.spread, &call.out.logits, &call.out.target})
      *each = carver.take<float>(sums);
    call.out.product = unit ? carver.take<float>(own.splits * T * layout.padded_hidden) : nullptr;
    call.product_scale = unit ? carver.take<float>(own.splits * T) : nullptr;
    call.target_scale = unit ? carver.take<float>(T) : nullptr;
    call.hidden_packed = carver.take<char>(layout.hidden_bytes);
    call.low_packed = carver.take<float>(layout.padded_tokens * own.in.R);
    call.scratch = carver.take<char>(own.workers * layout.scratch_bytes);
  });
  each_worker(own.workers, [&](int64_t w, int64_t n) {
    own.kernels.pack_hidden(call.in, layout, call.hidden_packed, w, n);
    if (call.in.R) own.kernels.pack_low(call.in, call.low_packed, nullptr, w, n);
  });
  each_worker(own.workers, [&](int64_t w, int64_t n) { own.kernels.forward(call, w, n); });
  each_worker(own.workers, [&](int64_t w, int64_t n) {
    for (int64_t i = T * w / n; i < T * (w + 1) / n; i++) combine(call, out, i);
    if (unit) own.kernels.write_unit(call, w, n);
  });
}

void linear_logprob_backward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                             std::optional<Tensor> bias, std::optional<Tensor> low_hidden,
                             std::optional<Tensor> low_weight, double scale, double softcap, double temperature,
                             std::optional<Tensor> dlogp, std::optional<Tensor> dlse, std::optional<Tensor> dentropy,
                             const Tensor& lse, std::optional<Tensor> entropy, std::optional<Tensor> dhidden,
                             std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                             std::optional<Tensor> dlow_hidden, std::optional<Tensor> dlow_weight,
                             std::string instruction_set) {
  const Call own(hidden, weight, targets, bias, low_hidden, low_weight, scale, softcap, temperature,
                 dhidden.has_value(), instruction_set);
  const std::vector<int64_t> shape = {own.tokens};
  const float *by_logp = checked<const float>(dlogp, "dlogp", shape),
              *by_lse = checked<const float>(dlse, "dlse", shape),
              *by_entropy = checked<const float>(dentropy, "dentropy", shape),
              *lses = checked<const float>(lse, "lse", shape),
              *entropies = checked<const float>(entropy, "entropy", shape);
  STD_TORCH_CHECK(!by_entropy || entropies, "a gradient through the entropy needs the entropy");
  Backward call{};
  call.in = own.in;
  call.layout = own.layout;
  const Operands& in = call.in;
  const Layout& layout = call.layout;
  call.dhidden = dhidden ? checked(*dhidden, "dhidden", own.dtype, {own.tokens, in.H}) : nullptr;
  call.dweight = dweight ? checked(*dweight, "dweight", own.dtype, {in.V, in.H}) : nullptr;
  call.dbias = checked<float>(dbias, "dbias", {in.V});
  float* low_out = checked<float>(dlow_hidden, "dlow_hidden", {own.tokens, in.R});
  if (dlow_weight) {
    STD_TORCH_CHECK(low_weight.has_value(), "dlow_weight needs low_weight");
    call.dlow_weight = checked(*dlow_weight, "dlow_weight", low_weight->scalar_type(), {in.V, in.R});
  }
  if (in.T == 0) {
    for (std::optional<Tensor>* each : {&dweight, &dbias, &dlow_weight})
      if (*each) torch::stable::zero_(**each);
    return;
  }

  // No barrier is needed where each worker owns a part of the vocabulary, and of the sums of dhidden
  const int64_t workers = own.workers, parts = own.splits == workers ? workers : 1, tile = layout.tile_rows;
  call.parts = parts;
  std::vector<Backward> calls(static_cast<size_t>(parts));
  const auto take_chunk = [&](Carver& carver, Backward& part, int64_t rows) {
    part.dz_by_token = carver.take<char>(rows * layout.padded_tokens * layout.element_bytes);
    part.dz_by_row = carver.take<char>(rows * layout.padded_tokens * layout.element_bytes);
    part.weight_packed = carver.take<char>(rows * layout.padded_hidden * layout.element_bytes);
    part.dbias_parts = carver.take<float>(rows * layout.panels);
    part.dz_low = carver.take<float>(in.R ? rows * layout.padded_tokens : 0);
  };
  const int64_t tile_bytes = bytes_of([&](Carver& carver) { take_chunk(carver, calls[0], tile); });
  const int64_t rows = std::min({kChunkRows, kChunkBytes * tile / (parts * tile_bytes), (in.V + parts - 1) / parts});
  const int64_t chunk = std::max<int64_t>(1, (rows + tile - 1) / tile) * tile;

  const int64_t low_columns = (in.R + layout.lanes - 1) / layout.lanes * layout.lanes;
  float* low_sums = nullptr;
  const Scratchpad buffers([&](Carver& carver) {
    for (float** each : {&call.lse, &call.factor, &call.dlogp, &call.entropy, &call.dentropy})
      *each = carver.take<float>(layout.padded_tokens);
    call.target_ids = carver.take<int32_t>(layout.padded_tokens);
    call.hidden_packed = carver.take<char>(layout.hidden_bytes);
    call.tokens_packed = carver.take<char>(layout.tokens_bytes);
    call.low_packed = carver.take<float>(layout.padded_tokens * in.R);
    call.low_by_token = carver.take<float>(in.T * low_columns);
    call.scratch = carver.take<char>(workers * layout.scratch_bytes);
    call.dhidden_parts = dhidden ? carver.take<float>(parts * in.T * layout.padded_hidden) : nullptr;
    low_sums = low_out ? carver.take<float>(parts * in.R * layout.padded_tokens) : nullptr;
    for (Backward& part : calls) take_chunk(carver, part, chunk);
  });
  for (int64_t i = 0; i < layout.padded_tokens; i++) {
    const bool padding = i >= in.T;
    const int64_t row = padding ? 0 : in.rows[i];
    const auto value = [&](const float* values) { return values && !padding ? values[row] : 0.f; };
    call.lse[i] = padding ? 3.4028235e38f : lses[row];  // so that p of the padding is 0
    call.dlogp[i] = value(by_logp);
    call.factor[i] = value(by_lse) - value(by_logp);
    call.entropy[i] = value(entropies);
    call.dentropy[i] = value(by_entropy);
    call.target_ids[i] = padding ? -1 : static_cast<int32_t>(in.targets[i]);
  }
  if (!by_entropy) call.dentropy = nullptr;
  each_worker(workers, [&](int64_t w, int64_t n) {
    own.kernels.pack_hidden(in, layout, call.hidden_packed, w, n);
    if (dweight) own.kernels.pack_tokens(in, layout, call.tokens_packed, w, n);
    if (in.R) own.kernels.pack_low(in, call.low_packed, dlow_weight ? call.low_by_token : nullptr, w, n);
  });

  for (int64_t p = 0; p < parts; p++) {
    Backward& part = calls[static_cast<size_t>(p)];
    const Backward buffer = part;
    part = call;
    part.dz_by_token = dhidden ? buffer.dz_by_token : nullptr;
    part.weight_packed = dhidden ? buffer.weight_packed : nullptr;
    part.dz_by_row = dweight ? buffer.dz_by_row : nullptr;
    part.dbias_parts = dbias ? buffer.dbias_parts : nullptr;
    part.dz_low = dlow_hidden || dlow_weight ? buffer.dz_low : nullptr;
    part.dhidden_sums = dhidden ? call.dhidden_parts + p * in.T * layout.padded_hidden : nullptr;
    part.dlow_hidden_sums = low_sums ? low_sums + p * in.R * layout.padded_tokens : nullptr;
  }
  const auto each_chunk = [&](int64_t p, const auto& body) {
    Backward& part = calls[static_cast<size_t>(p)];
    const int64_t last = in.V * (p + 1) / parts;
    part.first_chunk = true;
    for (part.begin = in.V * p / parts; part.begin < last; part.begin = part.end, part.first_chunk = false) {
      part.end = std::min(part.begin + chunk, last);
      body(part);
    }
  };
  const auto logits_pass = [&](const Backward& part, int64_t w, int64_t n) {
    if (dhidden) own.kernels.pack_weight(part, w, n);
    own.kernels.logit_gradient(part, w, n);
  };
  const auto products_pass = [&](const Backward& part, int64_t w, int64_t n) {
    if (dhidden) own.kernels.add_dhidden(part, w, n);
    if (dweight || dbias) own.kernels.write_dweight(part, w, n);
    if (dlow_hidden) own.kernels.add_dlow_hidden(part, w, n);
    if (dlow_weight) own.kernels.write_dlow_weight(part, w, n);
  };
  if (parts == 1) {  // the workers share each chunk, with a barrier between its passes
    each_chunk(0, [&](const Backward& part) {
      each_worker(workers, [&](int64_t w, int64_t n) { logits_pass(part, w, n); });
      each_worker(workers, [&](int64_t w, int64_t n) { products_pass(part, w, n); });
    });
  } else {
    each_worker(parts, [&](int64_t p, int64_t) {
      calls[static_cast<size_t>(p)].scratch = call.scratch + p * layout.scratch_bytes;
      each_chunk(p, [&](const Backward& part) {
        logits_pass(part, 0, 1);
        products_pass(part, 0, 1);
      });
    });
  }
  if (dhidden) each_worker(workers, [&](int64_t w, int64_t n) { own.kernels.write_dhidden(call, w, n); });
  for (int64_t i = 0; low_out && i < in.T; i++) {
    for (int64_t r = 0; r < in.R; r++) {
      float sum = low_sums[r * layout.padded_tokens + i];
      for (int64_t p = 1; p < parts; p++) sum += low_sums[(p * in.R + r) * layout.padded_tokens + i];
      low_out[in.rows[i] * in.R + r] = sum;
    }
  }
}

}  // namespace prefopt

STABLE_TORCH_LIBRARY_IMPL(prefopt_kernels_cpu, CPU, m) {
  m.impl("linear_logprob_forward", TORCH_BOX(&prefopt::linear_logprob_forward));
  m.impl("linear_logprob_backward", TORCH_BOX(&prefopt::linear_logprob_backward));
}
