// torch's own operators on the emulated GPU: CPU operators, over the same memory, run by a stream.
//
// The shapes of results come from torch's meta tensors when an operator is called; what it computes
// comes when the stream gets there, from raw addresses: nothing that it needs is kept alive, as on
// a GPU.
#include "operators.h"

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/copy_native.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <set>

using namespace gpu;

namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;
using OnTensor = std::function<at::Tensor(const at::Tensor&)>;

// ---- Arguments on another device.

IValue moved(const IValue& value, const OnTensor& move, c10::Device device) {
  if (value.isTensor()) return move(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& each : value.toTensorVector()) list.push_back(move(each));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& each : value.toOptionalTensorList()) {
      list.push_back(each ? std::optional<at::Tensor>(move(*each)) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return device;
  return value;
}

std::vector<IValue> moved(const std::vector<IValue>& values, const OnTensor& move,
                          c10::Device device) {
  std::vector<IValue> all;
  for (const IValue& value : values) all.push_back(moved(value, move, device));
  return all;
}

at::Tensor to_meta(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
}

// The same memory, for the CPU.
at::Tensor on_cpu(const at::Tensor& tensor) {
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       tensor.options().device(at::kCPU).pinned_memory(false));
}

OnTensor later(std::vector<Later>& kept) {
  // The address stands for the tensor until the work runs: a meta tensor says which one it is.
  return [&kept](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      at::Tensor copy = tensor.clone();
      copy.unsafeGetTensorImpl()->set_wrapped_number(
          tensor.unsafeGetTensorImpl()->is_wrapped_number());
      return copy;
    }
    kept.push_back(
        {tensor.data_ptr(), tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type()});
    return at::empty({static_cast<int64_t>(kept.size()) - 1}, at::TensorOptions(at::kMeta));
  };
}

// ---- Calls.

Stack call(const OperatorHandle& op, std::vector<IValue> arguments) {
  Stack stack = std::move(arguments);
  op.callBoxed(stack);
  return stack;
}

const c10::Argument* written(const c10::FunctionSchema& schema, std::size_t number) {
  std::size_t seen = 0;
  for (const c10::Argument& argument : schema.arguments()) {
    const c10::AliasInfo* const alias = argument.alias_info();
    if (alias != nullptr && alias->isWrite() && seen++ == number) return &argument;
  }
  return nullptr;
}

IValue allocate_like(const IValue& meta) {
  return moved(
      meta,
      [](const at::Tensor& tensor) {
        if (!tensor.defined()) return tensor;
        return at::empty_strided(tensor.sizes(), tensor.strides(),
                                 tensor.options().device(at::kCUDA));
      },
      at::kCUDA);
}

void copy_into(const IValue& to, const IValue& from) {
  if (from.isTensor()) {
    const at::Tensor &found = from.toTensor(), &target = to.toTensor();
    // Empty is a result for training alone; without a target nobody reads it.
    if (found.defined() && found.numel() != 0 && target.defined()) target.copy_(found);
  } else if (from.isTensorList()) {
    const auto targets = to.toTensorVector(), sources = from.toTensorVector();
    for (std::size_t i = 0; i < sources.size(); ++i) targets[i].copy_(sources[i]);
  }
}

void wait() { c10::cuda::getCurrentCUDAStream().synchronize(); }

// Whether the GPU's operator looks at its arguments on the host, which torch says it does.
bool looks(const OperatorHandle& op, const std::vector<IValue>& arguments) {
  static const std::set<std::string> names = {"aten::nonzero",           "aten::masked_select",
                                              "aten::_unique2",          "aten::unique_consecutive",
                                              "aten::unique_dim",        "aten::equal",
                                              "aten::repeat_interleave", "aten::bincount",
                                              "aten::_unique",           "aten::allclose"};
  if (names.count(op.schema().name()) != 0) return true;
  const bool indexes = op.schema().name() == "aten::index" ||
                       op.schema().name() == "aten::index_put_" ||
                       op.schema().name() == "aten::_index_put_impl_";
  if (!indexes) return false;
  for (const std::optional<at::Tensor>& index : arguments[1].toOptionalTensorList()) {
    if (!index || !index->defined()) continue;
    const bool mask = index->scalar_type() == at::kBool || index->scalar_type() == at::kByte;
    if (mask || !index->is_cuda()) return true;
  }
  return false;
}

