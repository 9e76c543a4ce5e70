"""A connection's products as autograd functions that keep the state and the sublayer's output, and nothing else.

    coefficients [n, m + n + m] = (read | carry | write) = scale ∘ tanh(P) + bias
    P = (h · weight) / rms(h)          weight [d, m + n + m]: norm weight ∘ proj / sqrt(d), so no normed state is made
    read:   x = readᵀ h                write:   h' = write z + carryᵀ h

The coefficients are made once in the forward pass and again in the backward pass. The carried state never exists
between read and write, and the state has one gradient, which `write` begins and `read` adds to. On a CPU the tokens
are taken in blocks, whose float32 values stay in its cache.

Plain torch. Letters: T tokens, m segments, n slots, d width of a slot, k columns of the coefficients.
`hyper_connections` states what is computed; tests hold it to a loop over tokens, slots and targets.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

BLOCK = 2**19  # values in a block of tokens: the state and three times its coefficients


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off, where it is on; the meta device has none."""
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def in_full_precision(backward: Callable) -> Callable:
    """A function's backward, without autocast also where `Tensor.backward` is called under it."""

    @wraps(backward)
    def wrapped(ctx, gradient: Tensor, *others):
        with without_autocast(gradient.device.type):
            return backward(ctx, gradient, *others)

    return wrapped


class Maps(NamedTuple):
    """What coefficients are made from. weight [d, k] and scale [n, k] are None where they do not depend on the token.

    The weight lies in memory column by column: products with few columns are several times as fast so.
    """

    weight: Tensor | None
    scale: Tensor | None
    bias: Tensor  # [n, k]
    eps: float | Tensor
    segments: int
    retract: Callable[[Tensor], Tensor] | None = None  # of the carry [..., n, n]

    @property
    def carries(self) -> bool:
        """Whether there is a carry; without one slots are carried on unchanged."""
        return self.bias.shape[1] > 2 * self.segments


def blocks(slots: Tensor, maps: Maps) -> Iterator[slice]:
    """Slices of the tokens of a state [T, n, d]: of cache size on a CPU; all at once elsewhere, and when traced."""
    tokens, size = len(slots), len(slots)
    if slots.device.type == "cpu" and type(slots) is Tensor and not torch.compiler.is_compiling():
        size = BLOCK // (slots.shape[1] * (slots.shape[2] + 3 * maps.bias.shape[1]))
    return (slice(start, start + size) for start in range(0, tokens, max(1, size)))


class Coefficients:
    """Coefficients [T, n, k] of slots [T, n, d], with what their gradient needs."""

    def __init__(self, slots: Tensor, weight: Tensor | None, scale: Tensor | None, bias: Tensor, eps: float | Tensor):
        self.slots, self.weight, self.scale = slots, weight, scale
        if weight is None:
            self.values = bias.expand(len(slots), *bias.shape)
            return
        mean_square = torch.linalg.vector_norm(slots, dim=-1, keepdim=True).square() / slots.shape[-1]
        self.inverse_rms = torch.rsqrt(mean_square + eps)  # [T, n, 1]
        self.logits = project(slots, weight).mul_(self.inverse_rms)  # P
        self.tanh = torch.tanh(self.logits)
        self.values = torch.addcmul(bias, scale, self.tanh)

    def backward(self, gradient: Tensor, slots_gradient: Tensor, totals: "Totals", columns: slice) -> None:
        """Add to the gradients of the slots [T, n, d] and of the parameters, from that of the values [T, n, k]."""
        totals.bias[:, columns] += gradient.sum(0)
        if self.weight is None:
            return
        by_tanh = gradient * self.tanh
        totals.scale[:, columns] += by_tanh.sum(0)
        gradient = torch.addcmul(gradient, by_tanh, self.tanh, value=-1).mul_(self.scale)  # of P
        # P depends on the slots through 1/rms too: d(1/rms) = −slots / (d · rms³)
        shrink = (gradient * self.logits).sum(-1, keepdim=True).mul_(self.inverse_rms.square()) / self.slots.shape[-1]
        gradient = gradient.mul_(self.inverse_rms).flatten(0, 1)  # of slots · weight
        totals.weight[:, columns] += (gradient.mT @ self.slots.flatten(0, 1)).mT
        slots_gradient.view(-1, self.slots.shape[-1]).addmm_(gradient, self.weight.mT)
        slots_gradient.addcmul_(shrink, self.slots, value=-1)


