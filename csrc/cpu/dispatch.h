// The choice of kernels at run time.
#pragma once
#include <string>
#include <vector>

#include "../linear_logprob/params.h"

namespace prefopt {

// An instruction set, with the kernels that it uses for each dtype.
struct KernelSet {
  const char* name;
  bool (*available)();
  const Kernels *float32, *bfloat16, *float16;
};

std::vector<std::string> instruction_sets();           // of this machine, best first
const KernelSet& kernel_set(const std::string& name);  // throws where this machine does not have it

}  // namespace prefopt