Stack shapes_of(const OperatorHandle& op, const std::vector<IValue>& arguments, bool now,
                std::vector<IValue>& inferred) {
  const Alone alone;
  if (!now) {
    try {
      inferred = moved(arguments, to_meta, at::kMeta);
      return call(op, inferred);
    } catch (const c10::NotImplementedError&) {
    }
  }
  // No meta kernel. On copies, as nothing may be written yet.
  inferred = moved(
      arguments,
      [](const at::Tensor& tensor) {
        return tensor.defined() && tensor.is_cuda() ? on_cpu(tensor).clone() : tensor;
      },
      at::kCPU);
  return call(op, inferred);
}

// What the call returns: arguments that it writes to, or new tensors like `shapes`. `inferred`: the
// arguments as they are after the call, for the sizes of those that it resizes.
std::vector<IValue> results_of(const c10::FunctionSchema& schema, const Stack& shapes,
                               const std::vector<IValue>& arguments,
                               const std::vector<IValue>& inferred) {
  std::vector<IValue> results;
  std::size_t aliased = 0;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    if (schema.returns()[i].alias_info() == nullptr) {
      results.push_back(allocate_like(shapes[i]));
      continue;
    }
    const std::size_t index = written(schema, aliased++) - schema.arguments().data();
    const at::Tensor target = arguments[index].toTensor();
    const at::IntArrayRef wanted = inferred[index].toTensor().sizes();
    if (target.sizes() != wanted) target.resize_(wanted);
    results.push_back(target);
  }
  return results;
}

// The call, on the CPU, by the addresses that its tensors have now.
std::function<void()> work_of(const OperatorHandle& op, const std::vector<IValue>& arguments,
                              const std::vector<IValue>& results) {
  std::vector<Later> kept;
  const OnTensor keep = later(kept);
  const std::vector<IValue> kept_arguments = moved(arguments, keep, at::kCPU);
  const std::vector<IValue> kept_results = moved(results, keep, at::kCPU);
  return [op, kept = std::move(kept), kept_arguments, kept_results] {
    const Alone alone;
    const OnTensor get = [&kept](const at::Tensor& tensor) {
      return tensor.defined() && tensor.is_meta() ? kept[tensor.size(0)].get() : tensor;
    };
    const std::vector<IValue> targets = moved(kept_results, get, at::kCPU);
    Stack found;
    try {
      found = call(op, moved(kept_arguments, get, at::kCPU));
    } catch (const c10::Error& error) {
      throw std::runtime_error(error.what_without_backtrace());
    }
    for (std::size_t i = 0; i < found.size(); ++i) {
      if (op.schema().returns()[i].alias_info() == nullptr) copy_into(targets[i], found[i]);
    }
  };
}

// As torch's own kernels do: all on the device, but for numbers and indices; nothing that is
// written overlaps another argument in part.
void check_arguments(const OperatorHandle& op, const std::vector<IValue>& arguments) {
  const c10::FunctionSchema& schema = op.schema();
  std::vector<at::Tensor> all;
  const auto collect = [&all](const at::Tensor& tensor) {
    if (tensor.defined()) all.push_back(tensor);
    return tensor;
  };
  for (const IValue& each : arguments) {
    if (!each.isOptionalTensorList()) moved(each, collect, at::kCPU);
  }
  for (const at::Tensor& each : all) {
    TORCH_CHECK(each.is_cuda() || each.dim() == 0, schema.name(),
                ": Expected all tensors to be on the same device, but one is on ", each.device());
  }
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* const alias = schema.arguments()[i].alias_info();
    if (alias == nullptr || !alias->isWrite() || !arguments[i].isTensor()) continue;
    for (const at::Tensor& each : all) at::assert_no_partial_overlap(arguments[i].toTensor(), each);
  }
}

