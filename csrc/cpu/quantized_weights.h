// The checked weights of int8 layers, in the layout that the kernels read (inference).
#pragma once

#include "geometry.h"
#include "microkernels/quantized_kernels.h"
#include "op.h"

namespace hne {

// Reads the tensors of layers in order.
class QuantizedTensors {
 public:
  explicit QuantizedTensors(const std::vector<std::optional<Tensor>>& tensors) : tensors_(tensors) {}

  // The next tensor, which has this dtype and this shape.
  ConstTensor take(ScalarType type, const std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(next_ < tensors_.size(), "weights: fewer than the layers need");
    const std::optional<Tensor>& tensor = tensors_[next_++];
    STD_TORCH_CHECK(tensor.has_value() && tensor->is_cpu() && tensor->scalar_type() == type &&
                        tensor->dim() == int64_t(shape.size()),
                    "weights: number ", next_ - 1, " is missing, or has another dtype or device");
    check_shape("weights", *tensor, shape);
    return ConstTensor(*tensor);
  }

  std::optional<ConstTensor> take_if(bool wanted, ScalarType type, const std::vector<int64_t>& shape) {
    return wanted ? std::optional<ConstTensor>(take(type, shape)) : std::nullopt;
  }

  bool at_end() const { return next_ == tensors_.size(); }

 private:
  const std::vector<std::optional<Tensor>>& tensors_;
  size_t next_ = 0;
};

// A matrix for each branch, in panels: int8 [branches][panels][groups][kPanel][kGroup].
class QuantizedMatrices {
 public:
  QuantizedMatrices(QuantizedTensors& tensors, int64_t branches, int64_t channels, int64_t groups)
      : panels_(ceil_div(channels, kPanel)),
        groups_(groups),
        weight_(tensors.take(ScalarType::Char, {branches, panels_, groups, kPanel, kGroup})) {}

  int64_t panel_size() const { return groups_ * kPanel * kGroup; }
  QuantizedTap tap(int64_t branch, const uint8_t* rows, int64_t row_stride) const {
    return {rows, row_stride, weight_.data<int8_t>() + branch * panels_ * panel_size(), groups_};
  }

 private:
  int64_t panels_, groups_;
  ConstTensor weight_;
};

// Values for the channels of each branch, in whole panels.
template <typename T>
class PanelValues {
 public:
  PanelValues(QuantizedTensors& tensors, int64_t branches, int64_t channels)
      : size_(ceil_div(channels, kPanel) * kPanel),
        values_(tensors.take(std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Int, {branches, size_})) {}
  const T* of(int64_t branch) const { return values_.data<T>() + branch * size_; }

 private:
  int64_t size_;
  ConstTensor values_;
};

}  // namespace hne
