"""What every modality must do, and what vectors, statistics, evidence and retained gain make of it.

A new modality is one more case in `CASES`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models import catalogue
from icmlora.base_models.catalogue import check_examples, modality_of
from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.examples.media_archive import is_archive, open_archive, pack_rows
from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds import modalities
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.kinds.classification import ImageClassification, TextClassification
from icmlora.base_models.kinds.media_to_text import ImageTextToText, Speech
from icmlora.base_models.kinds.object_detection import ObjectDetection
from icmlora.base_models.kinds.text import MaskedLM, Seq2SeqLM
from icmlora.base_models.modality import BaseModel, Modality, retained_gain
from icmlora.base_models.running.attach import adapted
from icmlora.base_models.running.channel_statistics import channel_statistics
from icmlora.base_models.running.lora_hooks import added
from icmlora.base_models.running.modules import check_fits, linear_shape
from icmlora.errors import DataError
from icmlora.fewshot.evidence import gather_evidence
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from icmlora.formats.discovery.folder import save_adapter
from icmlora.task_vectors.extraction import extract_adapted, extract_context
from icmlora.training.teacher import Teacher, shortfalls
from tests.icmlora.base_models.tiny_kinds import KINDS
from tests.icmlora.base_models.toy_modality import VectorClassifier, points, write_classifier
from tests.icmlora.tiny_base import write_tiny_base

LABEL = "tiny/base"
LIMIT = 64


@dataclass(frozen=True)
class Case:
    """A modality, a tiny base model of it, some examples, and some of the model's modules."""

    modality: Modality[Any, Any]
    write: Callable[[Path], Path]
    examples: bytes
    modules: tuple[str, ...]
    task_type: str | None


TEXTS = [f"{'more ' * (number % 3)}text number {number}" for number in range(12)]
CASES = (
    Case(
        CausalLM(),
        write_tiny_base,
        b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS),
        ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
        "CAUSAL_LM",
    ),
    Case(VectorClassifier(), write_classifier, points(0, 30), ("encoder", "mix"), None),
    *(
        Case(modality, kind.write, kind.examples, kind.modules, None)
        for modality, kind in (
            (MaskedLM(), KINDS["bert"]),
            (TextClassification(), KINDS["bert-classifier"]),
            (Seq2SeqLM(), KINDS["t5"]),
            (Seq2SeqLM(), KINDS["bart"]),
            (ImageClassification(), KINDS["vit"]),
            (ObjectDetection(), KINDS["yolos"]),
            (ImageTextToText(), KINDS["florence"]),
            (Speech(), KINDS["whisper"]),
        )
    ),
)


def with_another_row(examples: bytes) -> bytes:
    """Return the first example and a row that is none."""
    if not is_archive(examples):
        return examples.splitlines()[0] + b'\n{"x": 1}\n'
    rows, find = open_archive(examples)
    return pack_rows([json.loads(rows.splitlines()[0]), {"x": 1}], lambda name: find(name).read())


@pytest.fixture(params=CASES, ids=lambda case: case.modality.name)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """One modality after the other; all are registered."""
    monkeypatch.setattr(modalities, "MODALITIES", [VectorClassifier(), *modalities.MODALITIES])
    monkeypatch.setattr(catalogue, "READERS", [VectorClassifier().example, *catalogue.READERS])
    found: Case = request.param
    return found


@pytest.fixture
def base(case: Case, tmp_path: Path) -> BaseModel:
    return case.modality.load(inspect_base(LABEL, case.write(tmp_path / "base")), device=torch.device("cpu"))


@pytest.fixture
def examples(case: Case) -> tuple[Any, ...]:
    return parse_examples(case.examples, case.modality.example).items


def make_adapter(case: Case, base: BaseModel, strength: float = 0.3) -> Adapter:
    """Make a random adapter of rank 2 for the case's modules."""
    random = torch.Generator().manual_seed(1)
    modules = []
    for name in case.modules:
        outputs, inputs = linear_shape(base.model.get_submodule(name)) or (0, 0)
        a, b = torch.randn(2, inputs, generator=random), torch.randn(outputs, 2, generator=random)
        modules.append(LoraModule(name, strength * a, strength * b))
    return Adapter(LABEL, case.task_type, target_modules(case.modules), tuple(modules))


