// Layers one after the other, their weights checked and laid out once (inference).
#pragma once

#include <cstdint>

namespace hne {

// Forget what prepare_layers gave this number for.
void forget_layers(int64_t layers);

}  // namespace hne
