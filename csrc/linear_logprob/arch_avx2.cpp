// AVX2 and FMA: bf16 and fp16 are converted to fp32 a tile at a time.
#include "params.h"
#if PREFOPT_X86
#pragma GCC target("avx2,fma")
#define PREFOPT_ISA avx2
#define PREFOPT_LANES 8
#include "kernels.h"

namespace prefopt::avx2 {
const Kernels kFloat32 = kernels<DotF32, float>();
const Kernels kBfloat16 = kernels<DotF32, bf16>();
const Kernels kFloat16 = kernels<DotF32, fp16>();
}  // namespace prefopt::avx2
#endif
