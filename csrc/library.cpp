// Every op of the package at a glance. Shapes and meaning: hne_kernels/<op>.py.
// Features are branch-major and channels-last, [branch, batch, height, width, channel];
// `replicate` r lets output branch g read input branch g / r. A backward is an op like any other.
#include <torch/csrc/stable/library.h>

#include <string>

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

  for (const std::string op : {"branch_conv2d_stats", "branch_depthwise_conv2d_stats"}) {
    const std::string normalization = "Tensor? mean, Tensor? scale, Tensor? shift, str activation, ";
    const std::string above = "Tensor grad, Tensor grad_mean, Tensor grad_var, Tensor y, Tensor y_mean, ";
    const std::string geometry = "int stride, int padding, int replicate";
    m.def((op + "(Tensor x, Tensor weight, " + normalization + geometry + ") -> (Tensor y, Tensor mean, Tensor var)")
              .c_str());
    m.def((op + "_backward(" + above + "Tensor weight, Tensor x, " + normalization + geometry +
           ", bool need_input, bool need_weight) -> "
           "(Tensor grad_x, Tensor grad_scale, Tensor grad_shift, Tensor grad_weight)")
              .c_str());
  }
  m.def(
      "branch_residual_conv2d_stats(Tensor x, Tensor weight, Tensor? residual, Tensor mean, Tensor scale, "
      "Tensor shift, str activation) -> (Tensor z, Tensor y, Tensor mean, Tensor var)");
  m.def(
      "branch_residual_conv2d_stats_backward(Tensor grad_z, Tensor grad_y, Tensor grad_mean, Tensor grad_var, "
      "Tensor z, Tensor y, Tensor y_mean, Tensor x, Tensor weight, Tensor mean, Tensor scale, Tensor shift, "
      "str activation, bool has_residual) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, "
      "Tensor grad_residual, Tensor grad_weight)");
  {
    const std::string normalization = "Tensor mean, Tensor scale, Tensor shift, str activation";
    const std::string out = "Tensor out_mean, Tensor out_scale, Tensor out_shift, str out_activation";
    const std::string added = "Tensor? residual_mean, Tensor? residual_scale, Tensor? residual_shift";
    m.def(("branch_conv2d_moments(Tensor x, Tensor weight, " + normalization +
           ") -> (Tensor mean, Tensor var, Tensor x_mean, Tensor product)")
              .c_str());
    m.def(("branch_conv2d_moments_backward(Tensor grad_mean, Tensor grad_var, Tensor x_mean, Tensor product, "
           "Tensor x, Tensor weight, " +
           normalization + ") -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, Tensor grad_weight)")
              .c_str());
    m.def(("branch_projection(Tensor x, Tensor weight, Tensor? residual, Tensor? next_weight, " + normalization + ", " +
           out + ", " + added + ") -> (Tensor z, Tensor y, Tensor mean, Tensor var)")
              .c_str());
    m.def(("branch_projection_backward(Tensor grad_z, Tensor grad_y, Tensor grad_mean, Tensor grad_var, Tensor z, "
           "Tensor y, Tensor y_mean, Tensor x, Tensor weight, Tensor? residual, Tensor? next_weight, " +
           normalization + ", " + out + ", " + added +
           ", bool has_residual) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_residual, "
           "Tensor grad_next_weight, Tensor grad_scale, Tensor grad_shift, Tensor grad_out_scale, "
           "Tensor grad_out_shift, Tensor grad_residual_scale)")
              .c_str());
  }
  m.def(
      "branch_normalize(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor? residual, str activation) -> "
      "Tensor");
  m.def(
      "branch_normalize_backward(Tensor grad, Tensor x, Tensor y, Tensor mean, Tensor scale, str activation) "
      "-> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, Tensor grad_residual)");

  m.def(
      "fused_conv2d(Tensor x, Tensor weight, Tensor bias, int stride, int padding, int replicate, "
      "str activation) -> Tensor");
  m.def(
      "fused_bottleneck(Tensor x, Tensor expand, Tensor expand_bias, Tensor depthwise, Tensor depthwise_bias, "
      "Tensor project, Tensor project_bias, Tensor? shortcut, Tensor? shortcut_bias, int stride, int replicate, "
      "str activation, bool identity, str final_activation) -> Tensor");
  m.def("prepare_layers(Tensor?[] weights, int[] numbers) -> int");
  m.def("fused_layers(Tensor x, int layers) -> Tensor[]");

  m.def("prefix_mean(Tensor logits, int[] sizes) -> Tensor");
  m.def("prefix_mean_backward(Tensor grad, int[] sizes, SymInt num_models) -> Tensor");
  m.def(
      "prefix_logits(Tensor features, Tensor weight, Tensor? bias, int[] sizes) "
      "-> (Tensor member, Tensor prefix)");

  m.def(
      "hierarchical_distillation_loss(Tensor logits, Tensor target, float alpha, float temperature) "
      "-> (Tensor loss, Tensor grad)");
}
