// Dense branch convolution; in training it normalises its input as it reads it and sums up statistics of its result.
//
//   G branches, M output pixels each   bytes moved at least                               multiply-adds
//   plain                              x + weight + out                                   G M C_out C_in k^2
//   training                           x + weight + y (+ statistics of 128 pixels each)   the same
#include "dense_forward.h"
#include "few_channels.h"

namespace hne {

template <typename T>
void dense_forward(const Device& device, const Convolution<T>& d, ChannelReduction* moments) {
  if (!run_few_channels(device, d, moments)) run_gemm<T>(device, DenseForward<T, false>(d, moments));
}
template void dense_forward(const Device&, const Convolution<float>&, ChannelReduction*);
template void dense_forward(const Device&, const Convolution<half>&, ChannelReduction*);
template void dense_forward(const Device&, const Convolution<bfloat16>&, ChannelReduction*);

}  // namespace hne
