"""Functional refinement on a tiny model: the code comes nearer to what the adapter does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import Example, plain
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.errors import BaseModelUnsuited, DataError
from icmlora.formats.discovery.folder import load_adapter
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.codec.relaxed import RelaxedCode
from icmlora.generator.codec.steps import AdapterSteps, SlotChoice
from icmlora.training import refinement, teacher
from icmlora.training.effect import Effect
from icmlora.training.refinement import FOR_SHARE, Refinable, RefineConfig, items_for, refine
from icmlora.training.teacher import Shortfall, Teacher, shortfalls
from tests.icmlora.tiny_base import load_tiny_base, write_tiny_adapter
from tests.icmlora.untrained import untrained_codec

TEXTS = ["a first text of the task", "another one, of another length", "the third"]
CONFIG = RefineConfig(steps=25, price=0.0, learning_rate=0.05, strength_rate=0.03, texts=2)  # few, long steps


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return load_adapter(write_tiny_adapter(tmp_path / "adapter", strength=2.0))


@pytest.fixture
def coded(adapter: Adapter) -> tuple[Codec, bytes]:
    codec = untrained_codec(adapter)
    return codec, encode_adapter(codec, adapter, {}, limits=Limits(tolerance=0.4)).data


def divergence(base: BaseModel, original: Adapter, other: Adapter) -> float:
    """Return KL(original || other) in nats, summed over all tokens of the texts."""
    total = 0.0
    for text in TEXTS:
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        rows = []
        for side in (original, other):
            with torch.no_grad(), added(base.model, {module.name: (module.a, module.b) for module in side.modules}):
                rows.append(base.model(ids).logits[0].log_softmax(dim=-1))
        total += float((rows[0].exp() * (rows[0] - rows[1])).sum())
    return total


def teacher_of(base: BaseModel, adapter: Adapter) -> Teacher:
    return Teacher(base, factors_of(adapter), base.modality.prepare(base, plain(TEXTS), CONFIG.tokens, whole=True))


def effect_of(base: BaseModel, adapter: Adapter) -> Effect:
    return Effect(teacher_of(base, adapter))


def refined(
    base: BaseModel,
    adapter: Adapter,
    coded: tuple[Codec, bytes],
    config: RefineConfig = CONFIG,
    aim: float | None = None,
) -> bytes:
    codec, data = coded
    relaxed = RelaxedCode(codec, adapter, data)
    work = [Refinable(relaxed, 0.4, teacher_of(base, adapter), effect_of(base, adapter), aim)]
    assert list(refine(work, base, config, range(config.steps))) == list(range(1, config.steps + 1))
    return relaxed.to_code()


def test_a_refined_code_does_more_of_what_the_adapter_does(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]
) -> None:
    codec, data = coded
    before = divergence(base, adapter, codec.decode(data))
    assert divergence(base, adapter, codec.decode(refined(base, adapter, coded))) < 0.7 * before


def test_a_code_without_slots_stays_as_it_is(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    codec, _ = coded
    empty = AdapterSteps(codec, adapter, {}, None).with_slots(100, SlotChoice(keep_weak=False, energy_weighted=False))
    relaxed = RelaxedCode(codec, adapter, empty)
    work = [Refinable(relaxed, 1.0, teacher_of(base, adapter), effect_of(base, adapter), 0.02)]
    assert list(refine(work, base, CONFIG, range(CONFIG.steps))) == []
    assert relaxed.to_code() == empty


def test_steps_that_would_go_too_far_are_shorter(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    codec, data = coded
    before = divergence(base, adapter, codec.decode(data))
    code = refined(base, adapter, coded, replace(CONFIG, learning_rate=50 * CONFIG.learning_rate))
    assert divergence(base, adapter, codec.decode(code)) < 0.8 * before


def test_steps_towards_answers_keep_their_length(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    config = replace(CONFIG, learning_rate=50 * CONFIG.learning_rate)
    paces = []
    for examples in (plain(TEXTS), [Example("a question", text) for text in TEXTS]):
        items = base.modality.prepare(base, examples, CONFIG.tokens, whole=True)
        asked = Teacher(base, factors_of(adapter), items)
        work = Refinable(RelaxedCode(coded[0], adapter, coded[1]), 0.4, asked, Effect(asked), None)
        list(refine([work], base, config, range(2)))
        paces.append(work.pace)
    assert paces[0] < 1 == paces[1]


@pytest.mark.parametrize("is_short", [True, False], ids=["short answers", "text"])
def test_a_code_of_short_answers_ends_near_the_average_of_its_last_steps_unless_more_follow(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes], *, is_short: bool
) -> None:
    relaxed = RelaxedCode(coded[0], adapter, coded[1])
    read = asked(base, adapter, "a question?", "yes") if is_short else teacher_of(base, adapter)
    work = [Refinable(relaxed, 0.4, read, effect_of(base, adapter), None)]

    def now() -> torch.Tensor:
        return torch.cat([values.detach().flatten() for values in relaxed.values])

    def steps(which: range) -> list[torch.Tensor]:
        return [now() for _ in refine(work, base, CONFIG, which)]

    first = steps(range(10))
    assert torch.equal(now(), first[-1])
    last = steps(range(10, CONFIG.steps))
    average = torch.stack(last[-5:]).mean(dim=0)
    assert ((now() - average).norm() < (last[-1] - average).norm() / 2) == is_short
    assert torch.equal(now(), last[-1]) != is_short


@pytest.mark.slow
def test_a_higher_price_gives_a_smaller_code(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    sizes = [len(refined(base, adapter, coded, replace(CONFIG, price=price))) for price in (0.0, 3.0)]
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_a_code_that_is_to_keep_less_of_the_effect_ends_smaller(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]
) -> None:
    config = RefineConfig(steps=40, learning_rate=0.05)
    sizes = [len(refined(base, adapter, coded, config, aim)) for aim in (0.001, 0.4)]
    assert sizes[1] < 0.95 * sizes[0]


@pytest.mark.slow
def test_a_code_that_loses_more_of_other_examples_ends_larger(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]
) -> None:
    config, sizes = RefineConfig(steps=160, learning_rate=0.05), list[int]()
    for elsewhere in (0.0, 1.0):
        relaxed = RelaxedCode(coded[0], adapter, coded[1])
        work = Refinable(relaxed, 0.4, teacher_of(base, adapter), effect_of(base, adapter), 0.4)
        list(refine([work], base, config, range(80)))
        work.compare(elsewhere)
        list(refine([work], base, config, range(80, 160)))
        sizes.append(len(relaxed.to_code()))
    assert sizes[1] > 1.05 * sizes[0]


def test_steps_that_are_done_in_two_parts_read_what_they_read_in_one(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read = RefineConfig(steps=6), list[Sequence[int]]()
    monkeypatch.setattr(refinement, "shortfalls", lambda _, asked: (read.append(asked[0][2]), shortfalls(_, asked))[1])
    work = Refinable(
        RelaxedCode(coded[0], adapter, coded[1]), 0.4, teacher_of(base, adapter), effect_of(base, adapter), None
    )
    for steps in (range(6), range(4), range(4, 6)):
        list(refine([work], base, config, steps))
    assert read[:6] == read[6:]


def asked(base: BaseModel, adapter: Adapter, prompt: str, answer: str) -> Teacher:
    """Return the teacher of eight prompts of the same length."""
    examples = [Example(f"{number} {prompt}", answer) for number in range(8)]
    return Teacher(base, factors_of(adapter), base.modality.prepare(base, examples, 256, whole=True))


@pytest.mark.parametrize(
    ("prompt", "answer", "texts"),
    [
        ("a question?", "yes", [4, 2, 2]),
        ("a question?", "yes, so it is", [1, 1, 1]),
        ("a question " * 17, "yes", [2, 1, 1]),
    ],
)
def test_a_step_reads_some_prompts_where_these_and_their_answers_are_short_and_a_later_one_half_as_many(
    base: BaseModel,
    adapter: Adapter,
    coded: tuple[Codec, bytes],
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    answer: str,
    texts: list[int],
) -> None:
    read = list[int]()
    monkeypatch.setattr(
        refinement, "shortfalls", lambda _, asked: (read.append(len(asked[0][2])), shortfalls(_, asked))[1]
    )
    prompts = asked(base, adapter, prompt, answer)
    work = Refinable(RelaxedCode(coded[0], adapter, coded[1]), 0.4, prompts, effect_of(base, adapter), None)
    list(refine([work], base, RefineConfig(steps=3), range(3)))
    assert read == texts


def test_prompts_that_a_step_of_a_large_model_reads_one_by_one_change_a_code_as_they_do_together(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def values(relaxed: RelaxedCode) -> torch.Tensor:
        return torch.cat([each.detach().flatten() for each in (*relaxed.values, *relaxed.strengths)])

    read, changed = list[int](), list[torch.Tensor]()
    monkeypatch.setattr(
        refinement, "shortfalls", lambda _, asked: (read.append(len(asked[0][2])), shortfalls(_, asked))[1]
    )
    for parameters in (2**32, 1):
        monkeypatch.setattr(teacher, "_WITH_GRADIENTS", parameters)
        relaxed = RelaxedCode(coded[0], adapter, coded[1])
        before = values(relaxed)
        prompts = asked(base, adapter, "a question?", "yes")
        work = Refinable(relaxed, 0.4, prompts, effect_of(base, adapter), None)
        # What answers lose is bounded pass by pass.
        list(refine([work], base, RefineConfig(steps=3, answers=0.0), range(3)))
        changed.append(values(relaxed) - before)
    assert read == [4, 2, 2] + [1] * 8
    together, one_by_one = changed
    assert float((together - one_by_one).abs().mean()) < 0.02 * float(together.abs().mean())


def test_one_text_in_eight_that_is_lost_as_a_whole_changes_little_of_a_code(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read = RefineConfig(steps=40, learning_rate=0.05), list[int]()

    def shortfalls_with_one_lost(base: BaseModel, asked: list[Any]) -> list[Shortfall]:
        read.append(1)
        factor = 1000.0 if len(read) % 8 == 0 else 1.0
        return [
            replace(short, divergence=factor * short.divergence, loss=factor * short.loss, fewest=40)
            for short in shortfalls(base, asked)
        ]

    usual = len(refined(base, adapter, coded, config, aim=0.4))
    monkeypatch.setattr(refinement, "shortfalls", shortfalls_with_one_lost)
    assert len(refined(base, adapter, coded, config, aim=0.4)) == pytest.approx(usual, rel=0.08)


def test_a_code_whose_right_answers_get_less_likely_takes_more_bytes(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RefineConfig(steps=40, learning_rate=0.05)

    def shortfalls_of_right_answers(base: BaseModel, asked: list[Any]) -> list[Shortfall]:
        return [replace(short, less_right=short.less_right + 0.9) for short in shortfalls(base, asked)]

    usual = len(refined(base, adapter, coded, config, aim=0.9))
    monkeypatch.setattr(refinement, "shortfalls", shortfalls_of_right_answers)
    assert len(refined(base, adapter, coded, config, aim=0.9)) > 1.1 * usual


@pytest.mark.slow
def test_the_same_refinement_gives_the_same_code(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    assert refined(base, adapter, coded) == refined(base, adapter, coded)


def test_codes_whose_steps_read_more_texts_are_those_that_are_refined_alone(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]
) -> None:
    teachers = teacher_of(base, adapter), asked(base, adapter, "a question?", "yes")

    def opened() -> list[Refinable]:
        relaxed = (RelaxedCode(coded[0], adapter, coded[1]) for _ in teachers)
        return [Refinable(one, 0.4, read, Effect(read), None) for one, read in zip(relaxed, teachers, strict=True)]

    together, alone = opened(), opened()
    list(refine(together, base, CONFIG, range(5)))
    for one in alone:
        list(refine([one], base, CONFIG, range(5)))
    assert [one.relaxed.to_code() for one in together] == [one.relaxed.to_code() for one in alone]


@pytest.mark.parametrize("by_rows", [True, False])
def test_codes_that_are_refined_together_are_those_that_are_refined_alone(
    base: BaseModel, tmp_path: Path, by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_rows:  # as the experts of a mixture, whose modules see the tokens that are sent to them
        monkeypatch.setattr(teacher, "added_by_rows", raising(BaseModelUnsuited("not by rows")))
    adapters = [load_adapter(write_tiny_adapter(tmp_path / str(n), seed=n, strength=2.0)) for n in (1, 2)]
    codec = untrained_codec(*adapters)

    def opened() -> list[Refinable]:
        codes = [encode_adapter(codec, adapter, {}, limits=Limits(tolerance=0.4)).data for adapter in adapters]
        return [
            Refinable(RelaxedCode(codec, adapter, code), 0.4, teacher_of(base, adapter), effect_of(base, adapter), None)
            for adapter, code in zip(adapters, codes, strict=True)
        ]

    together, alone = opened(), opened()
    config = replace(CONFIG, steps=4)
    assert len(list(refine(together, base, config, range(4)))) == (4 if by_rows else 8)
    for one in alone:
        assert len(list(refine([one], base, config, range(4)))) == 4
    for first, second in zip(together, alone, strict=True):
        for one, other in zip(first.relaxed.values, second.relaxed.values, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def raising(error: Exception) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


def test_the_base_model_is_left_as_it_was(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    refined(base, adapter, coded)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not any(module._forward_hooks for module in base.model.modules())


def test_where_samples_are_few_the_adapted_model_writes_the_others(base: BaseModel, adapter: Adapter) -> None:
    few = base.modality.prepare(base, plain(TEXTS), CONFIG.tokens, whole=True)
    items, _ = items_for(base, adapter, plain(TEXTS), RefineConfig(samples=10, tokens=48))
    assert all(one in items for one in few)
    assert len(few) < len(items) <= 10
    assert all(item.ids[:8] in [one.ids[:8] for one in few] for item in items)


def test_without_samples_the_adapted_model_writes_all_of_them(base: BaseModel, adapter: Adapter) -> None:
    items, _ = items_for(base, adapter, (), RefineConfig(samples=6, tokens=48))
    assert 0 < len(items) <= 6
    assert all(item.size <= 48 for item in items)


def test_what_refinement_reads_does_not_tell_what_a_code_keeps(base: BaseModel, adapter: Adapter) -> None:
    texts = [f"text {number} of the task" for number in range(20)]
    read, held = items_for(base, adapter, plain(texts), replace(FOR_SHARE, samples=8))
    assert len(read) == 3 * len(held)
    assert not [item for item in held if item in read]


def test_more_is_read_of_texts_that_tell_what_a_code_keeps(base: BaseModel, adapter: Adapter) -> None:
    texts = [f"{number} {'text of the task, which is long' * 10}" for number in range(8)]
    read, held = items_for(base, adapter, plain(texts), replace(FOR_SHARE, samples=8, tokens=32, sample_tokens=64))
    assert ({item.size for item in read}, {item.size for item in held}) == ({32}, {64})


def test_of_a_single_text_refinement_reads_what_tells(base: BaseModel, adapter: Adapter) -> None:
    read, held = items_for(base, adapter, plain(TEXTS[:1]), replace(FOR_SHARE, samples=1))
    assert read == held
    assert len(read) == 1


def test_the_same_seed_writes_the_same_texts_and_leaves_the_global_generator_alone(
    base: BaseModel, adapter: Adapter
) -> None:
    state = torch.get_rng_state()
    written = [items_for(base, adapter, (), RefineConfig(samples=4, tokens=32, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert written[0] == written[1] != written[2]


def test_what_is_written_shows_the_adapter(base: BaseModel, adapter: Adapter) -> None:
    strong = replace(adapter, modules=tuple(replace(module, b=10 * module.b) for module in adapter.modules))
    config = RefineConfig(samples=4, tokens=32)
    assert items_for(base, strong, (), config) != items_for(base, adapter, (), config)


def test_a_model_that_writes_nothing_needs_samples(
    base: BaseModel, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLM, "written", lambda *_, **__: [])
    with pytest.raises(DataError, match="no text to refine on"):
        items_for(base, adapter, (), CONFIG)


def test_texts_without_a_token_to_predict_are_refused(base: BaseModel, adapter: Adapter) -> None:
    with pytest.raises(DataError, match="no example"):
        items_for(base, adapter, plain([""]), CONFIG)
