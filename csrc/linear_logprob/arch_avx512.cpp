// AVX-512: bf16 and fp16 are converted to fp32 a tile at a time.
#include "params.h"
#if PREFOPT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define PREFOPT_ISA avx512
#define PREFOPT_LANES 16
#include "kernels.h"

namespace prefopt::avx512 {
const Kernels kFloat32 = kernels<DotF32, float>();
const Kernels kBfloat16 = kernels<DotF32, bf16>();
const Kernels kFloat16 = kernels<DotF32, fp16>();
}  // namespace prefopt::avx512
#endif
