// Which x86 instruction sets this machine has. Included before a kernel source raises its own.
#pragma once
#include "linear_logprob.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define PREFOPT_X86 1
namespace prefopt {
bool has_avx2();
bool has_avx512();
bool has_avx512_bf16();
}  // namespace prefopt
#else
#define PREFOPT_X86 0
#endif