// The kernel of `op` for CUDA, whose arguments are on the stack.
void emulate(const OperatorHandle& op, Stack* stack) {
  const std::size_t count = op.schema().arguments().size();
  const std::vector<IValue> arguments(stack->end() - count, stack->end());
  torch::jit::drop(*stack, count);
  check_arguments(op, arguments);
  const bool now = looks(op, arguments);
  if (now) wait();
  std::vector<IValue> inferred;
  const Stack shapes = shapes_of(op, arguments, now, inferred);
  std::vector<IValue> results = results_of(op.schema(), shapes, arguments, inferred);
  const std::string name = toString(op.operator_name());
  enqueue(name.c_str(), work_of(op, arguments, results));
  if (now) wait();
  for (IValue& result : results) stack->push_back(std::move(result));
}

// ---- Operators of other kinds.

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (!self.is_cuda() || !source.is_cuda()) return at::native::copy_(self, source, non_blocking);
  Stack stack{self, source, non_blocking};
  static const OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  emulate(op, &stack);
  return self;
}

// `out`, which will be the first result of `op`.
at::Tensor enqueue_into(const at::Tensor& out, const char* op, const Stack& arguments) {
  const OperatorHandle handle = c10::Dispatcher::singleton().findSchemaOrThrow(op, "");
  check_arguments(handle, arguments);
  std::vector<IValue> results(handle.schema().returns().size(), at::Tensor());
  results[0] = out;
  enqueue(op, work_of(handle, arguments, results));
  return out;
}

// As cuDNN is called: channels last where an argument is, and the bias in a pass of its own.
// Without cuDNN neither.
at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  const bool cudnn = at::globalContext().userEnabledCuDNN();
  const bool last = cudnn && (x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                              weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
  at::Tensor shape;
  {
    const Alone alone;
    shape = at::convolution(to_meta(x), to_meta(weight), {}, stride, padding, dilation, transposed,
                            output_padding, groups);
  }
  const at::Tensor out =
      at::empty(shape.sizes(), x.options(),
                last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  enqueue_into(out, "aten::convolution",
               {x, weight, cudnn ? IValue() : IValue(bias), stride, padding, dilation, transposed,
                output_padding, groups});
  if (!cudnn || !bias || !bias->defined()) return out;
  std::vector<int64_t> of_channels(out.dim(), 1);
  of_channels[1] = -1;
  return out.add_(bias->reshape(of_channels));
}

// Attention that is one kernel on a GPU, whose output is (B, T, H, D) in memory.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const std::optional<at::Tensor>& bias, bool causal,
                     std::optional<double> scale) {
  const at::Tensor out =
      at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  return enqueue_into(out, "aten::_scaled_dot_product_attention_math",
                      {q, k, v, bias, 0.0, causal, IValue(), scale, false});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> efficient_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& bias, bool, double, bool causal, std::optional<double> scale) {
  return {attention(q, k, v, bias, causal, scale), {}, {}, {}};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor,
           at::Tensor, at::Tensor>
flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double, bool causal,
                bool, std::optional<double> scale) {
  return {attention(q, k, v, {}, causal, scale), {}, {}, {}, q.size(2), k.size(2), {}, {}, {}};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor,
           at::Tensor, at::Tensor>
cudnn_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const std::optional<at::Tensor>& bias, bool, double, bool causal, bool,
                std::optional<double> scale) {
  return {attention(q, k, v, bias, causal, scale), {}, {}, {}, q.size(2), k.size(2), {}, {}, {}};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& variance, bool training,
    double momentum, double epsilon) {
  const auto [y, saved_mean, saved_scale] =
      at::native_batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon);
  return {y, saved_mean, saved_scale, at::empty({0}, x.options().dtype(at::kByte))};
}

