"""The connections' health is logged, and what goes wrong is warned of early."""

import re
import warnings

import pytest
import torch
from conftest import SHARED, tiny_config, tiny_model, tiny_vwn
from small_runs import in_two_processes, loaded, trainer_of
from tiny_families import TINY
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from vwn_hf import monitoring, upcycle
from vwn_hf.hyper_connections import doubly_stochastic
from vwn_hf.monitoring import (
    ConnectionHealth,
    ConnectionRecorder,
    ConnectionWarning,
    carry_gains,
    connection_matrices,
    connections,
)


def static_model(carry, **overrides):
    """Static connections that carry with these matrices, one for each."""
    model = tiny_vwn("olmoe", vwn_dynamic=False, vwn_segments=2, vwn_slots=3, **overrides)
    for connection, matrix in zip(connections(model).values(), carry, strict=True):
        connection.carry.bias.data = matrix
    return model


# ---- What connections do on a batch


def test_matrices_are_the_mean_over_real_tokens_of_the_formula(tokens):
    model = tiny_vwn("olmoe", vwn_segments=4, vwn_slots=8)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    states = model(**batch, output_hidden_states=True).hidden_states
    matrices = connection_matrices(model, batch)
    assert list(matrices) == [
        f"model.layers.{i}.{kind}_connection" for i in (0, 1) for kind in ("attention", "feed_forward")
    ]
    for number in (0, 1):
        connection = model.model.layers[number].attention_connection
        slots = states[number].unflatten(-1, (8, 12))
        normed = slots / (slots.square().mean(-1, keepdim=True) + 1e-6).sqrt() * connection.slot_norm.weight
        for kind in ("read", "carry", "write"):
            slot_map = getattr(connection, kind)
            values = slot_map.scale * torch.tanh(normed @ slot_map.proj / 12**0.5) + slot_map.bias
            expected = values[mask.bool()].mean(0)
            found = matrices[f"model.layers.{number}.attention_connection"][kind]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(found, values.flatten(0, 1).mean(0), rtol=1e-5, atol=1e-6)


