// The description of a layer by prepare_layers (inference).
#pragma once

#include <string>

#include "tensor.h"

namespace hne {

// The numbers that describe a layer to prepare_layers, in the order of hne_kernels/ops/fused_layers.py.
struct LayerSpec {
  // pool_linear: linear layer of the mean over pixels; normalize: batch norm and activation; the last two pool windows
  enum Kind : int64_t { convolution, bottleneck, pool_linear, normalize, max_pool, average_pool };
  int64_t kind, stride, padding, replicate, activation, final_activation, identity, returned;
  // The layers whose outputs are its input and its residual, counted from itself: -1 is the layer before. The input of
  // all layers counts as the output of a layer before the first. Residual 0: there is none.
  int64_t source, residual, residual_replicate;
  int64_t window, branches;  // of pooling: height and width of the windows, branches of the output

  static constexpr int64_t kNumbers = 13;
  explicit LayerSpec(const int64_t* n)
      : kind(n[0]),
        stride(n[1]),
        padding(n[2]),
        replicate(n[3]),
        activation(n[4]),
        final_activation(n[5]),
        identity(n[6]),
        returned(n[7]),
        source(n[8]),
        residual(n[9]),
        residual_replicate(n[10]),
        window(n[11]),
        branches(n[12]) {
    STD_TORCH_CHECK(kind >= convolution && kind <= average_pool, "numbers: expected a kind from 0 to 5");
    STD_TORCH_CHECK(source < 0 && residual <= 0, "numbers: expected that layers read the outputs of earlier ones");
    STD_TORCH_CHECK(residual == 0 || kind == convolution || kind == pool_linear,
                    "numbers: expected a residual of convolutions only");
    STD_TORCH_CHECK(!pools() || (window >= 1 && stride >= 1 && padding >= 0 && 2 * padding <= window && branches >= 1),
                    "numbers: window, stride, padding or branches out of range");
    STD_TORCH_CHECK(residual_replicate >= 1, "numbers: expected a residual_replicate of at least 1");
  }

  bool pools() const { return kind == max_pool || kind == average_pool; }
  int64_t num_weights() const { return pools() ? 0 : kind == normalize ? 1 : kind == bottleneck ? 8 : 2; }
};

inline std::string activation_name(int64_t number) {
  constexpr const char* kNames[] = {"none", "relu", "relu6"};
  STD_TORCH_CHECK(number >= 0 && number < 3, "activation: expected a number from 0 to 2");
  return kNames[number];
}

}  // namespace hne
