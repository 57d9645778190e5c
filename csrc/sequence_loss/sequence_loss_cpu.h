// The host functions that registration.cpp registers; sequence_loss_cpu.cpp has them.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace prefopt {

void sequence_loss_forward(const torch::stable::Tensor& logp, const torch::stable::Tensor& cu_seqlens,
                           const torch::stable::Tensor& ref_logps, const torch::stable::Tensor& labels,
                           std::optional<torch::stable::Tensor> lengths, int64_t method, int64_t win, int64_t decision,
                           std::vector<double> numbers, const torch::stable::Tensor& losses,
                           const torch::stable::Tensor& logps, const torch::stable::Tensor& log_ratios,
                           const torch::stable::Tensor& rewards, const torch::stable::Tensor& slopes,
                           const torch::stable::Tensor& sums);

void sequence_loss_backward(std::optional<torch::stable::Tensor> dlosses, std::optional<torch::stable::Tensor> dlogps,
                            const torch::stable::Tensor& cu_seqlens, const torch::stable::Tensor& slopes,
                            const torch::stable::Tensor& dlogp);

}  // namespace prefopt
