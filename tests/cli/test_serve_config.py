"""`icm serve --print-config`: the lines that start an engine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from icmlora.fleet.resources.code_source import StoreCodes
from icmlora.serving.base import EngineBase
from icmlora.serving.requirements import VLLM_RANKS, Config, EngineName, config_problem
from icmlora.serving.tasks import open_tasks
from registry.manifests import Task
from registry.store import Store
from tests.cli.coded import damage
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
VLLM = ("python", "-m", "vllm.entrypoints.openai.api_server", "--model")


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_vllm_gets_the_plug_ins_environment(icm: Icm, trained: Path, mixed_template: Path) -> None:
    ran = icm("serve", "--print-config", "vllm")
    lines = ran.out.splitlines()
    assert lines[:-1] == [
        "export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        f"export ICM_STORE={trained}",
        f"export ICM_BASE_MODEL={LABEL}",
    ]
    words = shlex.split(lines[-1])
    assert words[:7] == [*VLLM, str(mixed_template / "base"), "--served-model-name", LABEL]
    assert "--enable-lora" in words
    assert (option(words, "--max-lora-rank"), option(words, "--max-loras")) == ("8", "3"), "rules has rank 4"
    assert ran.err == f"3 tasks of {LABEL}; largest rank 8\n"


def test_a_bundle_takes_the_place_of_the_store(icm: Icm, trained: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "our fleet.icm"
    icm("export", bundle)
    ran = icm("serve", "--print-config", "vllm", "--from", bundle)
    assert f"export ICM_BUNDLE={shlex.quote(str(bundle))}" in ran.out.splitlines()
    assert "ICM_STORE" not in ran.out
    assert "base model is not on this machine" in ran.err, "a bundle does not say where it is"
    assert "icm base add" not in ran.err, "that is for stores"
    assert f"`hf download {LABEL}`" in ran.err


def test_a_folder_given_in_place_of_a_missing_base_model_is_taken_for_it(
    icm: Icm, trained: Path, tmp_path: Path, mixed_template: Path
) -> None:
    icm("export", bundle := tmp_path / "fleet.icm")
    ran = icm("serve", "--print-config", "vllm", "--from", bundle)
    assert "--model FOLDER" in ran.err
    (named,) = re.findall("^export ICM_BASE_MODEL=(.*)$", ran.out, re.MULTILINE)
    tasks = open_tasks(None, bundle, command="test")
    found = tasks.find("poems")
    assert found is not None
    assert EngineBase(str(mixed_template / "base"), tasks, named).problem(found) is None


def test_what_is_no_peft_folder_is_left_out_and_said(icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tasks(codes: StoreCodes, base_model: str) -> Iterator[Task]:
        for task in real(codes, base_model):
            form = "mlx" if task.name == "rules" else task.final.format
            yield replace(task, final=replace(task.final, format=form))

    real = StoreCodes.tasks
    monkeypatch.setattr(StoreCodes, "tasks", tasks)
    plan = icm("serve", "--print-config", "vllm", "--json").document
    assert [one["task"] for one in plan["left_out"]] == ["rules"]
    assert plan["tasks_count"] == 2


def test_tasks_with_a_damaged_configuration_are_left_out_by_name(icm: Icm, trained: Path) -> None:
    with Store.open(trained) as store:
        configs = {name: store.task(name).final.config for name in ("poems", "rules", "silent")}
    damage(trained, configs["rules"])  # tasks may share it
    ran = icm("serve", "--print-config", "vllm", "--json")
    assert (ran.code, ran.document["tasks_count"]) == (
        0,
        sum(config != configs["rules"] for config in configs.values()),
    )
    left_out = {one["task"]: one["reason"] for one in ran.document["left_out"]}
    assert left_out.keys() == {name for name, config in configs.items() if config == configs["rules"]}
    assert "damaged" in left_out["rules"]


def test_vllm_behind_the_gateway_needs_no_plug_in(icm: Icm, trained: Path) -> None:
    first, second, third = icm("serve", "--print-config", "vllm", "--gateway").out.splitlines()
    assert first == "export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    assert second.startswith(" ".join(VLLM))
    assert second.endswith(" &")
    words = shlex.split(third)
    assert words[:6] == ["icm", "serve", "--engine", "vllm", "--engine-url", "http://127.0.0.1:8000"]
    assert (option(words, "--store"), option(words, "--base-model")) == (str(trained), LABEL)


def test_sglang_gets_a_gateway_and_what_it_cannot_serve_is_named(icm: Icm, trained: Path) -> None:
    ran = icm("serve", "--print-config", "sglang")
    first, second = ran.out.splitlines()
    words = shlex.split(first.removesuffix(" &"))
    assert words[:4] == ["python", "-m", "sglang.launch_server", "--model-path"]
    assert option(words, "--max-lora-rank") == "2"
    at = words.index("--lora-target-modules")
    assert words[at + 1 : at + 3] == ["q_proj", "v_proj"]
    assert "--engine sglang" in second
    assert "warning: rules: SGLang needs q_proj and v_proj together" in ran.err
    assert "warning: silent: SGLang needs q_proj and v_proj together" in ran.err


def test_the_plan_as_json(icm: Icm, trained: Path) -> None:
    found = icm("serve", "--print-config", "sglang", "--json").document
    assert (found["engine"], found["base_model"], found["tasks_count"]) == ("sglang", LABEL, 1)
    assert [command[0] for command in found["commands"]] == ["python", "icm"]
    assert [entry["task"] for entry in found["left_out"]] == ["rules", "silent"]


def test_the_largest_rank_decides(icm: Icm, trained: Path, tmp_path: Path) -> None:
    for rank, least in ((9, "16"), (33, "64"), (300, "320")):
        icm("ingest", write_lora(tmp_path / f"rank-{rank}", rank=rank, seed=rank))
        assert f"--max-lora-rank {least} " in icm("serve", "--print-config", "vllm").out
    ran = icm("ingest", write_lora(tmp_path / "rank-600", rank=600, seed=600))
    assert ran.code == 0
    again = icm("serve", "--print-config", "vllm")
    assert "--max-lora-rank 320 " in again.out
    assert "rank-600: rank 600 is above 512" in again.err


def test_several_base_models_want_a_choice(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "other", base_model_name_or_path="acme/other"))
    ran = icm("serve", "--print-config", "vllm")
    assert (ran.code, "choose one with --base-model" in ran.err) == (1, True)
    ran = icm("serve", "--print-config", "vllm", "--base-model", "acme/other")
    assert f"{' '.join(VLLM)} acme/other --enable-lora" in ran.out
    assert "`icm base add acme/other PATH`" in ran.err
    assert icm("serve", "--print-config", "vllm", "--base-model", "acme/none").code == 1


def test_an_empty_store_serves_nothing(icm: Icm, trained: Path) -> None:
    icm("rm", "poems", "rules", "silent", "--yes")
    ran = icm("serve", "--print-config", "vllm")
    assert (ran.code, "there are no tasks to serve" in ran.err) == (1, True)


def test_an_engine_that_can_serve_no_task_is_said_so(icm: Icm, trained: Path) -> None:
    icm("rm", "poems", "--yes")
    ran = icm("serve", "--print-config", "sglang")
    assert (ran.code, "sglang cannot serve any task" in ran.err) == (1, True)


@pytest.mark.parametrize(
    ("engine", "config", "problem"),
    [
        ("vllm", {"use_dora": True}, "vLLM does not support use_dora"),
        ("vllm", {"bias": "lora_only"}, "vLLM does not support bias 'lora_only'"),
        ("vllm", {"lora_bias": True}, "vLLM does not support lora_bias"),
        ("vllm", {"init_lora_weights": "pissa_niter_4"}, "vLLM does not support init_lora_weights 'pissa_niter_4'"),
        ("vllm", {"modules_to_save": ["score", "lm_head"]}, "vLLM does not support modules_to_save lm_head"),
        ("vllm", {"trainable_token_indices": [1]}, "vLLM does not support trainable_token_indices"),
        (
            "vllm",
            {"r": 8, "rank_pattern": {"q_proj": 513}},
            "rank 513 is above 512, the largest rank that vLLM supports",
        ),
        ("vllm", {"use_rslora": True, "alpha_pattern": {"q": 1}, "modules_to_save": ["score"]}, None),
        ("vllm", {"init_lora_weights": "Gaussian", "bias": "none", "modules_to_save": None}, None),
        ("sglang", {"use_dora": True}, "SGLang does not support use_dora"),
        ("sglang", {"use_rslora": True}, "SGLang ignores use_rslora"),
        ("sglang", {"rank_pattern": {"q_proj": 4}}, "SGLang ignores rank_pattern"),
        ("sglang", {"alpha_pattern": {"q_proj": 4}}, "SGLang ignores alpha_pattern"),
        ("sglang", {"bias": "all"}, "SGLang does not support bias 'all'"),
        ("sglang", {"target_modules": ".*q_proj"}, "SGLang does not support a pattern in target_modules"),
        ("sglang", {"target_modules": ["q_proj"]}, "SGLang needs q_proj and v_proj together"),
        ("sglang", {"target_modules": ["down_proj"], "rank_pattern": {}}, None),
        ("sglang", {"target_modules": "all-linear"}, None),
    ],
)
def test_what_an_engine_cannot_serve(engine: EngineName, config: Config, problem: str | None) -> None:
    assert config_problem(engine, {"peft_type": "LORA", "r": 8, **config}) == problem


def test_the_ranks_of_vllm_grow() -> None:
    assert sorted(VLLM_RANKS) == list(VLLM_RANKS)
