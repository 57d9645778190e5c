// The schemas of the CPU library; each op is registered at the end of the file that defines it. Python allocates the
// outputs, which are arguments: no op returns a new tensor.
#include "cpu/dispatch.h"
#include "cpu/tensors.h"

STABLE_TORCH_LIBRARY(prefopt_kernels_cpu, m) {
  m.def("instruction_sets() -> str[]");
  m.def(
      "linear_logprob_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? low_hidden, "
      "Tensor? low_weight, float scale, float softcap, float temperature, Tensor(a!) logp, Tensor(b!) lse, "
      "Tensor(c!)? entropy, Tensor(d!)? mean_logit, Tensor(e!)? is_top1, Tensor(f!)? unit, str instruction_set) -> ()");
  m.def(
      "linear_logprob_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? low_hidden, "
      "Tensor? low_weight, float scale, float softcap, float temperature, Tensor? dlogp, Tensor? dlse, "
      "Tensor? dentropy, Tensor lse, Tensor? entropy, Tensor(a!)? dhidden, Tensor(b!)? dweight, Tensor(c!)? dbias, "
      "Tensor(d!)? dlow_hidden, Tensor(e!)? dlow_weight, str instruction_set) -> ()");
  m.def(
      "linear_kl_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? low_hidden, "
      "Tensor? low_weight, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, Tensor? ref_low_hidden, "
      "Tensor? ref_low_weight, float[] numbers, Tensor(a!) logp, Tensor(b!) ref_logp, Tensor(c!) lse, "
      "Tensor(d!) ref_lse, Tensor(e!) kl, Tensor(f!)? entropy, Tensor(g!)? mean_logit, Tensor(h!)? is_top1, "
      "Tensor(i!)? unit, str instruction_set) -> ()");
  m.def(
      "linear_kl_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? low_hidden, "
      "Tensor? low_weight, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, Tensor? ref_low_hidden, "
      "Tensor? ref_low_weight, float[] numbers, Tensor? dlogp, Tensor? dlse, Tensor? dentropy, Tensor dkl, "
      "Tensor lse, Tensor ref_lse, Tensor kl, Tensor? entropy, Tensor(a!)? dhidden, Tensor(b!)? dweight, "
      "Tensor(c!)? dbias, Tensor(d!)? dlow_hidden, Tensor(e!)? dlow_weight, str instruction_set) -> ()");
  m.def(
      "sequence_loss_forward(Tensor logp, Tensor cu_seqlens, Tensor ref_logps, Tensor labels, Tensor? lengths, int "
      "method, int win, int decision, float[] numbers, Tensor(a!) losses, Tensor(b!) logps, Tensor(c!) log_ratios, "
      "Tensor(d!) rewards, Tensor(e!) slopes, Tensor(f!) sums) -> ()");
  m.def(
      "sequence_loss_backward(Tensor? dlosses, Tensor? dlogps, Tensor cu_seqlens, Tensor slopes, Tensor(a!) dlogp) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(prefopt_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&prefopt::instruction_sets));
}
