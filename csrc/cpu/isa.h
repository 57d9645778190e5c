// Which x86 instruction sets this machine has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define PREFOPT_X86 1
#else
#define PREFOPT_X86 0
#endif

namespace prefopt {
bool has_avx2();
bool has_avx512();
bool has_avx512_bf16();
bool has_amx();
}  // namespace prefopt
