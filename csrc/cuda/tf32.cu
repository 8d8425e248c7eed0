// The switch for tf32 products of float32 values; off until hne_kernels/dispatch.py passes on torch's setting.
// It has no kernel: no bytes moved, no operations.
#include <atomic>

#include "op.h"

namespace hne {
namespace {

std::atomic<bool> allowed{false};

bool set_allow_tf32(bool allow) { return allowed.exchange(allow); }

}  // namespace

bool allow_tf32() { return allowed; }

STABLE_TORCH_LIBRARY_FRAGMENT(hne, m) { m.def("allow_tf32(bool allow) -> bool"); }
STABLE_TORCH_LIBRARY_IMPL(hne, CompositeExplicitAutograd, m) { m.impl("allow_tf32", TORCH_BOX(&set_allow_tf32)); }

}  // namespace hne
