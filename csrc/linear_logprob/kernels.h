// The table of one instruction set and dtype.
#pragma once
#include "backward.h"
#include "forward.h"

namespace prefopt::PREFOPT_ISA {

template <class Dot, class Element>
constexpr Kernels kernels() {
  return {
      .layout = layout<Dot>,
      .pack_hidden = pack_hidden<Dot, Element>,
      .pack_tokens = pack_tokens<Dot, Element>,
      .pack_low = pack_low<Panels>,
      .forward = forward<Dot, Element>,
      .write_unit = write_unit<Element>,
      .pack_weight = pack_weight<Dot, Element>,
      .logit_gradient = logit_gradient<Dot, Element>,
      .add_dhidden = add_dhidden<Dot>,
      .write_dhidden = write_dhidden<Element>,
      .write_dweight = write_dweight<Dot, Element>,
      .add_dlow_hidden = add_dlow_hidden<Element, Panels>,
      .write_dlow_weight = write_dlow_weight<Element, Panels>,
  };
}

}  // namespace prefopt::PREFOPT_ISA
