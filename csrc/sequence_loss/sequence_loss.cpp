// Host side of sequence_loss. Python (ops/sequence_loss/cpu.py) makes the tensors contiguous and allocates the outputs.
#include <string.h>

#include <algorithm>

#include "../cpu/tensors.h"
#include "formulas.h"

namespace prefopt {

namespace {

constexpr int64_t kTokens = 1 << 16;  // of a thread: 8 us of additions, about what it takes to wake one
constexpr int64_t kRows = 256;        // of a thread: 6 us for KTO, 60 us with every component

// Eight sums side by side, so that an addition need not wait for the one before. The order depends on `count` alone.
double sum(const float* values, int64_t count) {
  double parts[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int k = 0; k < 8; k++) parts[k] += values[i + k];
  for (int k = 0; i < count; i++, k++) parts[k] += values[i];
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// (B + 1,), non-decreasing from 0 to T
const int64_t* checked_begins(const Tensor& cu_seqlens, int64_t B, int64_t T) {
  const int64_t* begins = checked<const int64_t>(cu_seqlens, "cu_seqlens", {B + 1});
  STD_TORCH_CHECK(begins[0] == 0 && begins[B] == T && std::is_sorted(begins, begins + B + 1),
                  "cu_seqlens does not go from 0 to the number of tokens");
  return begins;
}

}  // namespace

void sequence_loss_forward(const Tensor& logp, const Tensor& cu_seqlens, const Tensor& ref_logps, const Tensor& labels,
                           std::optional<Tensor> lengths, int64_t method, int64_t win, int64_t decision,
                           std::vector<double> numbers, const Tensor& losses, const Tensor& logps,
                           const Tensor& log_ratios, const Tensor& rewards, const Tensor& slopes, const Tensor& sums) {
  STD_TORCH_CHECK(static_cast<int64_t>(numbers.size()) == kNumbers, "numbers has the wrong size");
  Form form{static_cast<Method>(method), static_cast<Weighting>(win), static_cast<Weighting>(decision), {}};
  memcpy(&form.n, numbers.data(), sizeof form.n);
  const int64_t T = logp.numel(), B = ref_logps.numel();
  const int64_t* begins = checked_begins(cu_seqlens, B, T);
  const int64_t* counts = checked<const int64_t>(lengths, "lengths", {B});
  const float* tokens = checked<const float>(logp, "logp", {T});
  const float* ref = checked<const float>(ref_logps, "ref_logps", {B});
  const bool* desirable = checked<const bool>(labels, "labels", {B});
  float *loss = checked<float>(losses, "losses", {B}), *total = checked<float>(logps, "logps", {B});
  float *log_ratio = checked<float>(log_ratios, "log_ratios", {B}), *reward = checked<float>(rewards, "rewards", {B});
  float* slope = checked<float>(slopes, "slopes", {B});
  double* by_class = checked<double>(sums, "sums", {8});  // SUMS of op.py
  const auto length = [&](int64_t i) {
    return static_cast<double>(std::max<int64_t>(1, counts ? counts[i] : begins[i + 1] - begins[i]));
  };

  torch::stable::parallel_for(0, B, std::max<int64_t>(1, kTokens * B / std::max<int64_t>(1, T)),
                              [&](int64_t first, int64_t last) {
                                for (int64_t i = first; i < last; i++)
                                  total[i] = static_cast<float>(sum(tokens + begins[i], begins[i + 1] - begins[i]));
                              });

  std::vector<double> weights;
  double mean = form.n.decision_mean;
  if (form.decision != kNone) {
    weights.resize(B);
    torch::stable::parallel_for(0, B, kRows, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) weights[i] = decision_weight(total[i] / length(i), form);
    });
    if (mean == 0) {
      int64_t rows = 0;
      for (const double weight : weights)
        if (!isnan(weight)) mean += weight, rows++;
      mean /= static_cast<double>(rows);  // NaN where every row is
    }
  }

  const double z = moved_reference_point(form.n);
  torch::stable::parallel_for(0, B, kRows, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const double r = static_cast<double>(total[i]) - ref[i], sign = desirable[i] ? 1 : -1;
      double weight = desirable[i] ? form.n.desirable_weight : form.n.undesirable_weight;
      if (form.decision != kNone) weight *= weights[i] / mean;
      const Row row = form.method == kBco ? bco(r, sign, form.n)
                                          : enhanced_kto(r, total[i] / length(i), length(i), sign, weight, z, form);
      loss[i] = static_cast<float>(row.loss);
      slope[i] = static_cast<float>(row.slope);
      log_ratio[i] = static_cast<float>(r);
      reward[i] = static_cast<float>(form.n.beta * r);
    }
  });

  memset(by_class, 0, 8 * sizeof(double));
  for (int64_t i = 0; i < B; i++) {
    double* mine = by_class + (desirable[i] ? 0 : 4);
    mine[0] += 1;
    mine[1] += reward[i];
    mine[2] += total[i];
    mine[3] += loss[i];
  }
}

void sequence_loss_backward(std::optional<Tensor> dlosses, std::optional<Tensor> dlogps, const Tensor& cu_seqlens,
                            const Tensor& slopes, const Tensor& dlogp) {
  const int64_t T = dlogp.numel(), B = slopes.numel();
  const int64_t* begins = checked_begins(cu_seqlens, B, T);
  const float* slope = checked<const float>(slopes, "slopes", {B});
  const float* by_loss = checked<const float>(dlosses, "dlosses", {B});
  const float* by_sum = checked<const float>(dlogps, "dlogps", {B});
  float* out = checked<float>(dlogp, "dlogp", {T});
  torch::stable::parallel_for(0, B, std::max<int64_t>(1, kTokens * B / std::max<int64_t>(1, T)),
                              [&](int64_t first, int64_t last) {
                                for (int64_t i = first; i < last; i++) {
                                  const float own = (by_loss ? by_loss[i] * slope[i] : 0) + (by_sum ? by_sum[i] : 0);
                                  std::fill(out + begins[i], out + begins[i + 1], own);
                                }
                              });
}

}  // namespace prefopt

STABLE_TORCH_LIBRARY_IMPL(prefopt_kernels_cpu, CPU, m) {
  m.impl("sequence_loss_forward", TORCH_BOX(&prefopt::sequence_loss_forward));
  m.impl("sequence_loss_backward", TORCH_BOX(&prefopt::sequence_loss_backward));
}
