// Every schema and implementation of the CPU library. Outputs are arguments that Python allocated: no op returns a new
// tensor.
#include "linear_logprob/launch_cpu.h"
#include "sequence_loss/sequence_loss_cpu.h"

STABLE_TORCH_LIBRARY(prefopt_kernels_cpu, m) {
  m.def("isas() -> str[]");
  m.def("linear_logprob_plan(Tensor hidden, Tensor weight, int tokens, int rank, bool product, str isa) -> int[]");
  m.def(
      "linear_logprob_forward(Tensor hidden, Tensor rows, Tensor weight, Tensor targets, Tensor? bias, "
      "Tensor? low_hidden, Tensor? low_weight, float scale, float softcap, float temperature, bool want_spread, "
      "bool want_total, Tensor(a!) partials, Tensor(b!)? product, Tensor(c!) workspace, int splits, int groups, "
      "str isa) -> ()");
  m.def(
      "linear_logprob_finish_unit(Tensor hidden, Tensor rows, Tensor weight, Tensor targets, Tensor product, "
      "Tensor share, Tensor own, Tensor(a!) unit, str isa) -> ()");
  m.def(
      "linear_logprob_backward(Tensor hidden, Tensor rows, Tensor weight, Tensor targets, Tensor? bias, "
      "Tensor? low_hidden, Tensor? low_weight, float scale, float softcap, float temperature, Tensor coefficients, "
      "Tensor target_ids, bool through_entropy, Tensor(a!)? dhidden, Tensor(b!)? dweight, Tensor(c!)? dbias, "
      "Tensor(d!)? dlow_hidden, Tensor(e!)? dlow_weight, Tensor(f!) workspace, int parts, int chunk, str isa) -> ()");
  m.def(
      "sequence_loss_forward(Tensor logp, Tensor cu_seqlens, Tensor ref_logps, Tensor labels, Tensor? lengths, int "
      "method, int win, int decision, float[] numbers, Tensor(a!) losses, Tensor(b!) logps, Tensor(c!) log_ratios, "
      "Tensor(d!) rewards, Tensor(e!) slopes, Tensor(f!) sums) -> ()");
  m.def(
      "sequence_loss_backward(Tensor? dlosses, Tensor? dlogps, Tensor cu_seqlens, Tensor slopes, Tensor(a!) dlogp) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(prefopt_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isas", TORCH_BOX(&prefopt::isas));
}

STABLE_TORCH_LIBRARY_IMPL(prefopt_kernels_cpu, CPU, m) {
  m.impl("linear_logprob_plan", TORCH_BOX(&prefopt::linear_logprob_plan));
  m.impl("linear_logprob_forward", TORCH_BOX(&prefopt::linear_logprob_forward));
  m.impl("linear_logprob_finish_unit", TORCH_BOX(&prefopt::linear_logprob_finish_unit));
  m.impl("linear_logprob_backward", TORCH_BOX(&prefopt::linear_logprob_backward));
  m.impl("sequence_loss_forward", TORCH_BOX(&prefopt::sequence_loss_forward));
  m.impl("sequence_loss_backward", TORCH_BOX(&prefopt::sequence_loss_backward));
}
