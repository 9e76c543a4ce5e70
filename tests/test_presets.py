"""The presets against the formulas of the papers they are named after, token by token in float64.

Both write the state of a token as H, n rows; T is the sublayer with its pre-norm; H̄ is H with every row normalized
(here by RMS with one weight); s_α, s_β are scalars; the static forms have no tanh terms.

Hyper-Connections, arXiv:2409.19606. H is n streams of width d, at first n copies of the embedding; its rows are summed
after the last layer.

    B(H)   = s_β ∘ tanh(H̄ W_β)ᵀ + B      [1, n]        h0 = A_m(H)ᵀ H
    A_m(H) = s_α ∘ tanh(H̄ W_m) + A_m     [n, 1]        Ĥ  = B(H)ᵀ T(h0) + A_r(H)ᵀ H
    A_r(H) = s_α ∘ tanh(H̄ W_r) + A_r     [n, n]        start: s = 0.01, W = 0, B = 1, A_m = e_{k mod n}, A_r = I

Frac-Connections, arXiv:2503.14125. H is a state of width d in n fractions of width d/n, joined after the last layer.

    B(H) = s_β ∘ tanh(H̄ W_β)ᵀ + B        [1, n]        z = T(join of the rows of Y(H)ᵀ H), cut into n rows
    Y(H) = s_α ∘ tanh(H̄ W_Y) + Y         [n, n]        Ĥ = diag(B(H)) z + A(H)ᵀ H
    A(H) = s_α ∘ tanh(H̄ W_A) + A         [n, n]        start: s = 0.01, W = 0, B = 1, Y = A = I
"""

import math

import pytest
import torch
from conftest import randomize, tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vwn_hf import GeneralizedHyperConnection

EPS = 1e-6
PRESETS = {"hyper_connections": (1, 2, 4, 8), "frac_connections": (1, 2, 4)}
CASES = [(preset, slots) for preset, sizes in PRESETS.items() for slots in sizes]
BATCH, SEQUENCE = 2, 5


def paper_parameters(preset, n, d, k, generator, spread):
    """The paper's start for the k-th sublayer, every entry moved by noise of size `spread`; d is the width of a row."""

    def around(start):
        return start + spread * torch.randn(start.shape, generator=generator, dtype=torch.float64)

    identity = torch.eye(n, dtype=torch.float64)
    read = identity[:, [k % n]] if preset == "hyper_connections" else identity
    return {
        "B": around(torch.ones(1, n, dtype=torch.float64)),
        "read": around(read),  # A_m or Y
        "carry": around(identity),  # A_r or A
        "W_β": around(torch.zeros(d, 1)),
        "W_read": around(torch.zeros(d, read.shape[1])),
        "W_carry": around(torch.zeros(d, n)),
        "s_α": around(torch.tensor(0.01)),
        "s_β": around(torch.tensor(0.01)),
        "norm": around(torch.ones(d)),
    }


def paper_matrices(H, paper, dynamic):
    """B(H), A_m(H) or Y(H), A_r(H) or A(H) of one token."""
    if not dynamic:
        return paper["B"], paper["read"], paper["carry"]
    normed = torch.stack([row / (row.square().mean() + EPS).sqrt() * paper["norm"] for row in H])
    return (
        paper["s_β"] * torch.tanh(normed @ paper["W_β"]).T + paper["B"],
        paper["s_α"] * torch.tanh(normed @ paper["W_read"]) + paper["read"],
        paper["s_α"] * torch.tanh(normed @ paper["W_carry"]) + paper["carry"],
    )


def paper_connection(preset, states, sublayer, paper, dynamic):
    """One connection around T = `sublayer` [B, S, D] -> [B, S, D]; `states` is a list of all tokens' H."""
    matrices = [paper_matrices(H, paper, dynamic) for H in states]
    inputs = [(read.T @ H).flatten() for H, (_, read, _) in zip(states, matrices, strict=True)]
    outputs = sublayer(torch.stack(inputs).view(BATCH, SEQUENCE, -1)).flatten(0, 1)
    after = []
    for H, (B, _, carry), z in zip(states, matrices, outputs, strict=True):
        written = B.T @ z[None] if preset == "hyper_connections" else torch.diag(B[0]) @ z.view(H.shape)
        after.append(written + carry.T @ H)
    return after


@torch.no_grad()
def take_paper_parameters(connection, paper, preset):
    """The same connection in our parameters: ours divide by τ = sqrt(d), and have a scale for every entry."""
    (d, _), (n, m) = paper["W_carry"].shape, connection.write.bias.shape
    temperature = math.sqrt(d)
    if preset == "hyper_connections":
        write, write_scale = paper["B"].T, torch.ones(n, 1).double()
    else:  # each fraction of the output goes to its own fraction only
        write, write_scale = torch.diag(paper["B"][0]), torch.eye(n).double()
    values = {"read.bias": paper["read"], "carry.bias": paper["carry"], "write.bias": write}
    values |= {
        "read.proj": paper["W_read"] * temperature, "read.scale": paper["s_α"].expand(n, m),
        "carry.proj": paper["W_carry"] * temperature, "carry.scale": paper["s_α"].expand(n, n),
        "write.proj": (paper["W_β"] * temperature).expand(d, m), "write.scale": paper["s_β"] * write_scale,
        "slot_norm.weight": paper["norm"],
    }  # fmt: skip
    for name, parameter in connection.named_parameters():
        parameter.copy_(values[name])


