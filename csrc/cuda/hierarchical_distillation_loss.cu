// The co-distillation objective (equations 9 and 12), value and gradient in one launch: each sample's logits are read
// from device memory once (and again from the cache), each gradient is written once.
//
//   N members, B samples, L classes   bytes moved at least    operations
//   loss and gradient                 2 N B L values          about 12 N B L, of them 2 N B L exponentials
#include <cmath>

#include "distillation.h"
#include "op.h"

namespace hne {
namespace {

constexpr int kMostStudents = 31;

struct Distillation {
  const void *logits, *target;
  void *grad, *losses, *scratch;  // scratch: null if it fits into shared memory
  int64_t batch, classes;
  int models, students;  // students: the ensembles of 1, 2, 4, ... members
  float alpha, temperature, member_scale, student_scale;
};

// Scratch values of a sample: sums, teacher and students of every class, then peak and total of every member.
HNE_BOTH int64_t scratch_size(const Distillation& d) { return (d.students + 2) * d.classes + 2 * d.models; }

// The `threads` of one sample: a warp or the whole block.
template <int threads>
struct Team {
  float* shared;  // [threads / 32], for reductions
  int rank;

  template <typename F>
  HNE_DEVICE float reduce(float value, const F& f) const {
    for (int mask = 16; mask > 0; mask /= 2) value = f(value, shuffle_xor(value, mask));
    if constexpr (threads > 32) {
      block_sync();  // every thread has read the previous reduction
      if (rank % 32 == 0) shared[rank / 32] = value;
      block_sync();
      value = shared[0];
      for (int warp = 1; warp < threads / 32; ++warp) value = f(value, shared[warp]);
    }
    return value;
  }
  HNE_DEVICE float largest(float value) const {
    return reduce(value, [](float a, float b) { return a > b ? a : b; });
  }
  HNE_DEVICE float sum(float value) const {
    return reduce(value, [](float a, float b) { return a + b; });
  }
  HNE_DEVICE void sync() const {
    if constexpr (threads > 32)
      block_sync();
    else
      warp_sync();
  }
  // Sets peak = max of value(c); returns the sum of exp(value(c) - peak).
  template <typename Value>
  HNE_DEVICE float softmax(int64_t classes, const Value& value, float& peak) const {
    peak = -INFINITY;
    for (int64_t c = rank; c < classes; c += threads) {
      const float v = value(c);
      peak = v > peak ? v : peak;  // a NaN is lost here, but not in the sum
    }
    peak = largest(peak);
    float total = 0;
    for (int64_t c = rank; c < classes; c += threads) total += expf(value(c) - peak);
    return sum(total);
  }
};

template <typename T, int threads>
__global__ void __launch_bounds__(kThreads) distill(const Distillation d) {
  constexpr int teams = kThreads / threads;
  const int team_index = int(threadIdx.x) / threads;
  const int64_t sample = int64_t(blockIdx.x) * teams + team_index, classes = d.classes;
  if (sample >= d.batch) return;  // returns whole warps: a larger team is the whole block
  float* const shared = static_cast<float*>(shared_memory());
  const Team<threads> team{shared, int(threadIdx.x) % threads};
  float* const scratch = d.scratch != nullptr ? static_cast<float*>(d.scratch) + sample * scratch_size(d)
                                              : shared + 32 + team_index * scratch_size(d);
  float *const sums = scratch, *const teacher = sums + classes, *const students = teacher + classes;
  float* const member_softmax = students + d.students * classes;  // peak and total of each
  const int64_t stride = d.batch * classes;
  const T* const logits = static_cast<const T*>(d.logits) + sample * classes;
  T* const grad = static_cast<T*>(d.grad) + sample * classes;
  const int64_t label = static_cast<const int64_t*>(d.target)[sample];
  const bool valid = label >= 0 && label < classes;

  // A thread has the same classes throughout: only the members' peaks and totals pass between threads.
  for (int64_t c = team.rank; c < classes; c += threads) sums[c] = 0;
  float independent = valid ? 0.0f : NAN;  // a label out of range gives a NaN loss, not an invalid access
  for (int n = 0, p = 0; n < d.models; ++n) {
    const T* member = logits + n * stride;
    const bool student = p < d.students && n + 1 == 1 << p;
    for (int64_t c = team.rank; c < classes; c += threads) {
      sums[c] += float(member[c]);
      if (student) students[p * classes + c] = sums[c] / float(n + 1);
    }
    p += student;
    float peak;
    const float total = team.softmax(classes, [&](int64_t c) { return float(member[c]); }, peak);
    if (team.rank == 0) member_softmax[2 * n] = peak, member_softmax[2 * n + 1] = total;
    // Cross-entropy as log(total) + (peak - logit): (log(total) + peak) - logit would cancel large numbers.
    if (valid) independent += logf(total) + (peak - float(member[label]));
  }

  float distilled = 0;
  if (d.students > 0) {
    const float inverse_temperature = 1 / d.temperature, inverse_models = 1 / float(d.models);
    float peak;
    const auto soft = [&](int64_t c) { return sums[c] * inverse_models * inverse_temperature; };
    const float teacher_total = team.softmax(classes, soft, peak);
    for (int64_t c = team.rank; c < classes; c += threads) teacher[c] = expf(soft(c) - peak) / teacher_total;
    // Member n gets the gradient of every student p with n < 2^p: add up from the largest student down.
    for (int p = d.students - 1; p >= 0; --p) {
      float* const student = students + p * classes;
      const float total = team.softmax(classes, [&](int64_t c) { return student[c] * inverse_temperature; }, peak);
      float cross = 0;
      for (int64_t c = team.rank; c < classes; c += threads) {
        const float value = student[c] * inverse_temperature;
        cross += teacher[c] * (peak - value);
        const float own = (expf(value - peak) / total - teacher[c]) * (d.student_scale / float(1 << p));
        student[c] = own + (p + 1 < d.students ? student[classes + c] : 0.0f);
      }
      distilled += logf(total) + team.sum(cross);
    }
  }

  team.sync();  // for the peaks and totals, written by rank 0
  for (int n = 0, p = 0; n < d.models; ++n) {
    while (p < d.students && n >= 1 << p) ++p;  // the smallest student that member n belongs to
    const float peak = member_softmax[2 * n], total = member_softmax[2 * n + 1];
    for (int64_t c = team.rank; c < classes; c += threads) {
      const float probability = expf(float(logits[n * stride + c]) - peak) / total;
      float g = (probability - (c == label ? 1.0f : 0.0f)) * d.member_scale;
      if (p < d.students) g += students[p * classes + c];
      grad[n * stride + c] = T(g);
    }
  }
  if (team.rank == 0)
    static_cast<float*>(d.losses)[sample] =
        (1 - d.alpha) * independent + d.alpha * d.temperature * d.temperature * distilled;
}

// The mean loss of the samples, always added in the same order, by one block; NaN without samples.
template <typename T>
__global__ void __launch_bounds__(kThreads) mean_loss(const float* losses, const int64_t batch, T* loss) {
  float sum = 0;
  for (int64_t sample = threadIdx.x; sample < batch; sample += kThreads) sum += losses[sample];
  sum = Team<kThreads>{static_cast<float*>(shared_memory()), int(threadIdx.x)}.sum(sum);
  if (threadIdx.x == 0) *loss = T(batch > 0 ? sum / float(batch) : NAN);
}

std::tuple<Tensor, Tensor> hierarchical_distillation_loss(const Tensor& logits_in, const Tensor& target_in,
                                                          double alpha, double temperature) {
  const auto [models, batch, classes] = logits_sizes(logits_in, target_in);
  check_kind("logits", logits_in, logits_in);
  STD_TORCH_CHECK(on_device(target_in) && target_in.get_device_index() == logits_in.get_device_index(),
                  "target: expected the device of logits");
  STD_TORCH_CHECK(models <= INT32_MAX / 2, "logits: too many models");
  const Device device(logits_in);
  const Tensor logits = torch::stable::contiguous(logits_in), target = torch::stable::contiguous(target_in);
  Tensor loss = torch::stable::new_empty(logits, std::vector<int64_t>{});
  Tensor grad = torch::stable::new_empty(logits, {models, batch, classes});
  const Tensor losses = torch::stable::new_empty(logits, {batch}, ScalarType::Float);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    Distillation d{data<T>(logits),
                   data<int64_t>(target),
                   mutable_data<T>(grad),
                   mutable_data<float>(losses),
                   nullptr,
                   batch,
                   classes,
                   int(models),
                   0,
                   float(alpha),
                   float(temperature),
                   0,
                   0};
    while (d.students < kMostStudents && int64_t(1) << d.students < models) ++d.students;
    d.member_scale = float((1 - alpha) / double(std::max<int64_t>(batch, 1)));
    d.student_scale = float(alpha * temperature / double(std::max<int64_t>(batch, 1)));
    const int64_t reductions = 32 * int64_t(sizeof(float)), sample_bytes = scratch_size(d) * int64_t(sizeof(float));
    constexpr int64_t teams = kThreads / 32;
    // A warp per sample while that takes few iterations. Scratch too large for shared memory lies in device memory.
    Tensor scratch = losses;
    if (classes <= 512 && reductions + teams * sample_bytes <= device.shared_limit()) {
      device.launch(distill<T, 32>, ceil_div(batch, teams), kThreads, reductions + teams * sample_bytes, d);
    } else if (reductions + sample_bytes <= device.shared_limit()) {
      device.launch(distill<T, kThreads>, batch, kThreads, reductions + sample_bytes, d);
    } else {
      scratch = torch::stable::new_empty(logits, {batch, scratch_size(d)}, ScalarType::Float);
      d.scratch = mutable_data<float>(scratch);
      device.launch(distill<T, kThreads>, batch, kThreads, reductions, d);
    }
    device.launch(mean_loss<T>, 1, kThreads, reductions, data<float>(losses), batch, mutable_data<T>(loss));
  });
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("hierarchical_distillation_loss", TORCH_BOX(&hierarchical_distillation_loss));
}

}  // namespace hne