def test_gains_are_those_of_the_products_of_carries(tokens):
    carry = [torch.randn(3, 3, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    with ConnectionRecorder(static_model(carry)) as recorder:
        recorder.model(tokens)
    state = torch.eye(3)
    for gain, matrix in zip(carry_gains(recorder.records).values(), carry, strict=True):
        state = matrix.T @ state  # slot'[i] = sum_k carry[k, i] · slot[k]
        assert gain.tolist() == pytest.approx([torch.linalg.svdvals(state)[0].item()], rel=1e-5)


def test_modules_of_multi_token_prediction_begin_products_of_their_own(tokens):
    carry = [torch.eye(3) * factor for factor in (2, 2, 2, 2, 3, 3, 5, 5)]
    model = static_model(carry, num_mtp_layers=2).train()
    with ConnectionRecorder(model) as recorder:
        model(input_ids=tokens, labels=tokens)
    gains = [gain.max().item() for gain in carry_gains(recorder.records).values()]
    assert gains == pytest.approx([2, 4, 8, 16, 3, 9, 5, 25])
    assert [record.chain for record in recorder.records.values()] == [0, 0, 0, 0, 1, 1, 2, 2]


FORMS = [
    {},
    {"vwn_carry": "doubly_stochastic"},
    {"vwn_carry": "identity", "vwn_dynamic": False, "num_mtp_layers": 1},
    {"vwn_segments": 1, "vwn_slots": 1},
]


@pytest.mark.parametrize("overrides", FORMS, ids=str)
@pytest.mark.parametrize(("family", "count"), [("olmoe", 2), ("cohere", 1), ("longcat_flash", 4)])
def test_health_of_every_form_of_connection(family, count, overrides, tmp_path):
    config = {**SHARED, "hidden_size": 32, **TINY[family], "vwn_segments": 4, "vwn_slots": 8, **overrides}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(f"vwn_{family}", **config))
    trainer = trainer_of(model, tmp_path, [ConnectionHealth(per_layer=True)], max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConnectionWarning)
        trainer.train()
    logs = trainer.state.log_history[1]
    names = [name for name in logs if re.fullmatch(r"vwn/.+/carry_gain", name)]
    assert len(names) == count * len(model.model.layers) + (count if overrides.get("num_mtp_layers") else 0)
    if overrides.get("vwn_carry"):
        assert logs["vwn/carry_gain_max"] == pytest.approx(1, abs=1e-5)
    assert logs["vwn/static_distance"] > 0 and ("vwn/slot_cosine" in logs) == (config["vwn_slots"] > 1)
    assert (logs["vwn/dynamic_size"] > 0) == model.config.vwn_dynamic


def test_a_constrained_carry_is_recorded_as_it_acts(tokens):
    model = tiny_vwn("olmoe", vwn_carry="doubly_stochastic", vwn_dynamic=False)
    for name, matrices in connection_matrices(model, {"input_ids": tokens}).items():
        assert torch.equal(matrices["carry"], doubly_stochastic(connections(model)[name].carry.bias.detach()))


# ---- Health


def test_the_log_has_the_numbers_that_the_docstring_names(tmp_path):
    """Static connections with matrices set by hand; the step changes nothing, so all can be counted out."""
    swap = torch.tensor([[0.0, 0, 2], [0, 1, 0], [2, 0, 0]])  # spectral norm 2
    model = static_model([swap] * 4)
    for connection in connections(model).values():
        connection.read.bias.data = torch.tensor([[3.0, 0], [0, 1], [0, 0]])
        connection.write.bias.data = torch.tensor([[1.0, 1], [0, 1], [0, 1]])
    seen = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            squares = {name: p.grad.double().square().sum() for name, p in model.named_parameters()}
            own = sum(square for name, square in squares.items() if "_connection" in name)
            seen["share"] = (own / sum(squares.values())).sqrt().item()

        def on_step_begin(self, args, state, control, model, **kwargs):
            model.model.layers[1].feed_forward_connection.register_forward_pre_hook(self.keep)

        def keep(self, module, inputs):
            seen["state"] = inputs[0].detach()

    trainer = trainer_of(model, tmp_path, [ConnectionHealth(), Gradients()], max_steps=1, learning_rate=0.0)
    trainer.train()
    logs = trainer.state.log_history[0]
    slots = seen["state"].flatten(0, 1).unflatten(-1, (3, 24))
    cosines = [
        torch.cosine_similarity(slots[:, i], slots[:, j], dim=-1).abs().mean() for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    expected = {
        "vwn/carry_gain": 16, "vwn/carry_gain_max": 16, "vwn/read_share_max": 3 / 4, "vwn/write_share_max": 1 / 2,
        "vwn/slot_cosine": sum(cosines).item() / 3, "vwn/dynamic_size": 0, "vwn/grad_share": seen["share"],
        "vwn/static_distance": (2 / 2**0.5 + 10**0.5 / 3**0.5 + 3**0.5 / 3**0.5) / 3,
    }  # fmt: skip
    assert {name: value for name, value in logs.items() if name.startswith("vwn/")} == pytest.approx(expected, rel=1e-4)
    assert set(re.findall(r"^    (vwn/\w+) ", monitoring.__doc__, re.MULTILINE)) == set(expected)


def test_the_size_of_the_dynamic_part_is_that_of_its_formula(tokens):
    model = tiny_vwn("olmoe", vwn_segments=2, vwn_slots=4)
    state = model(tokens, output_hidden_states=True).hidden_states[0].unflatten(-1, (4, 24))
    connection = model.model.layers[0].attention_connection
    normed = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt() * connection.slot_norm.weight
    with ConnectionRecorder(model) as recorder:
        model(tokens)
    record = recorder.records["model.layers.0.attention_connection"]
    for kind in ("read", "carry", "write"):
        slot_map = getattr(connection, kind)
        size = (slot_map.scale * torch.tanh(normed @ slot_map.proj / 24**0.5)).abs().mean()
        assert record.dynamic[kind].item() == pytest.approx(size.item(), rel=1e-4)


def test_only_logging_steps_are_watched_and_only_the_first_micro_batch(tmp_path):
    model, calls = tiny_vwn("olmoe"), []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            calls.append(sum(connection.observer is not None for connection in connections(model).values()))

    trainer = trainer_of(
        model, tmp_path, [ConnectionHealth(), Count()], max_steps=6, logging_steps=3, gradient_accumulation_steps=2
    )
    trainer.train()
    assert calls == [4, 0, 4, 0, 0, 4]  # the first step tells where the run began
    assert not any(connection.observer for connection in connections(model).values())
    logged = [logs["step"] for logs in trainer.state.log_history if "vwn/carry_gain" in logs]
    assert logged == [3, 6]


@pytest.mark.parametrize("settings", [{"slot_start": "copies"}, {"slot_start": "zeros"}, {"segments": 1, "slots": 2}])
def test_a_fresh_upcycled_model_is_not_warned_of(settings, tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "source")
    upcycle(tmp_path / "source", tmp_path / "vwn", **{"segments": 4, "slots": 8, **settings})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "vwn")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConnectionWarning)
        trainer_of(model, tmp_path / "out", [ConnectionHealth()]).train()


