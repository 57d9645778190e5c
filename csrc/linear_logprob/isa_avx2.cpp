// AVX2 and FMA: bf16 and fp16 are converted to fp32 a tile at a time.
#include "x86.h"
#if PREFOPT_X86
#pragma GCC target("avx2,fma")
#define PREFOPT_ISA avx2
#define PREFOPT_LANES 8
#include "kernel_table.h"

namespace prefopt {
const Isa kIsaAvx2 = {"avx2",
                      has_avx2,
                      {avx2::kernels<avx2::DotF32, float>(), avx2::kernels<avx2::DotF32, avx2::bf16>(),
                       avx2::kernels<avx2::DotF32, avx2::fp16>()}};
}  // namespace prefopt
#else
namespace prefopt {
const Isa kIsaAvx2 = {"avx2", nullptr, {}};
}
#endif
