// The layout of packed weights (hne_kernels/packing.py).
#pragma once

#include <cstdint>

namespace hne {

// Output channels that a packed weight keeps side by side.
constexpr int64_t kPanel = 16;

}  // namespace hne
