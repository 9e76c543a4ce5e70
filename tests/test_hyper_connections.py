"""The connection against an independent loop over tokens, slots and targets, written from the formulas."""

import math

import pytest
import torch

from vwn_hf import GeneralizedHyperConnection

SIZES = [(1, 1), (1, 4), (2, 3), (4, 4), (4, 8), (8, 64)]
SLOT_WIDTH = 6


def sublayer(weight):
    """Computed in float64 whatever its dtype, so that only the connection's own rounding is measured."""
    return lambda x: torch.tanh(x.double() @ weight.double()).to(x.dtype)


def loop_reference(parameters, hidden_states, weight, m, n, eps):
    """method: for each token, X = Åᵀ H, z = T(X), H' = Bᵀ Z + Âᵀ H, entry by entry in float64."""
    d, outputs = SLOT_WIDTH, []
    for token in hidden_states.reshape(-1, n * d):
        slots = [token[i * d : (i + 1) * d] for i in range(n)]

        def matrix(name, targets, slots=slots):
            bias = parameters[f"{name}.bias"]
            if f"{name}.proj" not in parameters:
                return [[bias[i, j] for j in range(targets)] for i in range(n)]
            proj, scale, norm = parameters[f"{name}.proj"], parameters[f"{name}.scale"], parameters["slot_norm.weight"]
            rows = []
            for i in range(n):
                normed = slots[i] / torch.sqrt((slots[i] ** 2).sum() / d + eps) * norm
                rows.append(
                    [
                        scale[i, j] * torch.tanh((normed * proj[:, j]).sum() / math.sqrt(d)) + bias[i, j]
                        for j in range(targets)
                    ]
                )
            return rows

        read, carry, write = matrix("read", m), matrix("carry", n), matrix("write", m)
        x = torch.cat([sum(read[i][j] * slots[i] for i in range(n)) for j in range(m)])
        z = sublayer(weight)(x)
        segments = [z[j * d : (j + 1) * d] for j in range(m)]
        outputs.append(
            torch.cat(
                [
                    sum(write[i][j] * segments[j] for j in range(m)) + sum(carry[k][i] * slots[k] for k in range(n))
                    for i in range(n)
                ]
            )
        )
    return torch.stack(outputs).view_as(hidden_states)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_connection(m, n, dynamic, seed=0):
    generator = torch.Generator().manual_seed(seed)
    connection = GeneralizedHyperConnection(m * SLOT_WIDTH, m, n, dynamic=dynamic)
    with torch.no_grad():
        for name, parameter in connection.named_parameters():
            std = (
                1 / math.sqrt(n) if name.endswith(("bias", "scale")) else 0.5
            )  # so that mixtures of n slots are of order 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return connection


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_values_and_gradients_match_a_loop_over_tokens(m, n, dtype, bound, dynamic):
    generator = torch.Generator().manual_seed(1)
    shape = (3, 5, n * SLOT_WIDTH) if n < 64 else (1, 3, n * SLOT_WIDTH)
    state = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(m * SLOT_WIDTH, m * SLOT_WIDTH, generator=generator, dtype=torch.float64) / 4).to(dtype)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    connection = random_connection(m, n, dynamic)
    if dtype == torch.float64:
        connection = connection.double()

    inputs = [state.clone().requires_grad_(), weight.clone().requires_grad_()]
    output = connection(inputs[0], sublayer(inputs[1]))
    assert output.dtype == dtype
    output.backward(gradient)

    # The same rounded inputs, in float64. A model in bfloat16 rounds the sublayer's input and output besides.
    parameters = {k: v.detach().double().requires_grad_() for k, v in connection.named_parameters()}
    ref_inputs = [state.double().requires_grad_(), weight.double().requires_grad_()]
    expected = loop_reference(parameters, ref_inputs[0], ref_inputs[1], m, n, eps=1e-6)
    expected.backward(gradient.double())

    assert relative_error(output.detach(), expected.detach()) <= bound
    for mine, theirs in zip(inputs, ref_inputs, strict=True):
        assert relative_error(mine.grad, theirs.grad) <= bound
    for name, parameter in connection.named_parameters():
        assert relative_error(parameter.grad, parameters[name].grad) <= bound, name


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_starts_as_an_ordinary_residual_in_the_first_slots(m, n):
    connection, width = GeneralizedHyperConnection(m * SLOT_WIDTH, m, n), m * SLOT_WIDTH
    state = torch.randn(2, 3, n * SLOT_WIDTH)
    seen = []

    def record(x):
        seen.append(x)
        return x.sin()

    output = connection(state, record)
    assert torch.equal(seen[0], state[..., :width])
    assert torch.equal(output[..., :width], state[..., :width] + state[..., :width].sin())
    copies = state[..., :width].sin()[..., torch.arange(n * SLOT_WIDTH) % width]
    assert torch.allclose(output, state + copies)


def test_a_carry_that_is_not_symmetric_is_applied_the_right_way_round():
    connection = GeneralizedHyperConnection(4, 2, 3, dynamic=False)
    with torch.no_grad():
        connection.carry.bias.zero_()
        connection.carry.bias[0, 2] = 1  # slot 0 is carried into slot 2, and nothing else anywhere
        connection.write.bias.zero_()
    state = torch.arange(6.0).view(1, 1, 6)
    assert connection(state, torch.zeros_like).tolist() == [[[0, 0, 0, 0, 0, 1]]]


def test_parameter_names_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in GeneralizedHyperConnection(8, 2, 3).named_parameters()}
    assert shapes == {
        "slot_norm.weight": (4,),
        "read.bias": (3, 2), "read.proj": (4, 2), "read.scale": (3, 2),
        "carry.bias": (3, 3), "carry.proj": (4, 3), "carry.scale": (3, 3),
        "write.bias": (3, 2), "write.proj": (4, 2), "write.scale": (3, 2),
    }  # fmt: skip
    static = GeneralizedHyperConnection(8, 2, 3, dynamic=False)
    assert sorted(k for k, _ in static.named_parameters()) == ["carry.bias", "read.bias", "write.bias"]


def test_computes_in_float32_under_autocast():
    connection, state = random_connection(2, 3, True), torch.randn(1, 4, 3 * SLOT_WIDTH)
    expected = connection(state, torch.sin)
    with torch.autocast("cpu", torch.bfloat16):
        actual = connection(state, torch.sin)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4, 8), "segments=4 does not divide hidden_size=10"),
        ((12, 4, 3), "slots=3 is less than segments=4"),
        ((12, 0, 3), "segments=0"),
    ],
)
def test_refuses_widths_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        GeneralizedHyperConnection(*sizes)
