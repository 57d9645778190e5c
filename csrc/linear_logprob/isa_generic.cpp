// Any machine: registers of four floats, no instruction beyond the compiler's baseline.
#define PREFOPT_ISA generic
#define PREFOPT_LANES 4
#include "kernel_table.h"

namespace prefopt {
static bool always() { return true; }
const Isa kIsaGeneric = {
    "generic",
    always,
    {generic::kernels<generic::DotF32, float>(), generic::kernels<generic::DotF32, generic::bf16>(),
     generic::kernels<generic::DotF32, generic::fp16>()}};
}  // namespace prefopt
