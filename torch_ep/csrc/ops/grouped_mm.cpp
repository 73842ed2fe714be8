// ep::grouped_mm and its transpose: one matrix product for each group of rows, in any dtype and on any device. The
// fallback of torch_ep.nn where torch's own grouped_mm does not run.
#include "core/checks.h"
#include "ops/ops.h"

#include <ATen/Functions.h>

namespace ep {
namespace {

constexpr const char* kOp = "ep::grouped_mm";

// Calls f(group, first row, rows) for every group.
template <typename F>
void for_each_group(const at::Tensor& offsets, int64_t num_rows, const F& f) {
  const auto host = offsets.cpu();
  const auto* end = host.const_data_ptr<int32_t>();
  int64_t begin = 0;
  for (int64_t group = 0; group < host.numel(); ++group) {
    TORCH_CHECK_VALUE(
        begin <= end[group] && end[group] <= num_rows,
        kOp,
        ": expected offsets that grow from 0 to at most ",
        num_rows,
        ", got ",
        end[group],
        " after ",
        begin);
    f(group, begin, end[group] - begin);
    begin = end[group];
  }
}

void check_offsets(const at::Tensor& offsets, const at::Tensor& a, const Dim& groups) {
  check_tensor(kOp, "offsets", offsets, {groups}, a, kGroups);
  check_int32(kOp, "offsets", offsets);
}

void check_factors(const at::Tensor& a, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == a.scalar_type(),
      kOp,
      ": expected ",
      name,
      " of dtype ",
      a.scalar_type(),
      ", that of a, got ",
      t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == a.device(), kOp, ": expected ", name, " on ", a.device(), ", got ", t.device());
  check_memory(kOp, "a", a);
  check_memory(kOp, name, t);
}

}  // namespace

at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets) {
  TORCH_CHECK_VALUE(
      a.dim() == 2 && b.dim() == 3 && a.size(1) == b.size(1),
      kOp,
      ": expected a of shape [m, k] and b of shape [groups, k, n], got ",
      a.sizes(),
      " and ",
      b.sizes());
  check_factors(a, "b", b);
  check_offsets(offsets, a, b.size(0));
  auto out = at::empty({a.size(0), b.size(2)}, a.options());
  int64_t end = 0;
  for_each_group(offsets, a.size(0), [&](int64_t group, int64_t begin, int64_t rows) {
    end = begin + rows;
    if (rows > 0) {
      auto slice = out.narrow(0, begin, rows);
      at::mm_out(slice, a.narrow(0, begin, rows), b.select(0, group));
    }
  });
  out.narrow(0, end, a.size(0) - end).zero_();
  return out;
}

at::Tensor grouped_mm_transpose(const at::Tensor& a, const at::Tensor& g, const at::Tensor& offsets) {
  TORCH_CHECK_VALUE(
      a.dim() == 2 && g.dim() == 2 && a.size(0) == g.size(0),
      kOp,
      ": expected a of shape [m, k] and g of shape [m, n], got ",
      a.sizes(),
      " and ",
      g.sizes());
  check_factors(a, "g", g);
  check_offsets(offsets, a, "groups");
  auto out = at::empty({offsets.size(0), a.size(1), g.size(1)}, a.options());
  for_each_group(offsets, a.size(0), [&](int64_t group, int64_t begin, int64_t rows) {
    auto slice = out.select(0, group);
    if (rows > 0) {
      at::mm_out(slice, a.narrow(0, begin, rows).t(), g.narrow(0, begin, rows));
    } else {
      slice.zero_();
    }
  });
  return out;
}

}  // namespace ep
