// oneDNN's batch normalization behind four C functions, so that benchmarks/peers_onednn.py can call
// it through ctypes. A handle holds one primitive over memory that the caller owns; bn_run executes
// it `reps` times in C++, as oneDNN's own users would, with no Python between two calls.
// Written for oneDNN 2.x and 3.x, which differ in how a primitive descriptor is made and in whether
// weight and bias are one array (2.x) or two (3.x).
//
//   g++ -O2 -fopenmp -shared -fPIC onednn_harness.cpp -ldnnl

#include <omp.h>

#include <cstdint>
#include <exception>
#include <string>
#include <unordered_map>

#include <oneapi/dnnl/dnnl.hpp>

using dnnl::memory;
using dnnl::normalization_flags;
using dnnl::prop_kind;
using Forward = dnnl::batch_normalization_forward;
using Backward = dnnl::batch_normalization_backward;

namespace {

enum Pass { forward_train, forward_eval, backward_train, backward_eval };

constexpr memory::format_tag layouts[]
        = {memory::format_tag::nchw, memory::format_tag::nhwc, memory::format_tag::nChw16c,
                memory::format_tag::nc};
constexpr memory::data_type dtypes[]
        = {memory::data_type::f32, memory::data_type::bf16, memory::data_type::f16};

thread_local std::string last_error;

// Every array a pass may touch; a pass leaves the ones it does not need null.
struct Buffers {
    void *src, *dst;              // x (N, C, H, W) and y
    float *weight_bias;           // (2, C): weight, then bias
    float *mean, *var;            // (C,): read in eval, written in training
    void *diff_dst, *diff_src;    // dy and dx
    float *diff_weight_bias;      // (2, C): dweight, then dbias
};

using Args = std::unordered_map<int, memory>;

memory per_channel(const dnnl::engine &engine, memory::dim C, float *values) {
    return memory({{C}, memory::data_type::f32, memory::format_tag::x}, engine, values);
}

// What differs between the major versions.
#if DNNL_VERSION_MAJOR >= 3

const auto with_weight_bias = normalization_flags::use_scale | normalization_flags::use_shift;

Forward::primitive_desc describe_forward(const dnnl::engine &engine, prop_kind kind,
        const memory::desc &data, float eps, normalization_flags flags) {
    return {engine, kind, data, data, eps, flags};
}

Backward::primitive_desc describe_backward(const dnnl::engine &engine, const memory::desc &data,
        float eps, normalization_flags flags, const Forward::primitive_desc &forward) {
    return {engine, prop_kind::backward, data, data, data, eps, flags, forward};
}

// 3.x refuses arguments that a primitive has no use for: the bias, in the backward pass.
void add_weight_bias(Args &args, const dnnl::engine &engine, memory::dim C, const Buffers &b,
        bool backward) {
    args[DNNL_ARG_SCALE] = per_channel(engine, C, b.weight_bias);
    if (!backward) {
        args[DNNL_ARG_SHIFT] = per_channel(engine, C, b.weight_bias + C);
        return;
    }
    args[DNNL_ARG_DIFF_SCALE] = per_channel(engine, C, b.diff_weight_bias);
    args[DNNL_ARG_DIFF_SHIFT] = per_channel(engine, C, b.diff_weight_bias + C);
}

#else

const auto with_weight_bias = normalization_flags::use_scale_shift;

Forward::primitive_desc describe_forward(const dnnl::engine &engine, prop_kind kind,
        const memory::desc &data, float eps, normalization_flags flags) {
    return {{kind, data, eps, flags}, engine};
}

Backward::primitive_desc describe_backward(const dnnl::engine &engine, const memory::desc &data,
        float eps, normalization_flags flags, const Forward::primitive_desc &forward) {
    return {{prop_kind::backward, data, data, eps, flags}, engine, forward};
}

void add_weight_bias(Args &args, const dnnl::engine &engine, memory::dim C, const Buffers &b,
        bool backward) {
    const memory::desc both({2, C}, memory::data_type::f32, memory::format_tag::nc);
    args[DNNL_ARG_SCALE_SHIFT] = memory(both, engine, b.weight_bias);
    if (backward) args[DNNL_ARG_DIFF_SCALE_SHIFT] = memory(both, engine, b.diff_weight_bias);
}

#endif

struct BatchNorm {
    dnnl::engine engine {dnnl::engine::kind::cpu, 0};
    dnnl::stream stream {engine};
    dnnl::primitive primitive;
    Args args;
    std::string impl;

    BatchNorm(int pass, const memory::desc &data, memory::dim C, float eps, const Buffers &b) {
        const bool eval = pass == forward_eval || pass == backward_eval;
        const bool backward = pass == backward_train || pass == backward_eval;
        auto flags = with_weight_bias;
        if (eval) flags = flags | normalization_flags::use_global_stats;
        const auto kind = pass == forward_eval ? prop_kind::forward_inference
                                               : prop_kind::forward_training;
        const auto forward = describe_forward(engine, kind, data, eps, flags);
        args[DNNL_ARG_SRC] = memory(data, engine, b.src);
        args[DNNL_ARG_MEAN] = per_channel(engine, C, b.mean);
        args[DNNL_ARG_VARIANCE] = per_channel(engine, C, b.var);
        add_weight_bias(args, engine, C, b, backward);
        if (backward) {
            const auto descriptor = describe_backward(engine, data, eps, flags, forward);
            args[DNNL_ARG_DIFF_DST] = memory(data, engine, b.diff_dst);
            args[DNNL_ARG_DIFF_SRC] = memory(data, engine, b.diff_src);
            impl = descriptor.impl_info_str();
            primitive = Backward(descriptor);
        } else {
            args[DNNL_ARG_DST] = memory(data, engine, b.dst);
            impl = forward.impl_info_str();
            primitive = Forward(forward);
        }
    }
};

}  // namespace

extern "C" {

const char *bn_error() { return last_error.c_str(); }

void bn_version(int *major, int *minor, int *patch) {
    const dnnl::version_t *v = dnnl::version();
    *major = v->major;
    *minor = v->minor;
    *patch = v->patch;
}

// shape: N, C and, for rank 4, H, W. Returns null on failure; bn_error() then says why.
void *bn_create(int pass, int layout, int dtype, const int64_t *shape, int rank,
        float eps, const Buffers *buffers) {
    try {
        const memory::desc data(
                memory::dims(shape, shape + rank), dtypes[dtype], layouts[layout]);
        return new BatchNorm(pass, data, shape[1], eps, *buffers);
    } catch (const std::exception &e) {
        last_error = e.what();
        return nullptr;
    }
}

const char *bn_impl(void *handle) { return static_cast<BatchNorm *>(handle)->impl.c_str(); }

// The thread count is OpenMP's own per-process setting, so it is set anew for every timing.
int bn_run(void *handle, int64_t reps, int threads) {
    auto *bn = static_cast<BatchNorm *>(handle);
    try {
        omp_set_num_threads(threads);
        for (int64_t i = 0; i < reps; ++i) {
            bn->primitive.execute(bn->stream, bn->args);
            bn->stream.wait();
        }
        return 0;
    } catch (const std::exception &e) {
        last_error = e.what();
        return 1;
    }
}

void bn_destroy(void *handle) { delete static_cast<BatchNorm *>(handle); }
}
