"""onnxruntime as a contestant: a model of one BatchNormalization node, eval forward, NCHW only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .peers_native import optional
from .peers_problem import EPS, Array, Contestant, Problem, Result, repeated

__all__ = ["contestants", "version"]


def version() -> str:
    optional("onnx")
    return str(optional("onnxruntime").__version__)


def session(problem: Problem, shape: tuple[int, ...], threads: int) -> Any:
    onnxruntime, onnx = optional("onnxruntime"), optional("onnx")
    helper = onnx.helper
    parameters = {
        "scale": problem.weight,
        "B": problem.bias,
        "mean": problem.running_mean,
        "var": problem.running_var,
    }
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *parameters], ["y"], epsilon=EPS)],
        "batch_norm",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(value, name) for name, value in parameters.items()],
    )
    opset = [helper.make_opsetid("", 15)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads would otherwise spin on after a run and take the cores from whoever comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def contestants(problem: Problem, pass_name: str, threads: int) -> Iterator[Contestant]:
    if pass_name != "forward_eval" or problem.dtype_name != "float32":
        return
    x, out = problem.x("nchw"), problem.out("nchw")
    runner = session(problem, x.shape, threads)
    binding = runner.io_binding()
    ort_value = optional("onnxruntime").OrtValue.ortvalue_from_numpy
    for name, array, bind in (
        ("x", x, binding.bind_ortvalue_input),
        ("y", out, binding.bind_ortvalue_output),
    ):
        bind(name, ort_value(array))

    def run_out() -> None:
        runner.run_with_iobinding(binding)

    def result_out() -> Result:
        run_out()
        return Result("nchw", {"y": out})

    def run_fresh() -> Array:
        y: Array = runner.run(None, {"x": x})[0]
        return y

    def result_fresh() -> Result:
        return Result("nchw", {"y": run_fresh()})

    yield Contestant("onnxruntime", "nchw", "out", repeated(run_out), result_out)
    yield Contestant("onnxruntime", "nchw", "fresh", repeated(run_fresh), result_fresh)
