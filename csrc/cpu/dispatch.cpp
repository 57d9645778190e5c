#include "dispatch.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "matmul_mkl_bf16.h"
#if PREFOPT_X86
#include <cpuid.h>
#endif

namespace prefopt {

#if PREFOPT_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// CPUID leaf 7: AMX-BF16 (bit 22) and AMX-TILE (bit 24); MKL requests the tiles' state from the system itself
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
}
#endif

namespace {

constexpr const char* kMkl = "avx512_bf16+mkl";  // bf16 products by MKL, everything else by the kernels

const KernelSet kSets[] = {
#if PREFOPT_X86
    {.name = kMkl,
     .available = [] { return has_avx512_bf16() && has_mkl_bf16(); },
     .float32 = &avx512::kFloat32,
     .bfloat16 = &avx512_bf16_mkl::kBfloat16,
     .float16 = &avx512::kFloat16},
    {.name = "avx512_bf16",
     .available = has_avx512_bf16,
     .float32 = &avx512::kFloat32,
     .bfloat16 = &avx512_bf16::kBfloat16,
     .float16 = &avx512::kFloat16},
    {.name = "avx512",
     .available = has_avx512,
     .float32 = &avx512::kFloat32,
     .bfloat16 = &avx512::kBfloat16,
     .float16 = &avx512::kFloat16},
    {.name = "avx2",
     .available = has_avx2,
     .float32 = &avx2::kFloat32,
     .bfloat16 = &avx2::kBfloat16,
     .float16 = &avx2::kFloat16},
#endif
    {.name = "generic",
     .available = [] { return true; },
     .float32 = &generic::kFloat32,
     .bfloat16 = &generic::kBfloat16,
     .float16 = &generic::kFloat16},
};

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const KernelSet& set : kSets)
    if (set.available()) names.emplace_back(set.name);
#if PREFOPT_X86
  // Without AMX, MKL's product runs at a fifth of the speed of avx512_bf16 (measured on a Zen 5): last, for the tests.
  if (!has_amx() && names.front() == kMkl) std::rotate(names.begin(), names.begin() + 1, names.end());
#endif
  return names;
}

const KernelSet& kernel_set(const std::string& name) {
  for (const KernelSet& set : kSets) {
    if (name != set.name) continue;
    STD_TORCH_CHECK(set.available(), "this machine does not have the instruction set ", name);
    return set;
  }
  STD_TORCH_CHECK(false, "unknown instruction set ", name);
}

}  // namespace prefopt
