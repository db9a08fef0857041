"""`icm train`."""

import os
import re
import signal
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from icm_cli.commands import train as command
from icm_cli.errors import ExitCode
from icm_cli.session import Session
from icmlora.fleet.context import Event
from icmlora.fleet.encode.report import TaskEncoded
from icmlora.fleet.measure.report import TaskEvaluated
from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.fleet.train import generator as publishing, run as training
from icmlora.training.effect import Effect, EffectLoss
from registry.store import Store
from tests.cli.coded import current
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import STEPS, write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
TRAIN = ("train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS)


def content(store: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file() and path.name != "lock"}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, by: signal.Signals = signal.SIGINT) -> None:
    """Press Ctrl-C once, or send another signal, when a step is done."""

    def fit(*arguments: Any) -> Generator[Any, None, None]:
        for at in real(*arguments):
            if at.step == step:
                os.kill(os.getpid(), by)
            yield at

    real = training.fit
    monkeypatch.setattr(training, "fit", fit)


def test_cuda_without_a_gpu_is_an_error_that_changes_nothing(
    icm: Icm, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = content(mixed)
    ran = icm("train", "--device", "cuda", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "device_unavailable")
    assert "--device cpu" in ran.error["hint"]
    assert content(mixed) == before


def test_every_task_of_a_mixed_fleet_gets_a_code(icm: Icm, trained: Path) -> None:
    rows = icm("ls", "--json").document
    assert [row["name"] for row in rows if row["code_size"]] == ["poems", "rules", "silent"]
    # The tolerance of quality 4 is 0.11 of the weighted dW; unweighted it may be more.
    assert [row for row in rows if not 0 < row["relative_error"] < 0.7] == []


def test_json_lines_keep_their_names(icm: Icm, mixed: Path) -> None:
    events = {event["type"]: event for event in icm(*TRAIN, "--json").events}
    assert set(events) == {"step", "code", "trained"}
    assert set(events["step"]) == {
        "type", "base_model", "step", "steps", "task", "bits", "latent_bits", "norm_bits", "token_bits",
        "learning_rate", "mean_bits",
    }  # fmt: skip
    assert set(events["code"]) == {"type", "task", "size", "relative_error", "squared_error"}
    assert set(events["trained"]) == {
        "type", "base_model", "version", "generator", "generator_size", "tasks", "codes_size", "metrics",
        "start_dropped", "left_out", "earlier_codes", "replaced_bytes",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_generator(icm: Icm, mixed: Path, trained_template: Path) -> None:
    icm(*TRAIN)
    assert current(mixed).blob == current(trained_template).blob


@pytest.mark.slow
def test_another_seed_gives_another_generator(icm: Icm, mixed: Path, trained_template: Path) -> None:
    icm(*TRAIN, "--seed", 1)
    assert current(mixed).blob != current(trained_template).blob


@pytest.mark.one_case
@pytest.mark.parametrize(("step", "by"), [(1, signal.SIGINT), (STEPS, signal.SIGINT), (3, signal.SIGTERM)])
def test_a_stopped_run_goes_on_to_the_very_same_generator(
    icm: Icm, mixed: Path, trained_template: Path, monkeypatch: pytest.MonkeyPatch, step: int, by: signal.Signals
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, by)
        ran = icm(*TRAIN, "--json")
    assert (ran.code, f"step {step}" in ran.error["message"]) == (ExitCode.INTERRUPTED, True)
    again = icm(*TRAIN, "--json").events
    assert again[0] == {"type": "resumed", "base_model": LABEL, "step": step}
    assert current(mixed).blob == current(trained_template).blob


def test_ctrl_c_while_it_encodes_publishes_nothing(icm: Icm, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    real = publishing.encode_adapter
    monkeypatch.setattr(publishing, "encode_adapter", encode)
    assert icm(*TRAIN).code == ExitCode.INTERRUPTED
    with Store.open(mixed) as store:
        assert store.generator(LABEL) is None


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("event_type", "options", "told", "go_on"),
    [
        (TaskEncoded, ("--refine", 1), "encoded 1 task", "run `icm encode` to refine the rest"),
        (TaskEncoded, ("--max-error", 0.5), "encoded 1 task", "`icm encode` with the same limits"),
        (TaskEvaluated, ("--refine", 0), "measured 1 task", "run `icm eval` to measure the rest"),
    ],
    ids=["refining", "limits", "measuring"],
)
def test_a_stop_after_the_training_keeps_the_generator_and_says_how_to_go_on(
    icm: Icm,
    mixed: Path,
    monkeypatch: pytest.MonkeyPatch,
    event_type: type[Event],
    options: tuple[object, ...],
    told: str,
    go_on: str,
) -> None:
    def tell(session: Session, event: Event) -> None:
        if isinstance(event, event_type):
            os.kill(os.getpid(), signal.SIGINT)
        real(session, event)

    real = command._print_step
    monkeypatch.setattr(command, "_print_step", tell)
    ran = icm("train", "--device", "cpu", "--steps", STEPS, *options)
    assert (ran.code, f"generator 1 of {LABEL}" in ran.out) == (ExitCode.INTERRUPTED, True)
    assert f"interrupted; {told}" in ran.err
    assert go_on in ran.err
    assert current(mixed).version == 1


@pytest.mark.slow
def test_a_stopped_run_is_not_continued_on_another_fleet(
    icm: Icm, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        icm(*TRAIN)
    icm("ingest", write_lora(tmp_path / "more" / "extra", seed=9), "--no-vectors")
    assert "resumed" not in {event["type"] for event in icm(*TRAIN, "--json").events}


@pytest.mark.slow
def test_no_resume_starts_over(icm: Icm, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        icm(*TRAIN)
    assert icm(*TRAIN, "--no-resume", "--json").events[-1]["metrics"]["resumed_from"] == 0


@pytest.mark.slow
def test_after_a_further_ingest_the_present_generator_is_trained_on(icm: Icm, trained: Path, tmp_path: Path) -> None:
    first = current(trained)
    targets = ("self_attn.k_proj", "mlp.down_proj")
    icm("ingest", write_lora(tmp_path / "more" / "extra", seed=9, rank=8, targets=targets), "--device", "cpu")
    assert icm(*TRAIN).code == 0
    second = current(trained)
    assert (second.version, second.trained_from) == (2, first.blob)
    assert all(row["code_size"] for row in icm("ls", "--json").document)


@pytest.mark.slow
def test_training_again_says_from_where_and_what_is_new(icm: Icm, trained: Path, tmp_path: Path) -> None:
    again = icm(*TRAIN, "--json").events
    assert again[0] == {"type": "continued", "base_model": LABEL, "version": 1, "new_tasks": 0}
    icm("ingest", write_lora(tmp_path / "more" / "extra", seed=9), "--no-vectors")
    assert f"continuing from generator 2 of {LABEL}: 1 new task" in icm(*TRAIN).err


def write_tiny(folder: Path) -> Path:
    """Write an adapter whose numbers are too small for any step of a quantiser."""
    write_lora(folder, seed=3)
    path = folder / "adapter_model.safetensors"
    save_file({name: 1e-12 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_task_that_cannot_be_encoded_is_named_and_costs_the_others_nothing(
    icm: Icm, mixed: Path, tmp_path: Path
) -> None:
    icm("ingest", write_tiny(tmp_path / "more" / "tiny"), "--no-vectors")
    ran = icm(*TRAIN, "--json")
    assert ran.code == ExitCode.PARTLY
    assert set(ran.events[-1]["left_out"]) == {"tiny"}
    assert {row["name"] for row in icm("ls", "--json").document if row["code_size"]} == {"poems", "rules", "silent"}
    assert icm("materialize", "tiny", "-o", tmp_path / "out").code == 0


@pytest.mark.slow
def test_an_update_names_it_too(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_tiny(tmp_path / "more" / "tiny"), write_lora(tmp_path / "more" / "extra"), "--no-vectors")
    ran = icm("train", "--update", "--no-eval", "--refine", "0", "--steps", STEPS, "--device", "cpu")
    assert ran.code == ExitCode.PARTLY
    assert "tiny was not encoded" in ran.err
    assert {row["name"] for row in icm("ls", "--json").document if not row["code_size"]} == {"tiny"}


@pytest.mark.slow
def test_a_fleet_of_nothing_but_such_tasks_is_an_error(icm: Icm, tmp_path: Path) -> None:
    icm("ingest", write_tiny(tmp_path / "loras" / "tiny"), "--no-vectors")
    ran = icm(*TRAIN, "--json")
    assert (ran.code, "'tiny'" in ran.error["message"]) == (ExitCode.FAILED, True)


@pytest.mark.slow
def test_a_rank_that_does_not_fit_in_a_byte_has_a_code_beside_earlier_ones(
    icm: Icm, trained: Path, tmp_path: Path
) -> None:
    icm("ingest", write_lora(tmp_path / "more" / "wide", rank=260), "--no-vectors")
    assert icm("train", "--update", "--no-eval", "--refine", "0", "--steps", STEPS, "--device", "cpu").code == 0
    done = icm("materialize", "wide", "--source", "code", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in written.values()} <= {16, 32}
    assert {max(tensor.shape) for tensor in written.values()} == {260}


@pytest.mark.slow
def test_a_task_that_falls_short_of_a_limit_does_not_keep_the_rest_from_being_measured(
    icm: Icm, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Effect, "lost", lambda *_, **__: EffectLoss(0.5, 0.5))
    ran = icm("train", "--steps", STEPS, "--device", "cpu", "--keep", "0.98", "--refine", "0")
    assert ran.code == ExitCode.PARTLY
    assert "CODE GAIN" in ran.out


@pytest.mark.slow
def test_training_on_keeps_the_quality_of_the_present_generator(icm: Icm, mixed: Path) -> None:
    icm(*TRAIN, "--quality", 2)
    icm(*TRAIN)
    assert current(mixed).config["tolerance"] == 0.25


@pytest.mark.slow
def test_fresh_starts_without_the_present_generator(icm: Icm, trained: Path) -> None:
    before = current(trained)
    icm(*TRAIN, "--fresh")
    after = current(trained)
    assert (after.version, after.trained_from, after.blob) == (2, None, before.blob)


@pytest.mark.slow
def test_another_width_needs_a_fresh_start(icm: Icm, trained: Path) -> None:
    ran = icm(*TRAIN, "--width", 8, "--json")
    assert ran.code == ExitCode.FAILED
    assert "--fresh" in ran.error["hint"]
    assert icm(*TRAIN, "--width", 8, "--fresh").code == 0


def test_the_same_weights_under_another_alpha_are_another_adapter(icm: Icm, tmp_path: Path) -> None:
    for name, alpha in (("weak", 1), ("strong", 64)):
        write_lora(tmp_path / "loras" / name, alpha=alpha)
    icm("ingest", tmp_path / "loras", "--no-vectors")
    with Store.open(tmp_path / "store") as store:
        fleet = StoreAdapterSource.of_base(store, LABEL)
        assert not fleet.load(0, None).modules[0].b.equal(fleet.load(1, None).modules[0].b)


@pytest.mark.slow
def test_a_checkpoint_of_a_higher_rank_is_covered(icm: Icm, tmp_path: Path) -> None:
    write_lora(tmp_path / "loras" / "odd", rank=1)
    write_lora(tmp_path / "loras" / "odd" / "checkpoint-3", rank=6, targets=("mlp.down_proj",))
    icm("ingest", tmp_path / "loras", "--no-vectors")
    assert icm(*TRAIN).code == 0
    assert current(tmp_path / "store").config["slots"] == 6


@pytest.mark.slow
def test_an_adapter_that_does_nothing_is_left_out_and_keeps_its_original(icm: Icm, mixed: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "zeros", alpha=0)
    assert icm("ingest", folder, "--device", "cpu").code == 0
    ran = icm(*TRAIN)
    assert (ran.code, "zeros was not encoded: does nothing" in ran.err) == (ExitCode.PARTLY, True)
    assert icm("materialize", "zeros", "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()


@pytest.mark.slow
def test_a_task_that_is_replaced_meanwhile_gets_no_code_and_is_named(
    icm: Icm, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*arguments: Any) -> Generator[Any, None, None]:
        yield from real(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(training, "fit", real)
            assert icm("ingest", tmp_path / "new" / "poems", "--on-conflict", "version", "--no-vectors").code == 0

    write_lora(tmp_path / "new" / "poems", seed=77)
    real = training.fit
    monkeypatch.setattr(training, "fit", fit)
    ran = icm(*TRAIN)
    assert (ran.code, "poems was not encoded: its adapter was replaced" in ran.err) == (3, True)
    codes = {row["name"]: row["code_size"] for row in icm("ls", "--json").document}
    assert codes["poems"] is None
    assert codes["rules"]


@pytest.mark.slow
def test_a_diverged_training_says_so_and_keeps_the_present_generator(
    icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*arguments: Any) -> Generator[Any, None, None]:
        yield from (replace(at, bits=float("nan")) for at in real(*arguments))

    before, real = current(trained), training.fit
    monkeypatch.setattr(training, "fit", fit)
    ran = icm(*TRAIN, "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "generator_error")
    assert "--lr" in ran.error["hint"]
    assert current(trained) == before


def test_an_empty_store_has_nothing_to_train_on(icm: Icm, mixed_template: Path) -> None:
    icm("base", "add", LABEL, mixed_template / "base")
    ran = icm("train", "--json")
    assert (ran.code, "icm ingest" in ran.error["hint"]) == (ExitCode.FAILED, True)


def test_a_base_model_without_tasks_is_an_error_that_names_it(icm: Icm, mixed: Path) -> None:
    assert "'no/such'" in icm("train", "--base-model", "no/such").err


def test_without_a_store_it_says_so(icm: Icm) -> None:
    assert icm("train").code == ExitCode.NO_STORE


@pytest.mark.slow
def test_without_the_base_model_it_trains_and_says_why_it_did_not_measure(icm: Icm, mixed: Path) -> None:
    icm("base", "rm", LABEL)
    ran = icm("train", "--device", "cpu", "--steps", STEPS)
    assert ran.code == 0
    assert "not evaluated: " in ran.err
    assert "hint: run `icm eval`" in ran.err


def test_it_measures_what_the_codes_kept(icm: Icm, mixed: Path) -> None:
    ran = icm("train", "--device", "cpu", "--steps", STEPS, "--refine", "2")
    assert "CODE GAIN" in ran.out
    assert "1 of 3 tasks" in ran.err


def test_text_says_what_was_made(icm: Icm, mixed: Path) -> None:
    ran = icm(*TRAIN)
    assert re.fullmatch(rf"generator 1 of {LABEL}: [\d.]+ KiB; 3 codes, [\d.]+ \w+ in total\n", ran.out)
    assert "recovered no initialisation seeds; codes are larger without them" in ran.err


@pytest.mark.slow
def test_a_stopped_training_prints_the_generators_that_are_done(
    icm: Icm, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_lora(tmp_path / "more" / "later", seed=9, base_model_name_or_path="zzz/last")
    assert icm("ingest", folder, "--no-vectors").code == 0
    calls = []

    def fit(*arguments: Any) -> Generator[Any, None, None]:
        calls.append(arguments)
        for at in real(*arguments):
            if len(calls) == 2 and at.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield at

    real = training.fit
    monkeypatch.setattr(training, "fit", fit)
    ran = icm(*TRAIN)
    assert (ran.code, f"generator 1 of {LABEL}" in ran.out) == (ExitCode.INTERRUPTED, True)
    assert "zzz/last" not in ran.out
    assert "step 2" in ran.err