def project(slots: Tensor, weight: Tensor) -> Tensor:
    """slots · weight.  [T, n, d], [d, k] -> [T, n, k]"""
    if weight.shape[1] >= 16:
        return linear(slots, weight.mT)
    # BLAS takes few rows faster than few columns
    return (weight.mT @ slots.flatten(0, 1).mT).mT.contiguous().view(*slots.shape[:2], -1)


class Totals:
    """Gradients of the parameters, added up over blocks."""

    def __init__(self, maps: Maps):
        self.bias = torch.zeros_like(maps.bias)
        self.scale, self.weight = (None if x is None else torch.zeros_like(x) for x in (maps.scale, maps.weight))


def columns_of(maps: Maps, columns: slice) -> tuple:
    """weight, scale, bias of some columns, and eps."""
    cut = (None if parameter is None else parameter[:, columns] for parameter in maps[:3])
    return (*cut, maps.eps)


class Read(torch.autograd.Function):
    """slots [T, n, d] -> input [T, m, d]; carry and write [T, n, n + m], without gradient; slots, for `Write`."""

    @staticmethod
    def forward(ctx, slots: Tensor, *maps):
        maps = Maps(*maps)
        ctx.save_for_backward(slots, *maps[:3])
        ctx.rest = maps[3:]
        m, wide = maps.segments, maps.bias.dtype
        inputs = slots.new_empty(len(slots), m, slots.shape[2])
        rest = maps.bias.new_empty(len(slots), len(maps.bias), maps.bias.shape[1] - m)
        for tokens in blocks(slots, maps):
            block = slots[tokens].to(wide)
            values = Coefficients(block, *columns_of(maps, slice(None))).values
            put_product(inputs[tokens], values[..., :m].mT, block)
            rest[tokens] = values[..., m:]
        ctx.mark_non_differentiable(rest)
        return inputs, rest, slots.view_as(slots)

    @staticmethod
    @once_differentiable
    @in_full_precision
    def backward(ctx, inputs_gradient, _, slots_gradient):
        slots, *parameters = ctx.saved_tensors
        maps = Maps(*parameters, *ctx.rest)
        totals, columns = Totals(maps), slice(0, maps.segments)
        begun = slots_gradient is not None
        result = slots_gradient if begun else torch.empty_like(slots)
        for tokens in blocks(slots, maps):
            block, gradient = slots[tokens].to(maps.bias.dtype), inputs_gradient[tokens].to(maps.bias.dtype)
            read, target = Coefficients(block, *columns_of(maps, columns)), result[tokens].to(block.dtype)
            put_product(target, read.values, gradient, target if begun else None)
            read.backward(outer(block, gradient), target, totals, columns)
            put(result[tokens], target)
        return result, totals.weight, totals.scale, totals.bias, None, None, None


class Write(torch.autograd.Function):
    """slots [T, n, d], output [T, m, d], carry and write as `Read` gave them -> slots [T, n, d] after the sublayer."""

    @staticmethod
    def forward(ctx, slots: Tensor, output: Tensor, coefficients: Tensor, *maps):
        maps = Maps(*maps)
        ctx.save_for_backward(slots, output, *maps[:3])
        ctx.rest = maps[3:]
        wide, result = maps.bias.dtype, torch.empty_like(slots)
        for tokens in blocks(slots, maps):
            carry, write = split(coefficients[tokens], maps)
            block, written = slots[tokens].to(wide), output[tokens].to(wide)
            if carry is None:
                put_product(result[tokens], write, written, block)
            else:
                # the carry's product is the larger one; adding to it in place costs no pass of its own
                put_product(result[tokens], retracted(carry, maps).mT, block, product(write, written))
        return result

    @staticmethod
    @once_differentiable
    @in_full_precision
    def backward(ctx, gradient):
        slots, output, *parameters = ctx.saved_tensors
        maps = Maps(*parameters, *ctx.rest)
        wide, totals, columns = maps.bias.dtype, Totals(maps), slice(maps.segments, None)
        slots_gradient, output_gradient = torch.empty_like(slots), torch.empty_like(output)
        for tokens in blocks(slots, maps):
            block, after = slots[tokens].to(wide), gradient[tokens].to(wide)
            made, target = Coefficients(block, *columns_of(maps, columns)), slots_gradient[tokens].to(wide)
            carry, write = split(made.values, maps)
            put_product(output_gradient[tokens], write.mT, after)
            of_values = outer(after, output[tokens].to(wide))
            if carry is None:
                target.copy_(after)
            else:
                of_values = torch.cat([through_carry(carry, block, after, target, maps), of_values], -1)
            made.backward(of_values, target, totals, columns)
            put(slots_gradient[tokens], target)
        return slots_gradient, output_gradient, None, totals.weight, totals.scale, totals.bias, None, None, None