def factors(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {module.name: (module.a, module.b) for module in adapter.modules}


class TestProtocol:
    def test_its_base_models_are_recognised(self, case: Case, tmp_path: Path) -> None:
        assert type(modality_of(inspect_base(LABEL, case.write(tmp_path / "base")))) is type(case.modality)

    def test_a_base_model_is_frozen_and_in_evaluation_mode(self, base: BaseModel) -> None:
        assert not base.model.training
        assert not any(parameter.requires_grad for parameter in base.model.parameters())

    @pytest.mark.one_case
    def test_a_fingerprint_that_is_known_is_not_computed_again(self, case: Case, tmp_path: Path) -> None:
        found = inspect_base(LABEL, case.write(tmp_path / "base"))
        loaded = case.modality.load(found, device=torch.device("cpu"), fingerprint="known")
        assert (loaded.label, loaded.fingerprint, loaded.dtype) == (LABEL, "known", "float32")

    def test_examples_are_read_where_the_base_model_is_not_known(self, case: Case, examples: tuple[Any, ...]) -> None:
        assert check_examples(case.examples).items == examples

    def test_a_line_that_is_no_example_is_skipped_and_named(self, case: Case) -> None:
        found = parse_examples(with_another_row(case.examples), case.modality.example)
        assert (len(found), found.skipped, str(found.reason).startswith("line 2 ")) == (1, 1, True)

    def test_a_file_without_any_example_is_refused_by_its_name(self, case: Case) -> None:
        with pytest.raises(DataError, match="line 1") as caught:
            parse_examples(b'{"x": 1}\n', case.modality.example, path="some.jsonl")
        assert (caught.value.path, bool(caught.value.hint)) == ("some.jsonl", True)

    def test_what_was_parsed_can_be_made_readable(self, base: BaseModel, examples: tuple[Any, ...]) -> None:
        assert base.modality.readable(base, examples).items == examples

    def test_every_example_has_something_to_score(self, base: BaseModel, examples: tuple[Any, ...]) -> None:
        items = base.modality.prepare(base, examples, LIMIT)
        assert len(items) == len(examples)
        assert all(item.count >= 1 and 1 <= item.size <= LIMIT for item in items)

    @pytest.mark.one_case
    def test_each_example_has_a_state_of_the_hidden_size(self, base: BaseModel, examples: tuple[Any, ...]) -> None:
        states = base.modality.states(base, examples, LIMIT)
        assert (states.dtype, tuple(states.shape)) == (torch.float32, (len(examples), base.hidden_size))

    @pytest.mark.one_case
    def test_the_state_of_an_example_does_not_depend_on_the_others(
        self, base: BaseModel, examples: tuple[Any, ...]
    ) -> None:
        alone = torch.cat([base.modality.states(base, [example], LIMIT) for example in examples])
        torch.testing.assert_close(base.modality.states(base, examples, LIMIT), alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.one_case
    def test_all_examples_together_have_one_state(self, base: BaseModel, examples: tuple[Any, ...]) -> None:
        state = base.modality.context_state(base, examples, LIMIT)
        assert (state.dtype, tuple(state.shape)) == (torch.float32, (base.hidden_size,))

    @pytest.mark.one_case
    def test_logits_come_without_padding(self, base: BaseModel, examples: tuple[Any, ...]) -> None:
        items = base.modality.prepare(base, examples, LIMIT)
        together = base.modality.logits(base, items)
        for item, row in zip(items, together, strict=True):
            (alone,) = base.modality.logits(base, [item])
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.one_case
    def test_a_loss_is_the_sum_over_its_examples(self, base: BaseModel, examples: tuple[Any, ...]) -> None:
        items = base.modality.prepare(base, examples, LIMIT)
        parts = sum(float(base.modality.loss(base, [item]).detach()) for item in items)
        assert float(base.modality.loss(base, items).detach()) == pytest.approx(parts, rel=1e-4)

    @pytest.mark.one_case
    def test_gradients_of_a_loss_reach_what_is_added_to_modules(
        self, case: Case, base: BaseModel, examples: tuple[Any, ...]
    ) -> None:
        pairs = {
            name: (a.requires_grad_(), b.requires_grad_()) for name, (a, b) in factors(make_adapter(case, base)).items()
        }
        with added(base.model, pairs):
            base.modality.loss(base, base.modality.prepare(base, examples, LIMIT)).backward()  # type: ignore[no-untyped-call]
        assert all(factor.grad is not None and factor.grad.any() for pair in pairs.values() for factor in pair)

    @pytest.mark.one_case
    def test_the_rows_that_count_are_rows_of_a_modules_input(
        self, case: Case, base: BaseModel, examples: tuple[Any, ...]
    ) -> None:
        items = base.modality.prepare(base, examples, LIMIT)
        shapes = []
        module = base.model.get_submodule(case.modules[0])
        with module.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[:-1])):
            rows = base.modality.logits(base, items)
        real = base.modality.counted(base, items)
        if real is None:  # nothing is padded
            assert shapes
            return
        assert (real.dtype, [real.shape], int(real.sum())) == (torch.bool, shapes, sum(len(row) for row in rows))

    def test_a_language_model_continues_a_prompt_and_others_do_not(self, base: BaseModel) -> None:
        found = [base.modality.answer(base, Prompt("once upon a"), 6) for _ in range(2)]
        assert found[0] == found[1]
        assert (found[0] is None) == (not isinstance(base.modality, CausalLM | Seq2SeqLM))

    @pytest.mark.one_case
    def test_a_measurement_does_not_depend_on_the_order(self, base: BaseModel, examples: tuple[Any, ...]) -> None:
        forth, back = (base.modality.measure(base, some, LIMIT) for some in (examples, examples[::-1]))
        assert (forth.count, forth.utf8_bytes) == (back.count, back.utf8_bytes)
        assert forth.value == pytest.approx(back.value)

    @pytest.mark.one_case
    def test_an_adapter_that_was_put_on_the_model_takes_part(
        self, case: Case, base: BaseModel, examples: tuple[Any, ...], tmp_path: Path
    ) -> None:
        save_adapter(make_adapter(case, base, strength=2.0), tmp_path / "adapter")
        bare = base.modality.states(base, examples, LIMIT)
        with adapted(base, tmp_path / "adapter"):
            changed = base.modality.states(base, examples, LIMIT)
        assert not torch.allclose(bare, changed)
        assert torch.equal(base.modality.states(base, examples, LIMIT), bare)


