// Any machine: registers of four floats, no instruction beyond the compiler's baseline.
#include "params.h"
#define PREFOPT_ISA generic
#define PREFOPT_LANES 4
#include "kernels.h"

namespace prefopt::generic {
const Kernels kFloat32 = kernels<DotF32, float>();
const Kernels kBfloat16 = kernels<DotF32, bf16>();
const Kernels kFloat16 = kernels<DotF32, fp16>();
}  // namespace prefopt::generic