def apply(function: type[torch.autograd.Function], *arguments) -> Tensor | tuple[Tensor, ...]:
    """function.apply(*arguments); traced code is told to make again what it would keep of its own.

    The compiler traces through autograd functions, and would hand float32 copies of the state to the backward pass.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return checkpoint(function.apply, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function.apply(*arguments)


def put(target: Tensor, values: Tensor) -> None:
    """target = values, where they are not the same memory."""
    if target.dtype != values.dtype:
        target.copy_(values)


def put_product(target: Tensor, left: Tensor, right: Tensor, summand: Tensor | None = None) -> None:
    """target = left · right + summand, in batches of matrices; without a temporary where the dtypes are one."""
    direct = target.dtype == right.dtype and not torch.compiler.is_compiling()
    if summand is None:
        torch.bmm(left, right, out=target) if direct else target.copy_(product(left, right))
    else:
        torch.baddbmm(summand, left, right, out=target) if direct else target.copy_(summand + product(left, right))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right. Few rows and columns are, in traced code, written as a sum, which is fused with what is around."""
    if torch.compiler.is_compiling() and max(left.shape[1:]) <= 8:
        return (left[..., None] * right[:, None]).sum(2)
    return left @ right


def outer(slots: Tensor, segments: Tensor) -> Tensor:
    """[T, n, d], [T, m, d] -> [T, n, m], all products of a slot and a segment."""
    if torch.compiler.is_compiling() and slots.shape[1] <= 8:
        return (slots[:, :, None] * segments[:, None]).sum(-1)
    return (segments @ slots.mT).mT.contiguous()  # m ≤ n; in the other order half as fast at (8, 64)


def split(values: Tensor, maps: Maps) -> tuple[Tensor | None, Tensor]:
    """Carry [T, n, n], None if there is none, and write [T, n, m]."""
    n = len(maps.bias) if maps.carries else 0
    return (values[..., :n] if n else None), values[..., n:]


def retracted(carry: Tensor, maps: Maps) -> Tensor:
    return carry if maps.retract is None else maps.retract(carry)


def matrices(slots: Tensor, maps: Maps) -> dict[str, Tensor]:
    """read [T, n, m], carry [T, n, n] and write [T, n, m], by operations that autograd can follow.

    Those that are the same for all tokens are [1, n, …].
    """
    slots = slots if maps.scale is not None else slots[:1]
    values = Coefficients(slots, *columns_of(maps, slice(None))).values
    carry, write = split(values[..., maps.segments :], maps)
    if carry is None:
        carry = torch.eye(slots.shape[1], dtype=slots.dtype, device=slots.device)[None]
    return {"read": values[..., : maps.segments], "carry": retracted(carry, maps), "write": write}


def through_carry(carry: Tensor, slots: Tensor, gradient: Tensor, target: Tensor, maps: Maps) -> Tensor:
    """From the gradient of carryᵀ slots: that of the carry's values [T, n, n]; the slots' is put into `target`."""
    of_carry = outer(slots, gradient)
    if maps.retract is None:
        put_product(target, carry, gradient)
        return of_carry
    with torch.enable_grad():
        values = carry.detach().requires_grad_()
        after = maps.retract(values)
    put_product(target, after.detach(), gradient)
    return torch.autograd.grad(after, values, of_carry)[0]
