// Sizes of the tiles, and how tokens (or other columns) are cut into panels of registers.
#pragma once
#include "../cpu/gemm.h"

namespace prefopt::PREFOPT_ISA {

// Tiles, chosen for the number of registers: a product keeps M x N sums, N columns and a broadcast in them.
#if PREFOPT_LANES == 16
constexpr int kTokenVectors = 3, kVocabularyRows = 8, kHiddenVectors = 4, kTokenRows = 6;  // 32 registers
#else
constexpr int kTokenVectors = 3, kVocabularyRows = 4, kHiddenVectors = 2, kTokenRows = 6;  // 16 registers
#endif
constexpr int kPanelWidth = kTokenVectors * kLanes;
constexpr int kGroup = kHiddenVectors * kLanes;  // columns of H that are packed side by side
// rows of the vocabulary: a bf16 tile of H 1,024 and its packed copy fill half of a 1 MiB second-level cache
constexpr int64_t kTileRows = 128;
// of H in one running sum: a single one over H 4,096 put logp off by 2e-5, blocks of this size by less than 4e-6
constexpr int64_t kSumUnits = 512;
constexpr int64_t kHeadRows = 256;  // rows of the head's gradient that are summed at a time

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Tokens are cut into panels of kTokenVectors registers. A single register left over would run at half speed, so the
// last four registers make two panels of two.
struct Panels {
  int64_t vectors, full, count;
  explicit Panels(int64_t tokens) {
    vectors = divide_up(tokens, kLanes);
    full = vectors / kTokenVectors - (vectors % kTokenVectors == 1 && vectors > kTokenVectors ? 1 : 0);
    const int64_t rest = vectors - full * kTokenVectors;
    count = full + (rest == 4 ? 2 : rest > 0 ? 1 : 0);
  }
  int64_t first_vector(int64_t panel) const { return panel <= full ? panel * kTokenVectors : full * kTokenVectors + 2; }
  int64_t width(int64_t panel) const {
    const int64_t rest = vectors - full * kTokenVectors;
    return panel < full ? kTokenVectors : rest == 4 ? 2 : rest;
  }
  template <class Body>
  void visit(int64_t panel, const Body& body) const {
    const int64_t width = this->width(panel);
    if (width == 3) body(Constant<3>{});
    if (width == 2) body(Constant<2>{});
    if (width == 1) body(Constant<1>{});
  }
  // body(Constant<registers>, first column) for every panel
  template <class Body>
  static void each(int64_t columns, const Body& body) {
    const Panels panels(columns);
    for (int64_t p = 0; p < panels.count; p++)
      panels.visit(p, [&](auto registers) { body(registers, panels.first_vector(p) * kLanes); });
  }
};

// z (count, N registers) (+)= the product of `units` columns of a with a packed panel, summed in blocks of kSumUnits;
// a_stride in bytes, z_stride in floats.
template <class Dot, int N>
void add_blocks(int64_t count, int64_t units, const char* a, int64_t a_stride, const char* panel, float* z,
                int64_t z_stride, bool accumulate) {
  for (int64_t k = 0; k < units; k += kSumUnits) {
    multiply<Dot, kVocabularyRows, N>(count, min_of(units - k, kSumUnits), a + k * 4, a_stride, 4,
                                      reinterpret_cast<const float*>(panel) + k * N * kLanes, z, z_stride,
                                      accumulate || k > 0);
  }
}

}  // namespace prefopt::PREFOPT_ISA