class TestWhatStandsOnIt:
    def test_an_adapter_fits_by_its_modules(self, case: Case, base: BaseModel) -> None:
        check_fits(base, make_adapter(case, base).layout)

    @pytest.mark.one_case
    def test_vectors_of_both_views(
        self, case: Case, base: BaseModel, examples: tuple[Any, ...], tmp_path: Path
    ) -> None:
        save_adapter(make_adapter(case, base), tmp_path / "adapter")
        vectors = (*extract_adapted(base, tmp_path / "adapter", examples), *extract_context(base, examples))
        assert {vector.view for vector in vectors} == {"adapted", "context"}
        assert {tuple(vector.values.shape) for vector in vectors} == {(base.hidden_size,)}

    def test_without_samples_a_task_is_seen_through_probes_where_there_are_any(
        self, case: Case, base: BaseModel, tmp_path: Path
    ) -> None:
        save_adapter(make_adapter(case, base), tmp_path / "adapter")
        if base.modality.probes:
            vectors = extract_adapted(base, tmp_path / "adapter", None)
            assert {vector.extractor.source for vector in vectors} == {"probes"}
        else:
            with pytest.raises(DataError):
                extract_adapted(base, tmp_path / "adapter", None)

    @pytest.mark.one_case
    def test_channel_statistics_have_the_sizes_of_the_modules(
        self, case: Case, base: BaseModel, examples: tuple[Any, ...]
    ) -> None:
        measured = channel_statistics(base, examples, case.modules, max_tokens=50)
        shapes = {name: linear_shape(base.model.get_submodule(name)) for name in case.modules}
        assert {name: (len(outputs), len(inputs)) for name, (inputs, outputs) in measured.items()} == shapes
        assert all(part.any() for pair in measured.values() for part in pair)

    @pytest.mark.one_case
    def test_evidence_has_the_sizes_of_the_modules(
        self, case: Case, base: BaseModel, examples: tuple[Any, ...]
    ) -> None:
        items = base.modality.prepare(base, examples, LIMIT)
        evidence = gather_evidence(base, {}, case.modules, items, batch_size=4)
        assert evidence.tokens == sum(item.count for item in items)
        for name, found in evidence.modules.items():
            assert tuple(found.gradient.shape) == linear_shape(base.model.get_submodule(name))

    @pytest.mark.one_case
    def test_an_adapter_does_not_differ_from_itself(
        self, case: Case, base: BaseModel, examples: tuple[Any, ...]
    ) -> None:
        pairs = factors(make_adapter(case, base, strength=10.0))
        teacher = Teacher(base, pairs, base.modality.prepare(base, examples, LIMIT, whole=True))
        own, bare = (shortfalls(base, [(teacher, other, [0, 1])])[0] for other in (pairs, {}))
        assert float(own.divergence) == pytest.approx(0.0, abs=1e-5)
        assert float(bare.divergence) > 1e-4

    @pytest.mark.one_case
    def test_training_moves_the_metric_in_its_direction_and_gives_a_gain(
        self, case: Case, base: BaseModel, examples: tuple[Any, ...]
    ) -> None:
        modality = base.modality
        higher = modality.metric.higher_is_better
        items = modality.prepare(base, examples, LIMIT)
        start, config = make_adapter(case, base, strength=0.1), FinetuneConfig(steps=60, learning_rate=0.03, batch=4)
        *_, (_, trained) = finetune(base, start, items, config)
        before, worse = modality.measure(base, examples, LIMIT).value, float(modality.loss(base, items).detach())
        with added(base.model, factors(trained)):
            after, better = modality.measure(base, examples, LIMIT).value, float(modality.loss(base, items).detach())
        assert better < worse
        if modality.metric.name == "mAP50":  # a random detector hits nothing for thousands of steps
            return
        assert (after > before) if higher else (after < before)
        assert retained_gain(before, after, after, higher_is_better=higher) == 1.0
        assert retained_gain(before, after, before, higher_is_better=higher) == 0.0


@pytest.mark.parametrize(("higher", "original"), [(True, 0.9), (False, 0.1)])
def test_the_retained_gain_follows_the_direction_of_the_metric(higher: bool, original: float) -> None:
    half = (0.5 + original) / 2
    assert retained_gain(0.5, original, half, higher_is_better=higher) == pytest.approx(0.5)
    assert retained_gain(0.5, original, half, higher_is_better=not higher) is None


def test_reading_examples_does_not_import_torch() -> None:
    read = """from icmlora.base_models.catalogue import check_examples; check_examples(b'{"text": "a"}')"""
    code = f"import sys; {read}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
