// A device of its own, "pretend", whose memory is the host's and whose kernels are the CPU's.
//
// Every operator that reaches the device checks, as CUDA's kernels do, that all of its tensors are there, runs on CPU
// tensors over the same memory, and gives its results back on the device. Values are real, so programs whose course
// depends on them (`.item()`, `nonzero`, generation) run as they are.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>
#include <vector>

namespace {

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto host = c10::GetCPUAllocator()->allocate(bytes);
    auto *data = host.get();
    auto deleter = host.get_deleter();
    return {data, host.release_context(), deleter, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Allocator *getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};
const bool kRegistered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

bool is_here(const at::Tensor &t) { return t.defined() && t.device().type() == c10::DeviceType::PrivateUse1; }

// The same memory, sizes and strides on another device. What it returns keeps `t` alive.
at::Tensor over(const at::Tensor &t, c10::Device device, c10::DispatchKey key, c10::Allocator *allocator) {
  const auto &from = t.storage();
  auto deleter = [](void *p) { delete static_cast<at::Tensor *>(p); };
  c10::DataPtr data(const_cast<void *>(from.data()), new at::Tensor(t), deleter, device);
  c10::Storage storage(c10::Storage::use_byte_size_t(), from.nbytes(), std::move(data), allocator, false);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return result;
}

at::Tensor on_host(const at::Tensor &t) {
  if (!is_here(t)) return t;
  // What an operator may make larger (out=) must own its memory: see `take_size`.
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCPU));
  return over(t, at::kCPU, c10::DispatchKey::CPU, c10::GetCPUAllocator());
}

at::Tensor on_device(const at::Tensor &host) {
  if (!host.defined() || !host.device().is_cpu()) return host;
  return over(host, kDevice, c10::DispatchKey::PrivateUse1, &memory);
}

// What a view operator made of `base`'s memory, as a view of `base` itself.
at::Tensor view_of(const at::Tensor &base, const at::Tensor &host) {
  c10::Storage storage(base.storage());
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, std::move(storage), base.key_set(), host.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  return result;
}

// After an operator with out=: what it made of an empty tensor.
void take_size(const at::Tensor &t, const at::Tensor &host) {
  if (t.sizes() == host.sizes() && t.numel()) return;
  auto *impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(on_device(host).storage());
  impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
}

// Operators that take tensors of both devices: copies, and indexing (whose indices alone may be on the CPU).
const std::unordered_set<std::string> kCopies{"aten::_copy_from", "aten::_copy_from_and_resize"};
const std::unordered_set<std::string> kIndexing{
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};

void check(const c10::FunctionSchema &schema, const at::Tensor &t) {
  // A tensor without dimensions counts as a number, as it does on a GPU.
  if (!t.defined() || is_here(t) || t.dim() == 0 || t.device().is_meta()) return;
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", kDevice.str(),
              " and ", t.device().str(), "! (", schema.name(), ": a ", t.scalar_type(), " of shape ", t.sizes(), ")");
}

struct Call {
  const c10::FunctionSchema &schema;
  std::vector<std::pair<size_t, at::Tensor>> ours;  // argument, the device's tensor
  std::vector<at::Tensor> hosts;                    // beside each, the CPU's

  at::Tensor enter(size_t argument, const at::Tensor &t, bool any_device) {
    if (!any_device) check(schema, t);
    if (!is_here(t)) return t;
    ours.emplace_back(argument, t);
    hosts.push_back(on_host(t));
    return hosts.back();
  }

