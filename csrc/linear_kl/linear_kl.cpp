// The ops of linear_kl: the passes of linear_logprob with the logits of a reference model beside the policy's. Each
// pass is one call from Python (ops/linear_kl/cpu.py), which allocates the outputs.
#include "../linear_logprob/host.h"

namespace prefopt {

namespace {

// numbers: scale, softcap (0: none) and temperature of the policy, then those of the reference model
Model model_of(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& low_hidden, const std::optional<Tensor>& low_weight,
               const std::vector<double>& numbers, size_t first) {
  STD_TORCH_CHECK(numbers.size() == 6, "numbers has the wrong size");
  return {hidden, weight, bias, low_hidden, low_weight, numbers[first], numbers[first + 1], numbers[first + 2]};
}

}  // namespace

void linear_kl_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, std::optional<Tensor> bias,
                       std::optional<Tensor> low_hidden, std::optional<Tensor> low_weight, const Tensor& ref_hidden,
                       const Tensor& ref_weight, std::optional<Tensor> ref_bias, std::optional<Tensor> ref_low_hidden,
                       std::optional<Tensor> ref_low_weight, std::vector<double> numbers, const Tensor& logp,
                       const Tensor& ref_logp, const Tensor& lse, const Tensor& ref_lse, const Tensor& kl,
                       std::optional<Tensor> entropy, std::optional<Tensor> mean_logit, std::optional<Tensor> is_top1,
                       std::optional<Tensor> unit, std::string instruction_set) {
  const Call policy(model_of(hidden, weight, bias, low_hidden, low_weight, numbers, 0), targets, unit.has_value(),
                    instruction_set);
  const Call ref(model_of(ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_low_weight, numbers, 3), targets, false,
                 instruction_set);
  const std::vector<int64_t> shape = {policy.tokens};
  forward(policy, &ref,
          {.logp = checked<float>(logp, "logp", shape),
           .lse = checked<float>(lse, "lse", shape),
           .entropy = checked<float>(entropy, "entropy", shape),
           .mean_logit = checked<float>(mean_logit, "mean_logit", shape),
           .is_top1 = checked<bool>(is_top1, "is_top1", shape),
           .unit = unit ? checked(*unit, "unit", policy.dtype, {policy.tokens, policy.in.H}) : nullptr,
           .ref_logp = checked<float>(ref_logp, "ref_logp", shape),
           .ref_lse = checked<float>(ref_lse, "ref_lse", shape),
           .kl = checked<float>(kl, "kl", shape)});
}

void linear_kl_backward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, std::optional<Tensor> bias,
                        std::optional<Tensor> low_hidden, std::optional<Tensor> low_weight, const Tensor& ref_hidden,
                        const Tensor& ref_weight, std::optional<Tensor> ref_bias, std::optional<Tensor> ref_low_hidden,
                        std::optional<Tensor> ref_low_weight, std::vector<double> numbers, std::optional<Tensor> dlogp,
                        std::optional<Tensor> dlse, std::optional<Tensor> dentropy, const Tensor& dkl,
                        const Tensor& lse, const Tensor& ref_lse, const Tensor& kl, std::optional<Tensor> entropy,
                        std::optional<Tensor> dhidden, std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                        std::optional<Tensor> dlow_hidden, std::optional<Tensor> dlow_weight,
                        std::string instruction_set) {
  const Model model = model_of(hidden, weight, bias, low_hidden, low_weight, numbers, 0);
  const Call policy(model, targets, dhidden.has_value(), instruction_set);
  const Call ref(model_of(ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_low_weight, numbers, 3), targets, false,
                 instruction_set);
  const std::vector<int64_t> shape = {policy.tokens};
  const Upstream upstream = {.logp = checked<const float>(dlogp, "dlogp", shape),
                             .lse = checked<const float>(dlse, "dlse", shape),
                             .entropy = checked<const float>(dentropy, "dentropy", shape),
                             .kl = checked<const float>(dkl, "dkl", shape),
                             .found_lse = checked<const float>(lse, "lse", shape),
                             .found_entropy = checked<const float>(entropy, "entropy", shape),
                             .found_ref_lse = checked<const float>(ref_lse, "ref_lse", shape),
                             .found_kl = checked<const float>(kl, "kl", shape)};
  const Gradients gradients = checked_gradients(policy, model, dhidden, dweight, dbias, dlow_hidden, dlow_weight);
  backward(policy, &ref, upstream, gradients);
}

}  // namespace prefopt

STABLE_TORCH_LIBRARY_IMPL(prefopt_kernels_cpu, CPU, m) {
  m.impl("linear_kl_forward", TORCH_BOX(&prefopt::linear_kl_forward));
  m.impl("linear_kl_backward", TORCH_BOX(&prefopt::linear_kl_backward));
}
