// Activations, all of them clamps.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

namespace hne {

// none (-inf, inf), relu (0, inf), relu6 (0, 6)
template <typename T>
struct Clamp {
  T low = -std::numeric_limits<T>::infinity();
  T high = std::numeric_limits<T>::infinity();
  constexpr bool active() const { return low == T(0); }

  static Clamp named(const std::string& activation) {
    Clamp clamp;
    if (activation != "none" && activation != "relu" && activation != "relu6")
      throw std::invalid_argument("activation: expected none, relu or relu6, got " + activation);
    if (activation != "none") clamp.low = T(0);
    if (activation == "relu6") clamp.high = T(6);
    return clamp;
  }
};

}  // namespace hne
