// Kernels for training on CPUs.

#include "batch_norm.h"
#include "depthwise.h"
#include "xla/ffi/api/ffi.h"

#define BIND() ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define ARGS_2 Arg<Floats>().Arg<Floats>()
#define RETS_2 Ret<Floats>().Ret<Floats>()
#define WINDOW \
  Attr<int64_t>("strides").Attr<int64_t>("top").Attr<int64_t>("left")

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_depthwise, Forward,
                              BIND().ARGS_2.Ret<Floats>().WINDOW);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_depthwise_input_gradient, InputGradient,
                              BIND().ARGS_2.Ret<Floats>().WINDOW);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dynconv_depthwise_kernel_gradient, KernelGradient,
    BIND().ARGS_2.RETS_2.WINDOW);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_moments, Moments,
                              BIND().Arg<Floats>().RETS_2);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dynconv_batch_norm_sums, BatchNormSums,
    BIND().ARGS_2.ARGS_2.Arg<Floats>().RETS_2.Attr<int64_t>("activation"));