at::Tensor flatten_weights(at::TensorList weights, int64_t, c10::SymInt, int64_t, c10::SymInt,
                           c10::SymInt, int64_t, bool, bool) {
  return at::empty({0}, weights[0].options());  // an LSTM here takes them as they are
}

// ---- Which operators.

// Whether an operator is emulated: not what allocates, looks or makes views, which torch does on
// the host; nor what draws in ways of its own, which nobody here asks for.
bool is_ours(const OperatorHandle& op) {
  static const std::set<std::string> torchs = {"aten::empty",          "aten::empty_strided",
                                               "aten::resize_",        "aten::set_",
                                               "aten::is_set_to",      "aten::_local_scalar_dense",
                                               "aten::record_stream",  "aten::_efficientzerotensor",
                                               "aten::is_pinned",      "aten::_pin_memory",
                                               "aten::multinomial",    "aten::_fused_sdp_choice",
                                               "aten::_cudnn_rnn",     "aten::randperm",
                                               "aten::poisson",        "aten::binomial",
                                               "aten::native_dropout", "aten::_fused_dropout",
                                               "aten::bernoulli_",     "aten::random_",
                                               "aten::cauchy_",        "aten::log_normal_",
                                               "aten::geometric_",     "aten::normal"};
  const c10::FunctionSchema& schema = op.schema();
  if (torchs.count(schema.name()) != 0) return false;
  for (const c10::Argument& each : schema.returns()) {
    if (each.alias_info() != nullptr && !each.alias_info()->isWrite()) return false;  // a view
  }
  return true;
}

std::vector<std::unique_ptr<torch::Library>> libraries;

}  // namespace

// Replaces torch's kernels of these operators ("aten::add.Tensor") for CUDA.
extern "C" void emulate_operators(const char** names, int count) {
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten",
                                                       c10::DispatchKey::CUDA, __FILE__, __LINE__));
  torch::Library& library = *libraries.back();
  const std::set<std::string> own = {"aten::copy_",
                                     "aten::_scaled_dot_product_efficient_attention",
                                     "aten::_scaled_dot_product_flash_attention",
                                     "aten::_scaled_dot_product_cudnn_attention",
                                     "aten::exponential_",
                                     "aten::uniform_",
                                     "aten::normal_",
                                     "aten::cudnn_batch_norm",
                                     "aten::_cudnn_rnn_flatten_weight"};
  for (int i = 0; i < count; ++i) {
    const std::string name = names[i];
    if (name.rfind("aten::", 0) != 0) continue;
    const std::size_t dot = name.find('.');
    const auto op = c10::Dispatcher::singleton().findSchema(
        {name.substr(0, dot), dot == std::string::npos ? "" : name.substr(dot + 1)});
    if (!op || own.count(name) != 0 || !is_ours(*op)) continue;
    library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&emulate>());
  }
  // These choose a library's kernel.
  library.impl("convolution", &convolution);
  library.impl("lstm.input", torch::CppFunction::makeFromBoxedFunction<&emulate>());
  library.impl("_cudnn_rnn_flatten_weight", &flatten_weights);
  library.impl("cudnn_batch_norm", &batch_norm);
  library.impl("copy_", &copy_);
  library.impl("_scaled_dot_product_efficient_attention", &efficient_attention);
  library.impl("_scaled_dot_product_flash_attention", &flash_attention);
  library.impl("_scaled_dot_product_cudnn_attention", &cudnn_attention);
  library.impl("exponential_", &exponential_);
  library.impl("uniform_", &uniform_);
  library.impl("normal_", &normal_);
}

// Lets ops of ours run as their CPU op does, where the kernel, thread by thread, takes too long.
extern "C" void run_by_cpu_op(const char* name) {
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "chatterbox_fast",
                                                       c10::DispatchKey::CUDA, __FILE__, __LINE__));
  libraries.back()->impl(name, torch::CppFunction::makeFromBoxedFunction<&emulate>());
}
