// The schemas of all ops. hne_kernels/ops/<op>.py documents shapes and meaning.
// Features are branch-major and channels-last, [branch, batch, height, width, channel].
// With `replicate` r, output branch g reads input branch g / r. Backward passes are ops, too.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(hne, m) {
  m.def("branch_conv2d(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, int replicate) -> Tensor");
  m.def(
      "branch_conv2d_backward_input(Tensor grad, Tensor weight, SymInt height, SymInt width, "
      "int stride, int padding, int replicate) -> Tensor");
  m.def(
      "branch_conv2d_backward_weight(Tensor grad, Tensor x, int kernel_size, "
      "int stride, int padding, int replicate) -> Tensor");

  m.def(
      "branch_depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, "
      "int replicate) -> Tensor");
  m.def(
      "branch_depthwise_conv2d_backward_input(Tensor grad, Tensor weight, SymInt height, SymInt width, "
      "int stride, int padding, int replicate) -> Tensor");
  m.def(
      "branch_depthwise_conv2d_backward_weight(Tensor grad, Tensor x, int kernel_size, "
      "int stride, int padding, int replicate) -> Tensor");

  // The normalisation of a feature map is one tensor [3, branches, channels]: mean, scale, shift.
  m.def(
      "branch_norm_conv2d(Tensor x, Tensor weight, Tensor? norm, Tensor? residual, Tensor? residual_norm, "
      "str activation, int stride, int padding, int replicate, bool materialize) "
      "-> (Tensor y, Tensor mean, Tensor var, Tensor z)");
  m.def(
      "branch_norm_conv2d_backward(Tensor grad_y, Tensor grad_mean, Tensor grad_var, Tensor? grad_z, Tensor y, "
      "Tensor y_mean, Tensor? z, Tensor x, Tensor weight, Tensor? norm, Tensor? residual, Tensor? residual_norm, "
      "str activation, int stride, int padding, int replicate, bool has_residual, bool need_input, "
      "bool need_weight) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_norm, Tensor grad_residual, "
      "Tensor grad_residual_norm)");
  m.def(
      "branch_pointwise_stats(Tensor x, Tensor weight, Tensor norm, str activation) "
      "-> (Tensor mean, Tensor var, Tensor x_mean, Tensor product)");
  m.def(
      "branch_pointwise_stats_backward(Tensor grad_mean, Tensor grad_var, Tensor x_mean, Tensor product, Tensor x, "
      "Tensor weight, Tensor norm, str activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_norm)");
  m.def(
      "branch_pointwise_norm_conv2d(Tensor x, Tensor weight, Tensor norm, str activation, Tensor out_norm, "
      "str out_activation, Tensor? residual, Tensor? residual_norm, Tensor? next_weight) "
      "-> (Tensor z, Tensor y, Tensor mean, Tensor var)");
  m.def(
      "branch_pointwise_norm_conv2d_backward(Tensor grad_z, Tensor grad_y, Tensor grad_mean, Tensor grad_var, "
      "Tensor z, Tensor y, Tensor y_mean, Tensor x, Tensor weight, Tensor norm, str activation, Tensor out_norm, "
      "str out_activation, Tensor? residual, Tensor? residual_norm, Tensor? next_weight, bool has_residual) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_norm, Tensor grad_out_norm, Tensor grad_residual, "
      "Tensor grad_residual_norm, Tensor grad_next_weight)");
  // mean and var are statistics of a batch; total replaces count where only the device knows it.
  m.def(
      "batch_norm_scale_shift(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? total, SymInt count, float momentum, "
      "float eps) -> Tensor");
  m.def(
      "batch_norm_scale_shift_backward(Tensor grad, Tensor var, Tensor? weight, bool has_bias, float eps) "
      "-> (Tensor grad_mean, Tensor grad_var, Tensor grad_weight, Tensor grad_bias)");
  m.def("branch_normalize(Tensor x, Tensor norm, Tensor? residual, Tensor? residual_norm, str activation) -> Tensor");
  m.def(
      "branch_normalize_backward(Tensor grad, Tensor x, Tensor y, Tensor norm, Tensor? residual, "
      "Tensor? residual_norm, str activation, bool has_residual) "
      "-> (Tensor grad_x, Tensor grad_norm, Tensor grad_residual, Tensor grad_residual_norm)");

  m.def(
      "fused_conv2d(Tensor x, Tensor weight, Tensor bias, int stride, int padding, int replicate, "
      "str activation, Tensor? residual=None, int residual_replicate=1) -> Tensor");
  m.def(
      "fused_bottleneck(Tensor x, Tensor expand, Tensor expand_bias, Tensor depthwise, Tensor depthwise_bias, "
      "Tensor project, Tensor project_bias, Tensor? shortcut, Tensor? shortcut_bias, int stride, int replicate, "
      "str activation, bool identity, str final_activation) -> Tensor");
  m.def("fused_bottleneck_chain(Tensor x, Tensor?[] weights, int[] numbers, bool pool) -> Tensor");
  m.def("prepare_layers(Tensor?[] weights, int[] numbers) -> int");
  m.def("fused_layers(Tensor x, int layers, Tensor? total=None, int count=0) -> Tensor[]");
  m.def("prepare_quantized_layers(Tensor?[] weights, int[] numbers) -> int");
  m.def("quantized_layers(Tensor x, int layers) -> Tensor[]");

  m.def("prefix_mean(Tensor logits, int[] sizes) -> Tensor");
  m.def("prefix_mean_backward(Tensor grad, int[] sizes, SymInt num_models) -> Tensor");
  m.def(
      "prefix_logits(Tensor features, Tensor weight, Tensor? bias, int[] sizes) "
      "-> (Tensor member, Tensor prefix)");

  m.def(
      "hierarchical_distillation_loss(Tensor logits, Tensor target, float alpha, float temperature) "
      "-> (Tensor loss, Tensor grad)");
}
