// A sequence of int8 layers in one call, whose weights are checked once (inference).
#pragma once

#include <cstdint>

namespace hne {

// Frees the layers that prepare_quantized_layers returned this handle for; an unknown handle is ignored.
void forget_quantized_layers(int64_t handle);

}  // namespace hne
