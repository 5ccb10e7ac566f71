// Kernels for training on CPUs.

#include "batch_norm.h"
#include "depthwise.h"
#include "xla/ffi/api/ffi.h"

#define BIND() ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define ARGS_2 Arg<Floats>().Arg<Floats>()
#define ARGS_3 ARGS_2.Arg<Floats>()
#define RETS_3 Ret<Floats>().Ret<Floats>().Ret<Floats>()
#define WINDOW \
  Attr<int64_t>("strides").Attr<int64_t>("top").Attr<int64_t>("left")
#define NORM Attr<float>("epsilon").Attr<int64_t>("activation")

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_depthwise, Forward,
                              BIND().ARGS_2.Ret<Floats>().WINDOW);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_depthwise_input_gradient, InputGradient,
                              BIND().ARGS_2.Ret<Floats>().WINDOW);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dynconv_depthwise_kernel_gradient, KernelGradient,
    BIND().ARGS_2.Ret<Floats>().Ret<Floats>().WINDOW);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_batch_norm, BatchNorm,
                              BIND().ARGS_3.RETS_3.NORM);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_batch_norm_gradient, BatchNormGradient,
                              BIND().ARGS_3.ARGS_3.RETS_3.NORM);
