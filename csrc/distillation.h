// Sizes of the co-distillation objective, for every device.
#pragma once

#include "tensor.h"

namespace hne {

struct LogitsSizes {
  int64_t models, batch, classes;
};

// Checks logits [models, batch, classes] and target [batch], int64.
inline LogitsSizes logits_sizes(const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits: expected 3 dimensions");
  const LogitsSizes sizes{logits.size(0), logits.size(1), logits.size(2)};
  STD_TORCH_CHECK(sizes.models >= 1 && sizes.classes >= 1, "logits: expected at least one model and one class");
  check_shape("target", target, {sizes.batch});
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target: expected int64");
  return sizes;
}

}  // namespace hne