def assert_same(actual, expected, bound):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(("preset", "slots"), CASES)
def test_a_connection_is_the_papers(preset, slots, dynamic):
    generator = torch.Generator().manual_seed(slots)
    config = tiny_config("vwn_llama", vwn_preset=preset, vwn_slots=slots)
    D, d, n = config.hidden_size, config.slot_width, config.vwn_slots
    connection = GeneralizedHyperConnection(D, config.vwn_segments, n, dynamic, EPS).double()
    paper = paper_parameters(preset, n, d, 1, generator, spread=0.3)
    take_paper_parameters(connection, paper, preset)
    weight = torch.randn(D, D, generator=generator, dtype=torch.float64) / math.sqrt(D)

    def sublayer(x):
        return torch.tanh(x @ weight)

    state = torch.randn(BATCH, SEQUENCE, n * d, generator=generator, dtype=torch.float64)
    gradient = torch.randn(state.shape, generator=generator, dtype=torch.float64)
    mine, theirs = state.clone().requires_grad_(), state.clone().requires_grad_()
    actual = connection(mine, sublayer)
    expected = torch.stack(paper_connection(preset, list(theirs.reshape(-1, n, d)), sublayer, paper, dynamic)).view_as(
        state
    )
    assert_same(actual, expected, 1e-13)
    actual.backward(gradient)
    expected.backward(gradient)
    assert_same(mine.grad, theirs.grad, 1e-13)


def paper_logits(model, embeddings, preset, papers, dynamic):
    """A Llama whose residual connections are the paper's; the sublayers are the model's own, as black boxes."""
    base, config = model.model, model.config
    rotary = base.rotary_emb(embeddings, torch.arange(SEQUENCE)[None])
    papers = iter(papers)
    if preset == "hyper_connections":
        states = [torch.stack([token] * config.vwn_slots) for token in embeddings.flatten(0, 1)]
    else:
        states = [token.view(config.vwn_slots, -1) for token in embeddings.flatten(0, 1)]
    for layer in base.layers:

        def attention(x, layer=layer):
            return layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]

        def feed_forward(x, layer=layer):
            return layer.mlp(layer.post_attention_layernorm(x))

        for sublayer in (attention, feed_forward):
            states = paper_connection(preset, states, sublayer, next(papers), dynamic)
    joined = [H.sum(0) if preset == "hyper_connections" else H.flatten() for H in states]
    return model.lm_head(LlamaRMSNorm.forward(base.norm, torch.stack(joined).view_as(embeddings)))


@pytest.mark.parametrize("spread", [0.0, 0.2], ids=["start", "moved"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(("preset", "slots"), [case for case in CASES if case[1] in (1, 2, 4)])
def test_a_whole_model_is_the_papers(preset, slots, dynamic, spread):
    """Bound 1e-6: Llama's own norm rounds to float32, also in a float64 model."""
    config = tiny_config(
        "vwn_llama", vwn_preset=preset, vwn_slots=slots, vwn_group_norm=False, vwn_dynamic=dynamic, vwn_norm_eps=EPS
    )
    D, n, d = config.hidden_size, config.vwn_slots, config.slot_width
    model = randomize(AutoModelForCausalLM.from_config(config)).double()
    generator = torch.Generator().manual_seed(0)
    papers = [paper_parameters(preset, n, d, k, generator, spread) for k in range(2 * config.num_hidden_layers)]
    connections = [module for module in model.modules() if isinstance(module, GeneralizedHyperConnection)]
    for connection, paper in zip(connections, papers, strict=True):
        take_paper_parameters(connection, paper, preset)
    copies = config.virtual_width // D  # n, or 1 for fractions
    table = torch.randn(config.vocab_size, D, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(table.repeat(1, copies))
        model.model.norm.reduce.weight.copy_(torch.eye(D).repeat(1, copies))  # the sum of the streams

    tokens = torch.randint(3, 99, (BATCH, SEQUENCE), generator=generator)
    mine, theirs = table[tokens].requires_grad_(), table[tokens].requires_grad_()
    actual = model(inputs_embeds=mine.repeat(1, 1, copies)).logits
    expected = paper_logits(model, theirs, preset, papers, dynamic)
    assert torch.equal(actual, model(tokens).logits)
    assert_same(actual, expected, 1e-6)
    gradient = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    actual.backward(gradient)
    expected.backward(gradient)
    assert_same(mine.grad, theirs.grad, 1e-6)

    if not spread:  # both papers' starts are the backbone with its residual connections
        plain = AutoModelForCausalLM.from_config(tiny_config("llama")).double().eval()
        names = plain.state_dict().keys() - {"model.embed_tokens.weight"}
        weights = {name: tensor for name, tensor in model.state_dict().items() if name in names}
        plain.load_state_dict(weights | {"model.embed_tokens.weight": table})
        assert_same(actual, plain(tokens).logits, 1e-5)
