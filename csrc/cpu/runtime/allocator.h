// Memory for what the ops write.
#pragma once

#include "tensor.h"

namespace hne {

// An uninitialised tensor of these sizes, with the dtype of `like`. Large ones come from memory that other tensors have
// given back: fresh memory costs a page fault for every 4 KiB, which is half of a training step.
Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes);

// Whether such memory is filled with NaN first: what a kernel leaves out then shows.
void poison_memory(bool poisoned);

// Gives the memory that no tensor uses back to the system; returns how many bytes.
int64_t release_memory();

}  // namespace hne
