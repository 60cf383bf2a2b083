"""As much of PyTorch as the official SDK needs for losses of one's own, over NumPy.

PyTorch takes gigabytes to install, so most test environments have none; `sdk_custom_loss.py` puts this module in
its place there. Where both are at hand the test compares them. Arithmetic is in the dtype of the operands,
float32 for log-probabilities, as PyTorch's.
"""

from types import SimpleNamespace

import numpy as np

__version__ = "stand-in"
float32, int64, bfloat16 = (
    SimpleNamespace(name=name, is_floating_point=name != "int64") for name in ("float32", "int64", "bfloat16")
)


def _fit(gradient, shape):
    """Sums a gradient over the axes along which its operand was repeated."""
    while gradient.ndim > len(shape):
        gradient = gradient.sum(0)
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)
    return gradient.sum(repeated, keepdims=True) if repeated else gradient


class Tensor:
    """An array, and how its gradient goes on to what it was computed from."""

    def __init__(self, array, parents=()):
        self._array = array
        # Pairs of a tensor and a function from the gradient here to that tensor's.
        self._parents = parents
        self.requires_grad = any(parent.requires_grad for parent, _ in parents)
        self.grad = None

    dtype = property(lambda self: int64 if self._array.dtype.kind == "i" else float32)
    shape = property(lambda self: self._array.shape)
    ndim = property(lambda self: self._array.ndim)

    def __len__(self):
        return len(self._array)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        def back(gradient):
            whole = np.zeros_like(self._array)
            whole[index] = gradient
            return whole

        return Tensor(np.asarray(self._array[index]), [(self, back)])

    def __add__(self, other):
        return _binary(self, other, np.add, lambda g, a, b: g, lambda g, a, b: g)

    def __sub__(self, other):
        return _binary(self, other, np.subtract, lambda g, a, b: g, lambda g, a, b: -g)

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        return _binary(self, other, np.multiply, lambda g, a, b: g * b, lambda g, a, b: g * a)

    def __truediv__(self, other):
        return _binary(self, other, np.divide, lambda g, a, b: g / b, lambda g, a, b: -g * a / (b * b))

    def __neg__(self):
        return Tensor(-self._array, [(self, np.negative)])

    __radd__, __rmul__ = __add__, __mul__

    def sum(self):
        return Tensor(self._array.sum(), [(self, lambda g: np.broadcast_to(g, self.shape))])

    def mean(self):
        return self.sum() / self._array.size

    def reshape(self, shape):
        return Tensor(self._array.reshape(shape), [(self, lambda g: g.reshape(self.shape))])

    def clone(self):
        return Tensor(self._array.copy(), [(self, lambda g: g)])

    def detach(self):
        return Tensor(self._array)

    def requires_grad_(self, requires_grad=True):
        self.requires_grad = requires_grad
        return self

    def contiguous(self):
        return self

    def numpy(self):
        return np.ascontiguousarray(self._array)

    def item(self):
        return self._array.item()

    def backward(self):
        """Adds the derivative of this scalar to `grad` of every leaf it depends on."""
        if self._array.size != 1 or not self.requires_grad:
            raise RuntimeError("only a scalar that depends on a leaf has a derivative here")
        gradients = {self: np.ones_like(self._array)}
        for tensor in reversed(_in_order(self)):
            gradient = gradients.pop(tensor)
            if not tensor._parents:
                before = 0 if tensor.grad is None else tensor.grad._array
                tensor.grad = Tensor(np.asarray(before + gradient))
            for parent, back in tensor._parents:
                if parent.requires_grad:
                    share = back(gradient)
                    gradients[parent] = gradients[parent] + share if parent in gradients else share


def _in_order(tensor):
    """The tensors that a derivative goes through, each after those it was computed from."""
    order, seen = [], set()

    def visit(tensor):
        if tensor.requires_grad and tensor not in seen:
            seen.add(tensor)
            for parent, _ in tensor._parents:
                visit(parent)
            order.append(tensor)

    visit(tensor)
    return order


def _binary(left, right, operate, back_left, back_right):
    if not isinstance(right, Tensor):
        right = Tensor(np.asarray(right, left._array.dtype))
    a, b = left._array, right._array
    parents = [
        (left, lambda g: _fit(back_left(g, a, b), a.shape)),
        (right, lambda g: _fit(back_right(g, a, b), b.shape)),
    ]
    return Tensor(np.asarray(operate(a, b)), parents)


def tensor(data, dtype=None):
    array = np.array(data)
    return Tensor(array if dtype is int64 or array.dtype.kind == "i" else array.astype(np.float32))


def stack(tensors):
    backs = [(tensor, lambda g, i=i: g[i]) for i, tensor in enumerate(tensors)]
    return Tensor(np.stack([tensor._array for tensor in tensors]), backs)


def logsigmoid(x):
    """ln(1 / (1 + exp(-x))) without overflow; its derivative is 1 / (1 + exp(x))."""
    a = x._array
    value = np.minimum(a, 0) - np.log1p(np.exp(-np.abs(a)))
    return Tensor(value, [(x, lambda g: g * np.exp(value - a))])


nn = SimpleNamespace(functional=SimpleNamespace(logsigmoid=logsigmoid))
