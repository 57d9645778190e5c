// AVX-512: bf16 and fp16 are converted to fp32 a tile at a time.
#include "x86.h"
#if PREFOPT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define PREFOPT_ISA avx512
#define PREFOPT_LANES 16
#include "kernel_table.h"

namespace prefopt {
const Isa kIsaAvx512 = {"avx512",
                        has_avx512,
                        {avx512::kernels<avx512::DotF32, float>(), avx512::kernels<avx512::DotF32, avx512::bf16>(),
                         avx512::kernels<avx512::DotF32, avx512::fp16>()}};
}  // namespace prefopt
#else
namespace prefopt {
const Isa kIsaAvx512 = {"avx512", nullptr, {}};
}
#endif
