// The hierarchical distillation loss (equations 9 and 12) and its gradient in one pass over the logits.
#include <cmath>

#include "distillation.h"
#include "op.h"

namespace hne {
namespace {

constexpr int64_t kSamples = 4;  // samples per task

std::tuple<Tensor, Tensor> hierarchical_distillation_loss(const Tensor& logits_in, const Tensor& target_in,
                                                          double alpha, double temperature) {
  const LogitsSizes sizes = logits_sizes(logits_in, target_in);
  const int64_t models = sizes.models, batch = sizes.batch, classes = sizes.classes;
  check_kind("logits", logits_in, logits_in);
  STD_TORCH_CHECK(target_in.is_cpu(), "target: expected to be on the CPU");
  STD_TORCH_CHECK(alpha >= 0 && alpha <= 1, "alpha: expected a number from 0 to 1");
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature: expected a positive number");
  const Tensor logits = torch::stable::contiguous(widen(logits_in)), target = torch::stable::contiguous(target_in);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t label = data<int64_t>(target)[b];
    STD_TORCH_CHECK(label >= 0 && label < classes, "target: expected class indices from 0 to ", classes - 1, ", got ",
                    label, " at position ", b);
  }
  Tensor loss = empty(logits, std::vector<int64_t>{});
  Tensor grad = empty(logits, {models, batch, classes});
  std::vector<int64_t> students;
  for (int64_t size = 1; size < models; size *= 2) students.push_back(size);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    std::vector<double> losses(batch);
    parallel_tasks(ceil_div(batch, kSamples), [&](int64_t task) {
      for (int64_t b = task * kSamples; b < std::min(batch, (task + 1) * kSamples); ++b) {
        DistillSample<T> d{};
        d.logits = data<T>(logits) + b * classes, d.grad = mutable_data<T>(grad) + b * classes;
        d.scratch = scratch<T>(0, (int64_t(students.size()) + 2) * classes);
        d.students = students.data(), d.num_students = int64_t(students.size());
        d.models = models, d.classes = classes, d.stride = batch * classes, d.target = data<int64_t>(target)[b];
        d.alpha = alpha, d.temperature = temperature, d.batch = double(batch);
        losses[b] = kernels<T>().distill_sample(d);
      }
    });
    double total = 0;
    for (const double value : losses) total += value;
    *mutable_data<T>(loss) = batch > 0 ? T(total / double(batch)) : T(NAN);
  });
  return {round_to(loss, logits_in.scalar_type()), round_to(grad, logits_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("hierarchical_distillation_loss", TORCH_BOX(&hierarchical_distillation_loss));
}

}  // namespace hne
