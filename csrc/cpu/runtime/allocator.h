// Memory for the outputs of the CPU ops.
#pragma once

#include "tensor.h"

namespace hne {

// An uninitialised tensor of shape `sizes` with the dtype of `like`, or `type`. Tensors of 64 KiB and more reuse freed
// buffers: fresh memory costs a page fault per 4 KiB, which is half the time of a training step.
Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, std::optional<ScalarType> type = {});

// Whether `empty` fills such buffers with NaN, so that tests notice values that a kernel does not write.
void poison_memory(bool poisoned);

// Returns idle buffers to the system; the number of bytes.
int64_t release_memory();

}  // namespace hne
