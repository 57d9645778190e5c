// Host side of linear_logprob: checks tensors, plans the buffers, divides the work and combines its parts. Each pass is
// one call from Python (ops/linear_logprob/cpu.py), which allocates the outputs.
#include "host.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "../cpu/dispatch.h"

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

}  // namespace

Call::Call(const Model& model, const Tensor& ids, bool product, const std::string& instruction_set)
    : kernels(kernels_for(instruction_set, model.hidden.scalar_type())),
      dtype(model.hidden.scalar_type()),
      tokens(model.hidden.size(0)),
      workers(torch::stable::get_num_threads()) {
  in.H = model.hidden.size(1);
  in.V = model.weight.size(0);
  STD_TORCH_CHECK(model.weight.scalar_type() == dtype, "weight is not of hidden's dtype");
  in.hidden = checked_rows(model.hidden, "hidden", tokens, in.H);
  in.weight = checked_rows(model.weight, "weight", in.V, in.H);
  in.hidden_stride = model.hidden.stride(0);
  in.weight_stride = model.weight.stride(0);
  in.bias = checked<const float>(model.bias, "bias", {in.V});
  STD_TORCH_CHECK(model.low_hidden.has_value() == model.low_weight.has_value(),
                  "low_hidden and low_weight come together");
  if (model.low_hidden) {
    in.R = model.low_weight->size(1);
    in.low_hidden = checked<const float>(model.low_hidden, "low_hidden", {tokens, in.R});
    in.low_weight = checked_rows(*model.low_weight, "low_weight", in.V, in.R);
    in.low_weight_stride = model.low_weight->stride(0);
    in.low_weight_is_float = model.low_weight->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(in.low_weight_is_float || model.low_weight->scalar_type() == dtype,
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
  in.scale = static_cast<float>(model.scale);
  in.softcap = static_cast<float>(model.softcap);
  in.temperature = static_cast<float>(model.temperature);
  kernels.layout(in, &layout);
  // Splitting the vocabulary reads and packs W once in all, so it comes before splitting the tokens
  splits = std::min(workers, std::max<int64_t>(1, in.V / layout.tile_rows));
  if (product) {
    const int64_t bytes = in.T * layout.padded_hidden * 4;
    splits = std::min(splits, std::max<int64_t>(1, kProductBytes / std::max<int64_t>(1, bytes)));
  }
  groups = std::max((workers + splits - 1) / splits, (in.T + kGroupTokens - 1) / kGroupTokens);
}

namespace {

// Every call's sums of a row over the splits of the vocabulary, in fp64, which costs nothing at this size and keeps
// log(1 + 1e-6) exact.
struct Row {
  double top = 0, log_sum = 0, spread = 0, logits = 0, target = 0, gap = 0;
  double lse() const { return top + log_sum; }
  double logp() const { return (target - top) - log_sum; }  // log_sum is 0 or more
};

double sum_at(const Forward& call, const float* sums, int64_t split, int64_t i) {
  return sums[split * call.layout.padded_tokens + i];
}

Row combine(const Forward& call, int64_t i) {
  const auto at = [&](const float* sums, int64_t split) { return sum_at(call, sums, split, i); };
  Row row;
  row.top = at(call.out.max, 0);
  for (int64_t s = 1; s < call.splits; s++) {
    const double m = at(call.out.max, s);
    if (m > row.top || isnan(m)) row.top = m;
  }
  double sum = 0;
  for (int64_t s = 0; s < call.splits; s++) {
    const double moved = at(call.out.max, s) - row.top, own = at(call.out.sum, s) + at(call.out.rest, s);
    const double shrink = exp(moved);
    sum += shrink * own;
    if (call.want_spread) row.spread += shrink * (at(call.out.spread, s) + moved * own);
    if (call.want_logits) row.logits += at(call.out.logits, s);
    row.target += at(call.out.target, s);
    if (!call.ref || shrink == 0) continue;
    const double gap = at(call.out.gap, s);
    row.gap += shrink * (isinf(gap) ? gap : gap + at(call.out.gap_rest, s));  // infinite: banned by the reference
  }
  row.log_sum = log(sum);
  row.spread /= sum;
  row.gap /= sum;
  return row;
}

void write_row(const Forward& call, const Outputs& out, int64_t i) {
  const Operands& in = call.in;
  const Row own = combine(call, i);
  const int64_t row = in.rows[i];
  out.logp[row] = static_cast<float>(own.logp());
  out.lse[row] = static_cast<float>(own.lse());
  if (out.entropy) out.entropy[row] = static_cast<float>(own.log_sum - own.spread);  // lse - E[z]
  if (out.mean_logit) out.mean_logit[row] = static_cast<float>(own.logits / static_cast<double>(in.V));
  if (out.is_top1) out.is_top1[row] = own.target >= own.top;
  if (call.ref) {
    const Row ref = combine(*call.ref, i);
    out.ref_logp[row] = static_cast<float>(ref.logp());
    out.ref_lse[row] = static_cast<float>(ref.lse());
    out.kl[row] = static_cast<float>(own.gap - (own.top - ref.top) - (own.log_sum - ref.log_sum));
  }
  if (!call.unit) return;
  const double factor = static_cast<double>(in.scale) / in.temperature;
  const double tanh = in.softcap == 0 ? 0 : own.target * in.temperature / in.softcap;
  call.target_scale[i] = static_cast<float>((1 - tanh * tanh) * factor * -expm1(own.logp()));
  for (int64_t s = 0; s < call.splits; s++)
    call.product_scale[s * in.T + i] = static_cast<float>(exp(sum_at(call, call.out.max, s, i) - own.lse()) * factor);
}

// The buffers of one model's operands, packed once for the whole pass.
template <class Pass>
void take_packed(Carver& carver, const Call& own, Pass& pass) {
  pass.hidden_packed = carver.take<char>(own.layout.hidden_bytes);
  pass.low_packed = carver.take<float>(own.layout.padded_tokens * own.in.R);
}

// What a pass over the policy needs of the reference model. A worker's scratch for it lies behind the worker's own.
template <class Pass>
void join(Pass& pass, Forward& ref_pass, const Call& policy, const Call* ref) {
  pass.in = policy.in;
  pass.layout = policy.layout;
  if (!ref) return;
  STD_TORCH_CHECK(ref->dtype == policy.dtype && ref->tokens == policy.tokens && ref->in.V == policy.in.V,
                  "the two models differ in dtype, tokens or vocabulary");
  ref_pass.in = ref->in;
  ref_pass.layout = ref->layout;
  ref_pass.splits = policy.splits;
  pass.ref = &ref_pass;
  pass.layout.scratch_bytes += ref->layout.scratch_bytes;
}

void pack(const Call& own, char* hidden_packed, float* low_packed, float* low_by_token, int64_t w, int64_t n) {
  own.kernels.pack_hidden(own.in, own.layout, hidden_packed, w, n);
  if (own.in.R) own.kernels.pack_low(own.in, low_packed, low_by_token, w, n);
}

}  // namespace

void forward(const Call& policy, const Call* ref, const Outputs& out) {
  Forward call{}, ref_call{};
  join(call, ref_call, policy, ref);
  call.unit = out.unit;
  if (call.in.T == 0) return;
  call.splits = policy.splits;
  call.groups = policy.groups;
  call.want_spread = out.entropy;
  call.want_logits = out.mean_logit;
  const Layout& layout = call.layout;
  const int64_t T = call.in.T, sums = call.splits * layout.padded_tokens;
  const Scratchpad buffers([&](Carver& carver) {
    Partials& of = call.out;
    for (float** each : {&of.max, &of.sum, &of.rest, &of.spread, &of.logits, &of.target})
      *each = carver.take<float>(sums);
    if (ref) {
      Partials& other = ref_call.out;
      for (float** each : {&of.gap, &of.gap_rest, &other.max, &other.sum, &other.rest, &other.target})
        *each = carver.take<float>(sums);
      take_packed(carver, *ref, ref_call);
    }
    call.out.product = out.unit ? carver.take<float>(call.splits * T * layout.padded_hidden) : nullptr;
    call.product_scale = out.unit ? carver.take<float>(call.splits * T) : nullptr;
    call.target_scale = out.unit ? carver.take<float>(T) : nullptr;
    take_packed(carver, policy, call);
    call.scratch = carver.take<char>(policy.workers * layout.scratch_bytes);
  });
  each_worker(policy.workers, [&](int64_t w, int64_t n) {
    pack(policy, call.hidden_packed, call.low_packed, nullptr, w, n);
    if (ref) pack(*ref, ref_call.hidden_packed, ref_call.low_packed, nullptr, w, n);
  });
  each_worker(policy.workers, [&](int64_t w, int64_t n) { policy.kernels.forward(call, w, n); });
  each_worker(policy.workers, [&](int64_t w, int64_t n) {
    for (int64_t i = T * w / n; i < T * (w + 1) / n; i++) write_row(call, out, i);
    if (out.unit) policy.kernels.write_unit(call, w, n);
  });
}

Gradients checked_gradients(const Call& policy, const Model& model, const std::optional<Tensor>& hidden,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& low_hidden, const std::optional<Tensor>& low_weight) {
  const Operands& in = policy.in;
  Gradients out{};
  if (hidden) out.hidden = checked(*hidden, "dhidden", policy.dtype, {policy.tokens, in.H});
  if (weight) out.weight = checked(*weight, "dweight", policy.dtype, {in.V, in.H});
  out.bias = checked<float>(bias, "dbias", {in.V});
  out.low_hidden = checked<float>(low_hidden, "dlow_hidden", {policy.tokens, in.R});
  if (low_weight) {
    STD_TORCH_CHECK(model.low_weight.has_value(), "dlow_weight needs low_weight");
    out.low_weight = checked(*low_weight, "dlow_weight", model.low_weight->scalar_type(), {in.V, in.R});
  }
  if (in.T == 0) {
    for (const std::optional<Tensor>* each : {&weight, &bias, &low_weight})
      if (*each) {
        Tensor zeros = **each;
        torch::stable::zero_(zeros);
      }
  }
  return out;
}

void backward(const Call& policy, const Call* ref, const Upstream& upstream, const Gradients& gradients) {
  STD_TORCH_CHECK(!upstream.entropy || upstream.found_entropy, "a gradient through the entropy needs the entropy");
  Backward call{};
  Forward ref_call{};
  join(call, ref_call, policy, ref);
  const Operands& in = call.in;
  const Layout& layout = call.layout;
  call.dhidden = gradients.hidden;
  call.dweight = gradients.weight;
  call.dbias = gradients.bias;
  call.dlow_weight = gradients.low_weight;
  float* low_out = gradients.low_hidden;
  if (in.T == 0) return;

  // No barrier is needed where each worker owns a part of the vocabulary, and of the sums of dhidden
  const int64_t workers = policy.workers, parts = policy.splits == workers ? workers : 1, tile = layout.tile_rows;
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
    for (float** each : {&call.lse, &call.factor, &call.dlogp, &call.entropy, &call.dentropy, &call.dkl, &call.gap})
      *each = carver.take<float>(layout.padded_tokens);
    call.target_ids = carver.take<int32_t>(layout.padded_tokens);
    take_packed(carver, policy, call);
    if (ref) take_packed(carver, *ref, ref_call);
    call.tokens_packed = carver.take<char>(layout.tokens_bytes);
    call.low_by_token = carver.take<float>(in.T * low_columns);
    call.scratch = carver.take<char>(workers * layout.scratch_bytes);
    call.dhidden_parts = call.dhidden ? carver.take<float>(parts * in.T * layout.padded_hidden) : nullptr;
    low_sums = low_out ? carver.take<float>(parts * in.R * layout.padded_tokens) : nullptr;
    for (Backward& part : calls) take_chunk(carver, part, chunk);
  });
  for (int64_t i = 0; i < layout.padded_tokens; i++) {
    const bool padding = i >= in.T;
    const int64_t row = padding ? 0 : in.rows[i];
    const auto value = [&](const float* values) { return values && !padding ? values[row] : 0.f; };
    call.lse[i] = padding ? 3.4028235e38f : upstream.found_lse[row];  // so that p of the padding is 0
    call.dlogp[i] = value(upstream.logp);
    call.factor[i] = value(upstream.lse) - value(upstream.logp);
    call.entropy[i] = value(upstream.found_entropy);
    call.dentropy[i] = value(upstream.entropy);
    call.dkl[i] = value(upstream.kl);
    // the mean of z - z'
    call.gap[i] = value(upstream.found_lse) - value(upstream.found_ref_lse) + value(upstream.found_kl);
    call.target_ids[i] = padding ? -1 : static_cast<int32_t>(in.targets[i]);
  }
  if (!upstream.entropy) call.dentropy = nullptr;
  each_worker(workers, [&](int64_t w, int64_t n) {
    pack(policy, call.hidden_packed, call.low_packed, call.dlow_weight ? call.low_by_token : nullptr, w, n);
    if (ref) pack(*ref, ref_call.hidden_packed, ref_call.low_packed, nullptr, w, n);
    if (call.dweight) policy.kernels.pack_tokens(in, layout, call.tokens_packed, w, n);
  });

  for (int64_t p = 0; p < parts; p++) {
    Backward& part = calls[static_cast<size_t>(p)];
    const Backward buffer = part;
    part = call;
    part.dz_by_token = call.dhidden ? buffer.dz_by_token : nullptr;
    part.weight_packed = call.dhidden ? buffer.weight_packed : nullptr;
    part.dz_by_row = call.dweight ? buffer.dz_by_row : nullptr;
    part.dbias_parts = call.dbias ? buffer.dbias_parts : nullptr;
    part.dz_low = low_out || call.dlow_weight ? buffer.dz_low : nullptr;
    part.dhidden_sums = call.dhidden ? call.dhidden_parts + p * in.T * layout.padded_hidden : nullptr;
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
    if (part.dhidden) policy.kernels.pack_weight(part, w, n);
    policy.kernels.logit_gradient(part, w, n);
  };
  const auto products_pass = [&](const Backward& part, int64_t w, int64_t n) {
    if (part.dhidden) policy.kernels.add_dhidden(part, w, n);
    if (part.dweight || part.dbias) policy.kernels.write_dweight(part, w, n);
    if (low_out) policy.kernels.add_dlow_hidden(part, w, n);
    if (part.dlow_weight) policy.kernels.write_dlow_weight(part, w, n);
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
  if (call.dhidden) each_worker(workers, [&](int64_t w, int64_t n) { policy.kernels.write_dhidden(call, w, n); });
  for (int64_t i = 0; low_out && i < in.T; i++) {
    for (int64_t r = 0; r < in.R; r++) {
      float sum = low_sums[r * layout.padded_tokens + i];
      for (int64_t p = 1; p < parts; p++) sum += low_sums[(p * in.R + r) * layout.padded_tokens + i];
      low_out[in.rows[i] * in.R + r] = sum;
    }
  }
}

void linear_logprob_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                            std::optional<Tensor> bias, std::optional<Tensor> low_hidden,
                            std::optional<Tensor> low_weight, double scale, double softcap, double temperature,
                            const Tensor& logp, const Tensor& lse, std::optional<Tensor> entropy,
                            std::optional<Tensor> mean_logit, std::optional<Tensor> is_top1, std::optional<Tensor> unit,
                            std::string instruction_set) {
  const Call own({hidden, weight, bias, low_hidden, low_weight, scale, softcap, temperature}, targets, unit.has_value(),
                 instruction_set);
  const std::vector<int64_t> shape = {own.tokens};
  Outputs out = {.logp = checked<float>(logp, "logp", shape),
                 .lse = checked<float>(lse, "lse", shape),
                 .entropy = checked<float>(entropy, "entropy", shape),
                 .mean_logit = checked<float>(mean_logit, "mean_logit", shape),
                 .is_top1 = checked<bool>(is_top1, "is_top1", shape),
                 .unit = unit ? checked(*unit, "unit", own.dtype, {own.tokens, own.in.H}) : nullptr,
                 .ref_logp = nullptr,
                 .ref_lse = nullptr,
                 .kl = nullptr};
  forward(own, nullptr, out);
}

