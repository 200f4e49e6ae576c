"""BatchNorm1d, BatchNorm2d and BatchNorm3d: layers with state, behaving as those of PyTorch."""

from __future__ import annotations

from numbabn.layer_base import BatchNormBase

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(BatchNormBase):
    """Batch normalization over input of shape (N, C) or (N, C, L), with state.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float
        Added to the variance.
    momentum : float or None
        Share of each batch in the running statistics. None makes them a plain average over all
        batches.
    affine : bool
        Whether there are a weight and a bias to learn.
    track_running_stats : bool
        Whether there are running statistics. Without them, eval too uses those of each batch.
    bias : bool
        Whether an affine layer has a bias.
    dtype : dtype
        Of weight, bias and running statistics: float32, float64, float16 or the bfloat16 of
        ml_dtypes. Half-precision input goes with float32 here or with its own dtype.
    channel_axis : int
        Which axis of the input holds the channels: 1 as in PyTorch, -1 for channels-last arrays.

    Attributes
    ----------
    weight, bias : ndarray of shape (C,), or None
        ``γ`` and ``β``; ones and zeros at first.
    running_mean, running_var : ndarray of shape (C,), or None
        Zeros and ones at first.
    num_batches_tracked : ndarray of int64, shape (), or None
        How many batches the running statistics have seen.
    weight_grad, bias_grad : ndarray of shape (C,), or None
        Sums of the gradients of all `backward` calls since `zero_grad`; None before the first.
    training : bool
        The mode, True at first; see `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        If an argument has another type, is negative where it must not be, or is not finite.

    Notes
    -----
    ``y = γ·(x - μ)/sqrt(v + eps) + β`` for each channel (Ioffe and Szegedy 2015, arXiv:1502.03167),
    with the batch's mean and biased variance in training and with the running ones in eval. The
    behaviour is that of ``torch.nn.BatchNorm1d``, and so are the names in `state_dict`.

    The layer keeps the input of its last forward call until the next, and `backward` may be called
    more than once in between. For inference, call ``layer(x, save=False)``, which keeps nothing and
    may also work in place (``out=x``). A layer that a network uses twice needs
    `numbabn.batch_norm_forward` and `numbabn.batch_norm_backward`, since only its last forward call
    can be carried back.

    Examples
    --------
    >>> import numpy as np
    >>> import numbabn
    >>> layer = numbabn.BatchNorm1d(2, eps=0.0, momentum=0.5)
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
    >>> layer(x).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> layer.running_mean.tolist(), layer.running_var.tolist()
    ([1.0, 10.0], [1.5, 100.5])
    >>> layer.backward(np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    >>> layer.weight_grad.tolist(), layer.bias_grad.tolist()
    ([-1.0, 0.0], [1.0, 0.0])
    >>> layer.eval()(x, save=False).shape
    (2, 2)
    """

    _ranks = (2, 3)


class BatchNorm2d(BatchNormBase):
    """Batch normalization over input of shape (N, C, H, W), with state.

    Parameters, attributes, errors and equations are those of `BatchNorm1d`; the behaviour is that
    of ``torch.nn.BatchNorm2d``.

    Examples
    --------
    >>> import numpy as np
    >>> import numbabn
    >>> layer = numbabn.BatchNorm2d(64)
    >>> layer
    BatchNorm2d(64, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    >>> x = np.random.default_rng(0).standard_normal((8, 64, 7, 7)).astype(np.float32)
    >>> y = layer(x, activation="relu")
    >>> grad_input = layer.backward(np.ones_like(y))
    >>> grad_input.shape, layer.weight_grad.shape
    ((8, 64, 7, 7), (64,))
    """

    _ranks = (4,)


class BatchNorm3d(BatchNormBase):
    """Batch normalization over input of shape (N, C, D, H, W), with state.

    Parameters, attributes, errors and equations are those of `BatchNorm1d`; the behaviour is that
    of ``torch.nn.BatchNorm3d``.

    Examples
    --------
    >>> import numpy as np
    >>> import numbabn
    >>> layer = numbabn.BatchNorm3d(3, channel_axis=-1).eval()
    >>> layer(np.ones((2, 4, 5, 6, 3), np.float32)).shape
    (2, 4, 5, 6, 3)
    """

    _ranks = (5,)
