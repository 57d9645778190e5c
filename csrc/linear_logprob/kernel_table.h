// The table of one instruction set and dtype, for linear_logprob.h's Isa.
#pragma once
#include "kernel_backward.h"
#include "kernel_forward.h"

namespace prefopt::PREFOPT_ISA {

template <class Dot, class Element>
constexpr Kernels kernels() {
  using F = ForwardPass<Dot, Element>;
  using B = BackwardPass<Dot, Element>;
  using L = typename F::Low;
  return {F::layout,      F::pack_hidden,         F::pack_tokens,         L::pack,
          F::forward,     F::finish_unit,         B::pack_weight,         B::logit_gradient,
          B::add_dhidden, B::write_head_gradient, L::add_hidden_gradient, L::write_weight_gradient};
}

}  // namespace prefopt::PREFOPT_ISA
