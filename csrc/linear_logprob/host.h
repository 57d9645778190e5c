// The host side of both passes, for the ops of linear_logprob and linear_kl.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "../cpu/tensors.h"
#include "params.h"

namespace prefopt {

// A model's operands as an op has them. scale, softcap (0: none) and temperature of the logit transform.
struct Model {
  const Tensor &hidden, &weight;
  const std::optional<Tensor>&bias, &low_hidden, &low_weight;
  double scale, softcap, temperature;
};

// The checked operands of a call, the rows that have a target, and how the work is divided.
struct Call {
  const Kernels& kernels;
  ScalarType dtype;
  int64_t tokens;  // rows of hidden
  std::vector<int64_t> rows, targets;
  Operands in{};
  Layout layout{};
  int64_t workers, splits, groups;

  // product: whether sums of a product with the head are kept for each split of the vocabulary
  Call(const Model& model, const Tensor& ids, bool product, const std::string& instruction_set);
  Call(const Call&) = delete;
};

// Outputs of the forward, each (tokens,), 0 where there is no target; null where unwanted. Without a reference model
// ref_logp, ref_lse and kl are null.
struct Outputs {
  float *logp, *lse, *entropy, *mean_logit;
  bool* is_top1;
  void* unit;  // (tokens, H)
  float *ref_logp, *ref_lse, *kl;
};

void forward(const Call& policy, const Call* ref, const Outputs& out);

// Gradients that arrive and what the forward found, each (tokens,) or null. With a reference model kl, found_kl and
// found_ref_lse are not.
struct Upstream {
  const float *logp, *lse, *entropy, *kl;
  const float *found_lse, *found_entropy, *found_ref_lse, *found_kl;
};

// Gradients to write, or null.
struct Gradients {
  void *hidden, *weight;
  float *bias, *low_hidden;
  void* low_weight;
};

// Tensors to Gradients, checked against the policy's operands.
Gradients checked_gradients(const Call& policy, const Model& model, const std::optional<Tensor>& hidden,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& low_hidden, const std::optional<Tensor>& low_weight);

void backward(const Call& policy, const Call* ref, const Upstream& upstream, const Gradients& gradients);

}  // namespace prefopt