  c10::IValue enter(size_t argument, const c10::IValue &value, bool copies, bool indexing) {
    if (value.isTensor()) return enter(argument, value.toTensor(), copies);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor &t : value.toTensorVector()) list.push_back(enter(argument, t, copies));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor> &t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional(enter(argument, *t, copies || indexing)) : t);
      return list;
    }
    if (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensorList()) {
      c10::List<c10::List<at::Tensor>> list;
      for (const c10::IValue &inner : value.toListRef())
        list.push_back(enter(argument, inner, copies, indexing).toTensorList());
      return list;
    }
    const bool device = value.isDevice() && value.toDevice().type() == c10::DeviceType::PrivateUse1;
    return device ? c10::IValue(c10::Device(at::kCPU)) : value;
  }

  void enter(torch::jit::Stack &stack, size_t begin) {
    const bool copies = kCopies.count(schema.name()), indexing = kIndexing.count(schema.name());
    for (size_t i = 0; i < schema.arguments().size(); i++)
      stack[begin + i] = enter(i, stack[begin + i], copies, indexing);
  }

  // The device's tensor that a result is, or is a view of; null for a new one.
  const at::Tensor *source(const c10::Argument &result) const {
    const auto *alias = result.alias_info();
    if (!alias) return nullptr;
    for (const auto &[argument, t] : ours) {
      const auto *other = schema.arguments()[argument].alias_info();
      if (other && other->beforeSets() == alias->beforeSets()) return &t;
    }
    return nullptr;
  }

  at::Tensor leave(const c10::Argument &result, const at::Tensor &host) const {
    const auto *base = source(result);
    if (!base) return on_device(host);
    return result.alias_info()->isWrite() ? *base : view_of(*base, host);
  }

  void leave(torch::jit::Stack &stack, size_t begin) const {
    for (size_t i = 0; i < ours.size(); i++) {
      const auto *alias = schema.arguments()[ours[i].first].alias_info();
      if (alias && alias->isWrite()) take_size(ours[i].second, hosts[i]);
    }
    for (size_t i = 0; i < schema.returns().size(); i++) {
      auto &value = stack[begin + i];
      if (value.isTensor()) {
        value = leave(schema.returns()[i], value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor &t : value.toTensorVector()) list.push_back(leave(schema.returns()[i], t));
        value = list;
      }
    }
  }
};

void run(const c10::OperatorHandle &op, const c10::OperatorHandle &cpu_op, torch::jit::Stack *stack) {
  const auto &schema = op.schema();
  Call call{schema, {}, {}};
  call.enter(*stack, stack->size() - schema.arguments().size());
  cpu_op.callBoxed(stack);
  call.leave(*stack, stack->size() - schema.returns().size());
}

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) { run(op, op, stack); }

c10::OperatorHandle named(const char *name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

void convolution(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  run(op, named("aten::convolution"), stack);
}

// The same arguments but for those of a bias, which the device's own convolution does not have.
void convolution_backward(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  const auto &schema = op.schema();
  Call call{schema, {}, {}};
  const size_t begin = stack->size() - schema.arguments().size();
  call.enter(*stack, begin);
  auto mask = (*stack)[stack->size() - 1].toBoolList();
  const int64_t bias = mask.get(2) ? (*stack)[begin].toTensor().size(1) : 0;
  stack->insert(stack->begin() + begin + 3, c10::IValue(std::vector<int64_t>{bias}));
  named("aten::convolution_backward").callBoxed(stack);
  call.leave(*stack, stack->size() - schema.returns().size());
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           kKeys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor &from, const at::Tensor &to, bool) {
  auto host = on_host(to);
  host.copy_(on_host(from));
  return to;
}

void record_stream(at::Tensor &, c10::Stream) {}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("record_stream", record_stream);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

struct Silent final : c10::WarningHandler {
  void process(const c10::Warning &) override {}
};

// Collectives run over the same memory: gloo's, in the place of kernels that hand the device's tensors to a backend.
TORCH_LIBRARY_IMPL(c10d, PrivateUse1, m) {
  Silent silent;  // about kernels that are replaced
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  for (const char *name :
       {"allreduce_", "allreduce_coalesced_", "broadcast_", "barrier", "allgather_", "_allgather_base_",
        "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_", "alltoall_base_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