void linear_logprob_backward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                             std::optional<Tensor> bias, std::optional<Tensor> low_hidden,
                             std::optional<Tensor> low_weight, double scale, double softcap, double temperature,
                             std::optional<Tensor> dlogp, std::optional<Tensor> dlse, std::optional<Tensor> dentropy,
                             const Tensor& lse, std::optional<Tensor> entropy, std::optional<Tensor> dhidden,
                             std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                             std::optional<Tensor> dlow_hidden, std::optional<Tensor> dlow_weight,
                             std::string instruction_set) {
  const Model model = {hidden, weight, bias, low_hidden, low_weight, scale, softcap, temperature};
  const Call own(model, targets, dhidden.has_value(), instruction_set);
  const std::vector<int64_t> shape = {own.tokens};
  const Upstream upstream = {.logp = checked<const float>(dlogp, "dlogp", shape),
                             .lse = checked<const float>(dlse, "dlse", shape),
                             .entropy = checked<const float>(dentropy, "dentropy", shape),
                             .kl = nullptr,
                             .found_lse = checked<const float>(lse, "lse", shape),
                             .found_entropy = checked<const float>(entropy, "entropy", shape),
                             .found_ref_lse = nullptr,
                             .found_kl = nullptr};
  backward(own, nullptr, upstream, checked_gradients(own, model, dhidden, dweight, dbias, dlow_hidden, dlow_weight));
}

}  // namespace prefopt

STABLE_TORCH_LIBRARY_IMPL(prefopt_kernels_cpu, CPU, m) {
  m.impl("linear_logprob_forward", TORCH_BOX(&prefopt::linear_logprob_forward));
  m.impl("linear_logprob_backward", TORCH_BOX(&prefopt::linear_logprob_backward));
}
