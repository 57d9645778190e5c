// The host functions that registration.cpp registers; launch_cpu.cpp has them.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

namespace prefopt {

std::vector<std::string> isas();

std::vector<int64_t> linear_logprob_plan(const torch::stable::Tensor& hidden, const torch::stable::Tensor& weight,
                                         int64_t tokens, int64_t rank, bool product, std::string isa);

void linear_logprob_forward(const torch::stable::Tensor& hidden, const torch::stable::Tensor& rows,
                            const torch::stable::Tensor& weight, const torch::stable::Tensor& targets,
                            std::optional<torch::stable::Tensor> bias, std::optional<torch::stable::Tensor> low_hidden,
                            std::optional<torch::stable::Tensor> low_weight, double scale, double softcap,
                            double temperature, bool want_spread, bool want_total,
                            const torch::stable::Tensor& partials, std::optional<torch::stable::Tensor> product,
                            const torch::stable::Tensor& workspace, int64_t splits, int64_t groups, std::string isa);

void linear_logprob_finish_unit(const torch::stable::Tensor& hidden, const torch::stable::Tensor& rows,
                                const torch::stable::Tensor& weight, const torch::stable::Tensor& targets,
                                const torch::stable::Tensor& product, const torch::stable::Tensor& share,
                                const torch::stable::Tensor& own, const torch::stable::Tensor& unit, std::string isa);

void linear_logprob_backward(const torch::stable::Tensor& hidden, const torch::stable::Tensor& rows,
                             const torch::stable::Tensor& weight, const torch::stable::Tensor& targets,
                             std::optional<torch::stable::Tensor> bias, std::optional<torch::stable::Tensor> low_hidden,
                             std::optional<torch::stable::Tensor> low_weight, double scale, double softcap,
                             double temperature, const torch::stable::Tensor& coefficients,
                             const torch::stable::Tensor& target_ids, bool through_entropy,
                             std::optional<torch::stable::Tensor> dhidden, std::optional<torch::stable::Tensor> dweight,
                             std::optional<torch::stable::Tensor> dbias,
                             std::optional<torch::stable::Tensor> dlow_hidden,
                             std::optional<torch::stable::Tensor> dlow_weight, const torch::stable::Tensor& workspace,
                             int64_t parts, int64_t chunk, std::string isa);

}  // namespace prefopt