@torch.no_grad()
def damage(model, kind):
    for connection in connections(model).values():
        if kind == "read":
            connection.read.bias[1:] *= 0.01
            connection.read.bias[0] = 3.0
        elif kind == "explodes":
            connection.carry.bias *= 10
        elif kind == "vanishes":
            connection.carry.bias *= 0.1
        elif kind == "cosine":
            connection.write.bias[:] = 1.0
            connection.carry.bias[:] = 1.0


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("read", r"step 2: slot 0 has 1\.00 of the weight of read, .*above 0\.81 .*at initialization: 0\.25"),
        ("cosine", r"step 2: slots of the state are nearly parallel at layers\.1\.feed_forward"),
        ("explodes", r"step 2: .*gain of .* at layers\.1\.feed_forward, above 1000.*doubly_stochastic"),
        ("vanishes", r"step 2: .*end of the stack, below 1/1000 of the 1 at initialization"),
    ],
)
def test_each_warning_comes_once_and_says_what_to_try(kind, says, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("vwn_olmoe", vwn_segments=4, vwn_slots=8))

    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                damage(model, kind)

    with pytest.warns(ConnectionWarning) as caught:
        trainer_of(model, tmp_path, [ConnectionHealth(), Damage()], max_steps=4, learning_rate=0.0).train()
    messages = [str(warning.message) for warning in caught if warning.category is ConnectionWarning]
    assert [bool(re.search(says, message)) for message in messages].count(True) == 1, messages
    assert len(messages) == len(set(messages)) and all("Try " in message for message in messages)


def test_a_model_without_connections_has_no_health(tmp_path):
    with pytest.raises(ValueError, match="OlmoeForCausalLM has no connections"):
        trainer_of(tiny_model("olmoe"), tmp_path, [ConnectionHealth()]).train()


def train_sharded(rank, folder):
    trainer = trainer_of(loaded(folder / "model", True), folder, [ConnectionHealth()], max_steps=1)
    trainer.train()
    return trainer.state.log_history[0]


def test_health_of_a_sharded_model_is_that_of_the_whole(tmp_path):
    tiny_vwn("olmoe").save_pretrained(tmp_path / "model")
    parts = in_two_processes(train_sharded, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = trainer_of(model, tmp_path, [ConnectionHealth()], max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    whole = trainer.state.log_history[0]
    for name in ("vwn/static_distance", "vwn/grad_share"):
        assert [part[name] for part in parts] == pytest.approx([whole[name]] * 2, rel=1e-5)
    for name in ("vwn/slot_cosine", "vwn/dynamic_size"):  # each process looks at its own tokens
        assert sum(part[name] for part in parts) / 2 == pytest.approx(whole[name], rel=1e-4)
        assert parts[0][name] != parts[1][name]
