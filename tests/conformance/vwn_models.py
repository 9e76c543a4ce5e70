"""Testers that hold VWN classes to transformers' own model tests. run.py puts those tests on the path and runs this.

Not named test_*.py, so that `pytest tests` leaves it alone.
"""

import inspect
import sys
import unittest
from types import ModuleType
from unittest.mock import patch

import torch
from transformers import set_seed
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

import vwn_hf
from vwn_hf.backbones import BACKBONES


def stand_in(name: str, **content) -> None:
    """A module that upstream's tests import and the source distribution leaves out."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules.setdefault(name, module)


stand_in("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
stand_in("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
stand_in(
    "tests.utils.test_configuration_utils",
    config_common_kwargs={"architectures": ["A"], "dtype": "float16", "output_hidden_states": True, "num_labels": 5},
)

with patch("transformers.utils.direct_transformers_import"):  # looks for a tests/__init__.py, left out too
    from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    # plain Mixtral's rotary scaling fails upstream's tests without a head_dim
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
FORMS = {
    "direct": {"vwn_segments": 4, "vwn_slots": 8, "vwn_embedding": "direct"},
    "projected": {"vwn_segments": 4, "vwn_slots": 6, "vwn_embedding": "projected", "tie_word_embeddings": True},
}


class VwnModelTester:
    """What upstream's tests ask of a tester: sizes, a config, inputs."""

    batch_size, seq_length, is_training = 13, 7, True

    def __init__(self, family: str, form: str):
        prefix = f"Vwn{BACKBONES[family].prefix}"
        self.family, self.form = family, form
        self.config_class = getattr(vwn_hf, f"{prefix}Config")
        self.causal_lm_class = getattr(vwn_hf, f"{prefix}ForCausalLM")
        self.config_fields = {**SIZES, **FAMILIES[family], **FORMS[form]}
        vars(self).update(SIZES)

    def get_config(self):
        return self.config_class(**self.config_fields)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class VwnOverrides:
    """Every upstream test that is not run as it stands. run.py prints each docstring: the reason."""

    test_can_init_all_missing_weights_before_2023 = True  # else skipped for files without a year in their first line

    def test_hidden_states_output(self):
        """Upstream expects states of width D. VWN's are D' wide between layers, and D wide after the last norm:
        upstream's test runs with D' as the width, then the width of every state is checked."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        self.model_tester.hidden_size = config.virtual_width
        super().test_hidden_states_output()
        for model_class in self.all_model_classes:
            model = model_class(config).to(torch_device).eval()
            states = model(**inputs, output_hidden_states=True).hidden_states
            expected = [config.virtual_width] * config.num_hidden_layers + [config.hidden_size]
            self.assertEqual([state.shape[-1] for state in states], expected)

    def test_tied_weights_keys(self):
        """Upstream ties the embeddings of any config. A direct table is D' wide and lm_head D wide, so the direct form
        must refuse; the projected form must tie, and passes upstream's test."""
        config = self.model_tester.get_config()
        config.tie_word_embeddings = True
        if self.model_tester.form == "direct":
            for model_class in self.all_model_classes:
                with self.assertRaisesRegex(ValueError, "vwn_embedding='projected'"):
                    model_class(config)
        else:
            super().test_tied_weights_keys()
            model = self.model_tester.causal_lm_class(config)
            self.assertIs(model.lm_head.weight, model.get_input_embeddings().weight)

    def test_moe_models_record_router_logits(self):
        """Upstream takes a model for an MoE by the source text of its module, and would skip VWN's, whose experts are
        defined in the family's module: that one is searched instead."""
        family, getmodule = BACKBONES[self.model_tester.family], inspect.getmodule

        def family_module(thing, *args):
            return family.modeling if thing in self.all_model_classes else getmodule(thing, *args)

        with patch("inspect.getmodule", family_module):
            super().test_moe_models_record_router_logits()

    def test_generation_tester_mixin_inheritance(self):
        """Upstream demands its generation tests, which the source distribution leaves out. In their place: greedy
        search and beam search write the same with the cache and without it, and sampling runs."""
        for model_class in self.all_generative_model_classes:
            set_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).to(torch_device).eval()
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][0, :3] = 0  # padded on the left
            length = {"min_new_tokens": 5, "max_new_tokens": 5}
            for beams in (1, 3):
                cached, uncached = (
                    model.generate(**inputs, **length, do_sample=False, num_beams=beams, use_cache=use_cache)
                    for use_cache in (True, False)
                )
                self.assertEqual(list(cached.shape), [self.model_tester.batch_size, self.model_tester.seq_length + 5])
                self.assertEqual(cached.tolist(), uncached.tolist())
            sampled = model.generate(**inputs, **length, do_sample=True)
            self.assertEqual(sampled.shape, cached.shape)


class VwnTests(VwnOverrides, ModelTesterMixin, TrainingTesterMixin):
    model_tester = None

    def test_config(self):
        ConfigTester(self, self.model_tester.config_class, **self.model_tester.config_fields).run_common_tests()


def make_test_case(family: str, form: str) -> type:
    """A unittest class, named as in VwnOlmoeDirectTest, of one family with one form of embedding."""
    prefix = f"Vwn{BACKBONES[family].prefix}"
    modeling_auto.MODEL_MAPPING_NAMES[f"vwn_{family}"] = f"{prefix}Model"  # upstream finds by these what takes labels
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"vwn_{family}"] = f"{prefix}ForCausalLM"

    def setUp(self):
        self.model_tester = VwnModelTester(family, form)

    classes = getattr(vwn_hf, f"{prefix}Model"), getattr(vwn_hf, f"{prefix}ForCausalLM")
    fields = {"setUp": setUp, "all_model_classes": classes, "__module__": __name__}
    return type(f"{prefix}{form.title()}Test", (VwnTests, unittest.TestCase), fields)


for family in FAMILIES:
    for form in FORMS:
        made = make_test_case(family, form)
        globals()[made.__name__] = made
del made  # or it would be collected under this name too
