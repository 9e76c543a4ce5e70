"""The connections' health is logged; a bad loss stops a run in time; a stopped run goes on bit for bit."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SHARED, tiny_config, tiny_model, tiny_vwn
from safetensors.torch import load_file
from tiny_families import TINY
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments, default_data_collator
from transformers.distributed import DistributedConfig

from vwn_hf import monitoring, upcycle
from vwn_hf.data import write_standard_library_corpus
from vwn_hf.hyper_connections import doubly_stochastic
from vwn_hf.monitoring import (
    ConnectionHealth,
    ConnectionRecorder,
    ConnectionWarning,
    Interrupted,
    NonFiniteError,
    StopOnSignal,
    carry_gains,
    connection_matrices,
    connections,
    last_complete_checkpoint,
)
from vwn_hf.training import TrainingRecipe, VwnTrainer, train

ROWS = [torch.randint(10, 99, (12,), generator=torch.Generator().manual_seed(n)) for n in range(24)]
BAD_TOKEN = 7  # in no row but where a test puts it


def arguments(folder, **settings):
    defaults = {
        "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **settings})


def trainer_of(model, folder, callbacks=(), rows=ROWS, **settings):
    data = [{"input_ids": row, "labels": row} for row in rows]
    return VwnTrainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
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
            hooks = sum(len(connection._forward_pre_hooks) for connection in connections(model).values())
            calls.append(hooks)

    trainer = trainer_of(
        model, tmp_path, [ConnectionHealth(), Count()], max_steps=6, logging_steps=3, gradient_accumulation_steps=2
    )
    trainer.train()
    assert calls == [4, 0, 4, 0, 0, 4]  # the first step tells where the run began
    assert not any(connection._forward_pre_hooks for connection in connections(model).values())
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


# ---- A loss or gradient that is not finite


def poison(model, name):
    """Have a module's output overflow where its batch has the bad token."""
    bad = [False]
    model.register_forward_pre_hook(
        lambda module, args, named: bad.__setitem__(0, bool((named["input_ids"] == BAD_TOKEN).any())), with_kwargs=True
    )

    def spoil(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        return output * float("inf") if bad[0] else output

    model.get_submodule(name).register_forward_hook(spoil)


def rows_with_bad_token(*places):
    rows = [row.clone() for row in ROWS]
    for place in places:
        rows[place][5] = BAD_TOKEN
    return rows


def state_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("name", ["model.layers.1.mlp", "mtp.0.mixing"])
def test_a_loss_that_is_not_finite_stops_before_the_step(name, tmp_path):
    model = tiny_vwn("olmoe", num_mtp_layers=1)
    poison(model, name)
    trainer = trainer_of(
        model, tmp_path, rows=rows_with_bad_token(17), max_steps=4, gradient_accumulation_steps=3, save_steps=1,
        save_strategy="steps", train_sampling_strategy="sequential",
    )  # fmt: skip
    assert trainer.args.logging_nan_inf_filter
    with pytest.raises(NonFiniteError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert "Stopped in step 3, before the optimizer took it: the loss is nan." in message
    assert "Parameters that are not finite: none" in message
    assert f"the first output that is not finite is that of {name};" in message
    assert "mtp_losses [nan]" in message
    assert f"Micro-batch 3 of 3, saved in {tmp_path / 'nonfinite_batch.safetensors'}: input_ids [2, 12]" in message
    gains = r"Gain of the carry product.*: layers\.0\.attention \d.*mtp\.0\.layer\.feed_forward inf"
    assert re.search(gains, message), message
    batch = load_file(tmp_path / "nonfinite_batch.safetensors")
    rows = torch.stack(rows_with_bad_token(17)[16:18])
    assert batch.keys() == {"micro_batch_2.input_ids", "micro_batch_2.labels"}
    assert torch.equal(batch["micro_batch_2.input_ids"], rows)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert f"the last one {tmp_path / 'checkpoint-2'}." in message
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_and_is_named(tmp_path):
    model = tiny_vwn("olmoe")
    weight, steps = model.model.layers[1].self_attn.q_proj.weight, []

    def spoil(gradient):
        steps.append(1)
        return gradient.index_fill(0, torch.tensor([2]), float("nan")) if len(steps) == 2 else gradient

    weight.register_hook(spoil)
    before = state_of(tmp_path)
    with pytest.raises(NonFiniteError) as stopped:
        trainer_of(model, tmp_path, max_grad_norm=1.0).train()
    message = str(stopped.value)
    assert "Stopped in step 2, before the optimizer took it: the loss is finite, but a gradient is not." in message
    named = r"Gradients that are not finite: model\.layers\.1\.self_attn\.q_proj\.weight, of \d+\."
    assert re.search(named, message), message
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert "there is none yet" in message and set(state_of(tmp_path)) - set(before) == {"nonfinite_batch.safetensors"}


def test_a_run_with_finite_numbers_is_the_same_with_and_without_the_check(tmp_path, monkeypatch):
    def losses():
        trainer = trainer_of(tiny_vwn("olmoe"), tmp_path)
        trainer.train()
        return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]

    checked = losses()
    monkeypatch.setattr(monitoring, "stop_if_not_finite", lambda *args: None)
    assert losses() == checked


# ---- Several processes


def in_two_processes(target, *args):
    """Run `target(rank, *args)` in two gloo ranks, forked from here; their exit statuses and what each gave back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=as_rank, args=(rank, port, queue, target, *args)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    statuses = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert statuses == [0, 0]
    results = dict(queue.get() for _ in ranks)
    return [results[0], results[1]]


def as_rank(rank, port, queue, target, *args):
    from accelerate.state import AcceleratorState

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        queue.put((rank, target(rank, *args)))
    except BaseException as error:
        queue.put((rank, f"{type(error).__name__}: {error}"))
    torch.distributed.destroy_process_group()


def loaded(source, sharded):
    """A checkpoint's model, its parameters spread over the two processes or whole in each (DDP)."""
    options = {"distributed_config": DistributedConfig(fsdp_size=2)} if sharded else {}
    return AutoModelForCausalLM.from_pretrained(source, **options)


def train_on_bad_data(rank, folder, sharded):
    model = loaded(folder / "model", sharded)
    poison(model, "model.layers.0.mlp")
    settings = {"train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 1}
    trainer_of(model, folder, rows=rows_with_bad_token(6), save_only_model=sharded, **settings).train()


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_all_processes_stop_at_the_same_step(sharded, tmp_path):
    tiny_vwn("olmoe").save_pretrained(tmp_path / "model")
    first, second = in_two_processes(train_on_bad_data, tmp_path, sharded)  # rows 4, 5 and 6, 7 in step 2
    stopped = "NonFiniteError: Stopped in step 2, before the optimizer took it:"
    assert first.startswith(stopped) and second.startswith(f"{stopped} the loss is nan in process 1.")
    assert "the first output that is not finite is that of model.layers.0.mlp;" in second
    assert "the first output that is not finite is that of no module;" in first
    batch = load_file(tmp_path / "nonfinite_batch_1.safetensors")
    assert torch.equal(batch["micro_batch_0.input_ids"], torch.stack(rows_with_bad_token(6)[6:8]))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def check_losses(rank, folder):
    trainer = trainer_of(tiny_vwn("olmoe"), folder)
    batch = {"input_ids": ROWS[0][None], "labels": ROWS[0][None]}
    loss = torch.tensor(float("inf") if rank == 1 else 4.0)
    monitoring.stop_if_not_finite(trainer, trainer.model, [(batch, loss)])


def test_a_process_whose_own_numbers_are_good_stops_with_the_others(tmp_path):
    first, second = in_two_processes(check_losses, tmp_path)
    assert "optimizer took it: a loss or gradient is not finite in process 1." in first and "saved in" not in first
    assert "optimizer took it: the loss is inf in process 1." in second
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite_batch_1.safetensors"]


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


def train_until_one_is_told_to_stop(rank, folder, sharded):
    class Tell(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    stop = StopOnSignal()
    model = loaded(folder / "model", sharded)
    trainer = trainer_of(model, folder, [Tell(), stop], max_steps=5, gradient_accumulation_steps=2)
    try:
        with stop:
            trainer.train()
    except Interrupted as interrupted:
        return trainer.state.global_step, interrupted.exit_status, str(interrupted)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_processes_agree_on_the_step_that_is_saved(sharded, tmp_path):
    tiny_vwn("olmoe").save_pretrained(tmp_path / "model")
    saved = "has the weights alone" if sharded else "is complete"
    for result in in_two_processes(train_until_one_is_told_to_stop, tmp_path, sharded):
        assert result[:2] == (2, 143)
        assert f"Stopped by SIGTERM after step 2; {tmp_path / 'checkpoint-2'} {saved}" in result[2]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(list((tmp_path / "checkpoint-2").glob("rng_state_*.pth"))) == (0 if sharded else 2)
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")


# ---- Signals


class SignalAt(TrainerCallback):
    def __init__(self, number, step, event="on_step_begin"):
        self.number, self.step = number, step
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_under_way_and_ends_the_run(number, status, tmp_path, capfd):
    stop, handlers = StopOnSignal(), [signal.getsignal(number) for number in StopOnSignal.signals]
    trainer = trainer_of(tiny_vwn("olmoe"), tmp_path, [SignalAt(number, 1), stop], max_steps=5, logging_steps=10)
    with pytest.raises(Interrupted, match=rf"after step 2; {tmp_path}/checkpoint-2 is complete") as stopped, stop:
        trainer.train()
    assert stopped.value.exit_status == status and isinstance(stopped.value, KeyboardInterrupt)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    logs = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logs if "loss" in entry] == [2]  # no loss goes missing
    assert [signal.getsignal(number) for number in StopOnSignal.signals] == handlers
    assert "once more ends at once" in capfd.readouterr().err


def test_a_second_signal_ends_at_once_but_not_one_that_a_launcher_hands_on(tmp_path, monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(monitoring.time, "monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt) as stopped, StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        clock[0] += 2
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(stopped.value, Interrupted)


def test_a_signal_that_no_step_can_answer_is_not_swallowed(tmp_path):
    stop = StopOnSignal()
    callbacks = [SignalAt(signal.SIGINT, 3, "on_train_end"), stop]
    with pytest.raises(KeyboardInterrupt) as stopped, stop:
        trainer_of(tiny_vwn("olmoe"), tmp_path, callbacks).train()
    assert not isinstance(stopped.value, Interrupted)
    with pytest.raises(ZeroDivisionError), StopOnSignal():
        raise ZeroDivisionError


def test_the_checkpoints_in_the_middle_of_a_step_are_refused(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    trainer = trainer_of(tiny_vwn("olmoe"), tmp_path, [StopOnSignal()], enable_jit_checkpoint=True)
    with pytest.raises(ValueError, match="enable_jit_checkpoint: leave it out"):
        trainer.train()
    signal.signal(signal.SIGTERM, handler)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint-30", "checkpoint-last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "none") is None
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint-last"):
        (tmp_path / name / "trainer_state.json").touch()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")


# ---- Stop and resume


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_standard_library_corpus(folder, vocab_size=300, megabytes=0.1)
    return folder


def recipe(corpus, output, **training):
    """15 blocks in shuffled batches of 2 · 2: 4 steps an epoch, the last one shorter."""
    return {
        "config": {
            "model_type": "vwn_olmoe", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "vwn_segments": 2, "vwn_slots": 4,
            "output_router_logits": True, "num_mtp_layers": 2,
        },
        "tokenizer": str(corpus / "tokenizer"),
        "data": {
            "train": {"path": "json", "data_files": str(corpus / "blocks.jsonl")},
            "evaluation": {"path": "json", "data_files": str(corpus / "heldout.jsonl"), "split": "train[:1]"},
            "sequence_length": 32,
        },
        "training": {
            "output_dir": str(output), "max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
            "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1,
            "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 1,
            "per_device_eval_batch_size": 64, "disable_tqdm": True, "use_cpu": True, **training,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An uninterrupted run, with a checkpoint after every step."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    text = json.loads((corpus / "train.jsonl").read_text().splitlines()[0])["text"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: 15 * 32]
    (corpus / "blocks.jsonl").write_text(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(TrainingRecipe(**recipe(corpus, folder)))
    return folder


TIMES = re.compile("runtime|_time$|per_second|flos|train_loss")  # of the process, not of the run


def history(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if not TIMES.search(name)} for entry in entries]


def test_the_run_that_is_resumed_has_all_that_resuming_could_lose(whole):
    entries = history(whole)
    training = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in training] == list(range(1, 11)) and training[-1]["epoch"] > 2
    assert all({"mtp_loss_1", "mtp_loss_2", "grad_norm", "vwn/grad_share"} <= entry.keys() for entry in training)
    assert (
        len({entry["learning_rate"] for entry in training}) > 5 and sum("eval_loss" in entry for entry in entries) == 3
    )


@pytest.mark.parametrize("step", [1, 4, 7, 10], ids=["first", "end of an epoch", "second epoch", "last"])
def test_resuming_gives_the_same_losses_bit_for_bit(step, whole, corpus, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    train(TrainingRecipe(**recipe(corpus, folder, save_strategy="no")), resume=True)
    assert history(folder)[: len(history(whole)) - 2] == history(whole)[:-2]
    assert history(folder)[-1] == history(whole)[-1]  # the evaluation at the end
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_real_process_told_to_end_saves_and_is_resumed_to_the_same_losses(whole, corpus, tmp_path):
    folder, path = tmp_path / "run", tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(corpus, folder, save_strategy="no")))
    command = [sys.executable, "-u", "-m", "vwn_hf.cli", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums of other lengths round differently
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        for line in run.stdout:
            if line.count("mtp_loss_1") and "'epoch': '0.5'" in line:
                run.send_signal(signal.SIGTERM)
                break
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 143, errors
    (checkpoint,) = folder.glob("checkpoint-*")
    assert f"Stopped by SIGTERM after step {checkpoint.name[11:]}; {checkpoint} is complete." in errors
    assert "Traceback" not in errors and not (folder / "model.safetensors").exists()
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {
        p.name for p in checkpoint.iterdir()
    }
    assert 2 <= int(checkpoint.name[11:]) < 10
    train(TrainingRecipe(**recipe(corpus, folder, save_strategy="no")), resume=True)
    assert history(folder) == history(whole)
