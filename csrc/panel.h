// Layout of packed weights (hne_kernels/packing.py).
#pragma once

#include <cstdint>

namespace hne {

// Output channels of a panel, contiguous in a packed weight.
constexpr int64_t kPanel = 16;

}  // namespace hne
