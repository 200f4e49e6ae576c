"""What layers with state do, whatever the rank of their input.

A layer holds weight, bias and running statistics, decides from its mode what `numbabn.functional`
is to do, and keeps what its last forward pass saved until `backward` wants it. There is no
automatic differentiation: call `backward` yourself, in reverse order of the forward calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from numbabn import checks
from numbabn.backends import device
from numbabn.backward import batch_norm_backward
from numbabn.functional import batch_norm, batch_norm_forward
from numbabn.inference import fold_scale_shift
from numbabn.state import IncompatibleKeys, load_state

_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_Self = TypeVar("_Self", bound="BatchNormBase")


class BatchNormBase:
    """What the three layers of `layers` share; they differ in the axes that they accept."""

    _ranks: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        channel_axis: int = 1,
    ) -> None:
        self.num_features = C = checks.integer("num_features", num_features)
        self.channel_axis = checks.integer("channel_axis", channel_axis)
        if C < 0:
            raise ValueError(f"num_features: expected 0 or more, got {C}")
        checks.not_negative("eps", eps)
        if momentum is not None:
            checks.real("momentum", momentum)
        self.dtype = np.dtype(dtype)
        if not checks.is_floating(self.dtype):
            raise TypeError(f"dtype: expected {checks.FLOATS}, got {self.dtype}")
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = bool(affine), bool(track_running_stats)
        self.training = True

        # Any, not ndarray: a user may put arrays of another library here.
        self.weight: Any = np.ones(C, self.dtype) if affine else None
        self.bias: Any = np.zeros(C, self.dtype) if affine and bias else None
        self.running_mean: Any = np.zeros(C, self.dtype) if track_running_stats else None
        self.running_var: Any = np.ones(C, self.dtype) if track_running_stats else None
        self.num_batches_tracked: Any = np.zeros((), np.int64) if track_running_stats else None
        self.weight_grad: Any = None
        self.bias_grad: Any = None
        self._saved: Any = None

    def train(self: _Self, mode: bool = True) -> _Self:
        """Normalize with the statistics of each batch, and track them.

        Parameters
        ----------
        mode : bool
            False does what `eval` does.

        Returns
        -------
        The layer itself.

        Raises
        ------
        TypeError
            If ``mode`` is not a bool.
        """
        if not isinstance(mode, (bool, np.bool_)):
            raise TypeError(f"mode: expected a bool, got {type(mode).__name__}")
        self.training = bool(mode)
        return self

    def eval(self: _Self) -> _Self:
        """Normalize with the running statistics, and leave them alone.

        A layer without running statistics normalizes with those of each batch in both modes.

        Returns
        -------
        The layer itself.
        """
        return self.train(False)

    def forward(
        self,
        x: Any,
        *,
        activation: str | None = None,
        residual: Any = None,
        out: Any = None,
        stream: Any = None,
        save: bool = True,
    ) -> Any:
        """Normalize ``x`` in the layer's mode; ``layer(x)`` is the same.

        Parameters
        ----------
        x : array
            Input, with ``num_features`` channels on axis ``channel_axis``. BatchNorm1d takes 2 or 3
            axes, BatchNorm2d takes 4 and BatchNorm3d takes 5.
        activation : {None, "relu"}
            Applied last, in the same pass over memory.
        residual : array of the shape and dtype of x, or None
            Added before the activation. `backward` then returns its gradient too.
        out : array of the shape, dtype and layout of x, or None
            Where to write the output. It may be ``x`` itself only with ``save=False``.
        stream
            CUDA stream, for arrays on a GPU.
        save : bool
            Whether to keep what `backward` needs, which holds ``x`` in memory until the next call.
            For inference, pass False.

        Returns
        -------
        y : array of the shape, dtype and layout of x

        Raises
        ------
        TypeError
            If an argument has a type or dtype that is not supported.
        ValueError
            If a shape does not fit, or a batch in training has one value per channel. The running
            statistics and ``out`` are then as before.

        Notes
        -----
        In training, ``running ← (1-momentum)·running + momentum·batch``, with the unbiased
        variance; with ``momentum=None`` the factor is ``1/num_batches_tracked``, which makes the
        running statistics the plain average over all batches (PyTorch, ``torch.nn.BatchNorm2d``).
        """
        if not hasattr(x, "shape"):
            x = np.asarray(x)
        self._check_shape(x.shape)
        tracking = self.training and self.track_running_stats
        counting = tracking and self.num_batches_tracked is not None
        momentum = self.momentum
        if momentum is None:
            # One over the count with this batch, which is only counted once it has gone through.
            momentum = 1.0 / (int(self.num_batches_tracked) + 1) if counting else 0.0
        no_stats = self.running_mean is None and self.running_var is None
        use_stats = tracking or not self.training
        arguments = (
            x,
            self.running_mean if use_stats else None,
            self.running_var if use_stats else None,
            self.weight,
            self.bias,
            self.training or no_stats,
            momentum,
            self.eps,
        )
        options = {
            "channel_axis": self.channel_axis,
            "activation": activation,
            "residual": residual,
            "out": out,
            "stream": stream,
        }
        # First let go of the last call's input: its memory can serve for this call's output.
        self._saved = None
        if save:
            y, self._saved = batch_norm_forward(*arguments, **options)
        else:
            y = batch_norm(*arguments, **options)
        if counting:
            self.num_batches_tracked[...] += 1
        return y

    def __call__(self, x: Any, **options: Any) -> Any:
        """Do what `forward` does."""
        return self.forward(x, **options)

    def backward(self, grad_output: Any, *, out: Any = None, stream: Any = None) -> Any:
        """Carry a gradient back through the last forward call, in the mode that it ran in.

        The gradients of weight and bias are added to ``weight_grad`` and ``bias_grad``, in both
        modes, until `zero_grad` clears them.

        Parameters
        ----------
        grad_output : array of the shape and dtype of y
            Gradient of the loss with respect to the output.
        out : array of the shape, dtype and layout of x, or None
            Where to write ``grad_input``.
        stream
            CUDA stream, for arrays on a GPU.

        Returns
        -------
        grad_input : array of the shape, dtype and layout of x
        grad_residual : array of the shape and dtype of x
            Only when the forward call had a residual: the two then come as a tuple.

        Raises
        ------
        RuntimeError
            If there was no forward call, or the last one had ``save=False``.
        TypeError, ValueError
            If ``grad_output`` or ``out`` does not fit the forward call, or what was put in place
            of ``weight_grad`` or ``bias_grad`` cannot take a gradient.
        """
        if self._saved is None:
            raise RuntimeError(
                "backward: expected a forward call before it, one that saves what backward needs"
            )
        needs = (True, self.weight is not None, self.bias is not None)
        for name in ("weight_grad", "bias_grad"):
            self._check_total(name, grad_output, stream)
        grads = batch_norm_backward(grad_output, self._saved, needs=needs, out=out, stream=stream)
        grad_input, grad_weight, grad_bias = grads[:3]
        if grad_weight is not None:
            self._accumulate("weight_grad", grad_weight, grad_output, stream)
        if grad_bias is not None:
            self._accumulate("bias_grad", grad_bias, grad_output, stream)
        return (grad_input, grads[3]) if len(grads) == 4 else grad_input

    def zero_grad(self) -> None:
        """Forget the gradients: ``weight_grad`` and ``bias_grad`` become None, as in PyTorch."""
        self.weight_grad = None
        self.bias_grad = None

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0 and variance 1, with no batch tracked."""
        self._fill(running_mean=0, running_var=1, num_batches_tracked=0)

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the running statistics as `reset_running_stats` does."""
        self._fill(running_mean=0, running_var=1, num_batches_tracked=0, weight=1, bias=0)

    def state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Everything that training changes, under PyTorch's names.

        Parameters
        ----------
        prefix : str
            Put before each key, for example ``"bn1."``.

        Returns
        -------
        dict of str to array
            Copies of ``weight``, ``bias``, ``running_mean``, ``running_var`` (each of shape (C,))
            and ``num_batches_tracked`` (int64, shape ()), as far as the layer has them. Copies of
            CUDA arrays stay on their device.
        """
        return {
            prefix + name: device().copied(a, name) if checks.is_cuda(a) else a.copy()
            for name, a in self._state().items()
        }

    def load_state_dict(
        self, state: Mapping[str, Any], prefix: str = "", strict: bool = True
    ) -> IncompatibleKeys:
        """Copy values into the layer's own arrays: all of them, or after an error none.

        Parameters
        ----------
        state : mapping of str to array_like
            What `state_dict` gives, here or in PyTorch. The values may be anything that
            `numpy.asarray` takes, and PyTorch tensors on any device. For CUDA arrays of the layer,
            CUDA arrays on the same device, or host values if the layer's library copies those.
        prefix : str
            Only keys that begin with it are looked at. With ``"bn1."``, one layer takes its part of
            the state of a whole network.
        strict : bool
            Whether missing and unexpected keys are errors. ``num_batches_tracked`` may always be
            missing, and then stays as it is: checkpoints from before PyTorch 0.4.1 lack it.

        Returns
        -------
        IncompatibleKeys
            ``(missing_keys, unexpected_keys)``, both empty when ``strict``.

        Raises
        ------
        TypeError
            If ``state`` is not a mapping, or a value does not hold real numbers.
        ValueError
            If a shape does not fit, or ``num_batches_tracked`` is not a whole number; with
            ``strict``, if keys are missing or unexpected, all of which the message names.
        """
        return load_state(self._state(), state, prefix, strict, optional=("num_batches_tracked",))

    def fold(self) -> tuple[Any, Any]:
        """Scale and shift that do in eval mode what the layer does: ``y = x·scale + shift``.

        Returns
        -------
        scale, shift : array of the layer's dtype, shape (C,), where the statistics are
            Computed in float64 from the running statistics; see `numbabn.fold_scale_shift`.

        Raises
        ------
        ValueError
            If the layer tracks no running statistics.
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("running_mean, running_var: expected arrays to fold, got None")
        if checks.is_cuda(self.running_mean):
            there: tuple[Any, Any] = device().fold_scale_shift(
                self.running_mean, self.running_var, self.weight, self.bias, self.eps,
                self.dtype.name,
            )  # fmt: skip
            return there
        scale, shift = fold_scale_shift(
            self.running_mean, self.running_var, self.weight, self.bias, self.eps
        )
        with np.errstate(over="ignore"):  # a scale beyond the range of a half type is infinite
            return scale.astype(self.dtype), shift.astype(self.dtype)

    def _state(self) -> dict[str, Any]:
        """The arrays that make up the state, by name and in PyTorch's order."""
        arrays = {name: getattr(self, name) for name in _STATE}
        return {name: array for name, array in arrays.items() if array is not None}

    def _fill(self, **values: int) -> None:
        arrays = {name: array for name, array in self._state().items() if name in values}
        there = {name: array for name, array in arrays.items() if checks.is_cuda(array)}
        if there:  # first, since it may find that an array is read-only
            device().fill({name: (array, values[name]) for name, array in there.items()})
        for name in arrays.keys() - there.keys():
            arrays[name][...] = values[name]

    def _check_total(self, name: str, grad_output: Any, stream: Any) -> None:
        """Refuse what a gradient cannot be added to, before anything is written."""
        total, on_host = getattr(self, name), isinstance(self._saved.table, np.ndarray)
        if total is None:
            return
        if checks.is_cuda(total) == on_host:
            kinds = ("CUDA", "NumPy") if on_host else ("NumPy", "CUDA")
            raise TypeError(
                f"{name}: got a {kinds[0]} array, expected a {kinds[1]} array like the "
                "input; call zero_grad() when the layer moves"
            )
        if on_host:
            checks.writable(name, total)
            checks.per_channel(name, total, self.num_features)
        else:
            device().check_total(grad_output, name, total, self.num_features, stream)

    def _accumulate(self, name: str, grad: Any, grad_output: Any, stream: Any) -> None:
        """Add ``grad`` to a total in place, so that an optimizer may hold on to the array."""
        total = getattr(self, name)
        if total is None:
            setattr(self, name, grad)
        elif isinstance(grad, np.ndarray):
            with np.errstate(over="ignore", invalid="ignore"):  # infinities are values
                total += grad
        else:
            device().add(grad_output, name, total, grad, stream)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse an input of another rank or channel count; the rest is checked further down."""
        if self._ranks and len(shape) not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"x: expected {expected} input, got {len(shape)}D, shape {shape}")
        # Without parameters and statistics nothing further down knows the number of channels.
        channels = shape[checks.axis(self.channel_axis, len(shape))]
        if channels != self.num_features:
            raise ValueError(
                f"x: expected {self.num_features} channels on axis {self.channel_axis}, "
                f"got shape {shape}"
            )

    def __repr__(self) -> str:
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )
        if self.dtype != np.float32:
            text += f", dtype={self.dtype}"
        if self.channel_axis != 1:
            text += f", channel_axis={self.channel_axis}"
        return f"{type(self).__name__}({text})"

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, which do not drag along the input of the last forward."""
        return {**self.__dict__, "_saved": None}
