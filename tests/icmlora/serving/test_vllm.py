"""The plug-in for vLLM, with what it touches of vLLM written down as vLLM 0.32 has it.

`python -m tests.benchmarks.serving.vllm` runs it in the real engine.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from icmlora import Fleet
from icmlora.serving import store
from icmlora.serving.vllm import IcmResolver, register
from tests.cli.tiny_fleet import icm_quietly, write_lora
from tests.icmlora.serving.conftest import Served, Team, folder_bytes
from tests.icmlora.tiny_base import HIDDEN, LABEL, write_tiny_base

SERVING = "vllm.entrypoints.serve.engine.serving"


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any: ...


@dataclass
class Registry:
    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def get_supported_resolvers(self) -> Any:
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        assert resolver_name not in self.resolvers, "vLLM warns about a resolver that is registered twice"
        self.resolvers[resolver_name] = resolver


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class BaseServing:
    """Where a request begins: what is loaded already is not resolved again."""

    def __init__(self, model: str, resolver: IcmResolver) -> None:
        self.models = self
        self.model_config = SimpleNamespace(model=model)
        self.engine_client = self
        self.resolver = resolver
        self.lora_requests: dict[str, LoRARequest] = {}
        self.lora_resolver_lock: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.lora_id_counter = SimpleNamespace(inc=lambda step: next(self._numbers))
        self.loaded: list[LoRARequest] = []
        self.refuses = False
        self._numbers = count(1)

    @staticmethod
    def create_error_response(message: str, err_type: str, status_code: int) -> str:
        return f"{int(status_code)} {err_type}: {message}"

    async def add_lora(self, request: LoRARequest) -> None:
        if self.refuses:
            raise ValueError("rank 64 is too much")
        self.loaded.append(request)

    async def _check_model(self, request: Any) -> str | None:
        if request.model not in self.lora_requests:
            found = await self.resolver.resolve_lora(self.model_config.model, request.model)
            if found is None:
                status = HTTPStatus.NOT_FOUND
                return self.create_error_response(message="unknown", err_type="NotFoundError", status_code=status)
            found.lora_int_id = self.lora_id_counter.inc(1)
            await self.add_lora(found)
            self.lora_requests[request.model] = found
        return None

    def ask(self, *names: str) -> list[LoRARequest | None]:
        """Send requests, one after the other, and return what is served to each."""

        async def requests() -> list[LoRARequest | None]:
            found = []
            for name in names:
                await self._check_model(SimpleNamespace(model=name))
                found.append(self.lora_requests.get(name))
            return found

        return asyncio.run(requests())


@pytest.fixture
def vllm(resolver: IcmResolver, served: Served) -> BaseServing:
    made: BaseServing = vars(sys.modules[SERVING])["BaseServing"](str(served.base), resolver)
    return made


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    found = Registry()
    modules: dict[str, dict[str, object]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": found},
        # A class of its own for each test: the plug-in replaces a method.
        SERVING: {"BaseServing": type("BaseServing", (BaseServing,), {"_check_model": BaseServing._check_model})},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture
def resolver(registry: Registry, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IcmResolver:
    monkeypatch.setenv("ICM_STORE", str(served.store))
    monkeypatch.setenv("ICM_ADAPTERS", str(tmp_path / "adapters"))
    register()
    (found,) = registry.resolvers.values()
    assert isinstance(found, IcmResolver)
    assert isinstance(found, LoRAResolver)
    return found


def ask(resolver: IcmResolver, model: str | Path, name: str) -> LoRARequest | None:
    found: LoRARequest | None = asyncio.run(resolver.resolve_lora(str(model), name))
    return found


def test_vllm_finds_the_plug_in() -> None:
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "icm")
    assert found.load() is register


def test_a_task_is_written_when_it_is_asked_for(resolver: IcmResolver, served: Served, tmp_path: Path) -> None:
    found = ask(resolver, served.base, "poems")
    assert found is not None
    assert (found.lora_name, found.lora_int_id >= 1) == ("poems", True)
    Fleet(served.store).materialize("poems", tmp_path / "by-hand")
    assert folder_bytes(Path(found.lora_path)) == folder_bytes(tmp_path / "by-hand")


def test_the_same_task_has_the_same_folder_again(resolver: IcmResolver, served: Served) -> None:
    first, second = (ask(resolver, served.base, "rules") for _ in range(2))
    assert first == second


def test_a_task_that_was_encoded_anew_has_another_folder(resolver: IcmResolver, served: Served) -> None:
    first = ask(resolver, served.base, "rules")
    Fleet(served.store).evict(["rules"], max_error=10)
    second = ask(resolver, served.base, "rules")
    assert first is not None
    assert second is not None
    assert first.lora_path != second.lora_path
    assert Path(first.lora_path).is_dir()  # vLLM may read it again


def test_a_task_that_changes_is_served_anew_with_the_next_request(vllm: BaseServing, served: Served) -> None:
    (first,) = vllm.ask("rules")
    Fleet(served.store).evict(["rules"], max_error=10)
    second, third = vllm.ask("rules", "rules")
    assert first is not None
    assert second is not None
    assert second is third
    assert (first.lora_path, first.lora_int_id) != (second.lora_path, second.lora_int_id)
    assert Path(first.lora_path).is_dir()  # for requests that run on it
    assert [request.lora_int_id for request in vllm.loaded] == [1, 2]


def test_a_change_of_other_tasks_loads_nothing_again(vllm: BaseServing, served: Served) -> None:
    (first,) = vllm.ask("poems")
    Fleet(served.store).evict(["rules"], max_error=10)
    assert vllm.ask("poems") == [first]
    assert len(vllm.loaded) == 1


def test_a_task_that_is_renamed_or_removed_is_no_longer_served(vllm: BaseServing, served: Served) -> None:
    vllm.ask("rules", "silent")
    fleet = Fleet(served.store)
    fleet.edit(["rules"], name="laws")
    fleet.remove(["silent"])
    assert [found is not None for found in vllm.ask("rules", "laws", "silent")] == [False, True, False]


def test_a_new_adapter_that_vllm_refuses_is_not_replaced_by_the_old_one(
    vllm: BaseServing, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    vllm.ask("rules")
    Fleet(served.store).evict(["rules"], max_error=10)
    vllm.refuses = True
    with pytest.raises(ValueError, match="rank 64"):
        vllm.ask("rules")
    assert "refused the new adapter of 'rules'" in caplog.text
    vllm.refuses = False
    assert vllm.ask("rules") != [None]


def test_while_the_store_cannot_be_read_vllm_goes_on_with_what_it_has(vllm: BaseServing, served: Served) -> None:
    (first,) = vllm.ask("rules")
    (served.store / "registry.db").rename(served.store / "away.db")
    assert vllm.ask("rules") == [first]


def test_an_adapter_from_elsewhere_is_left_alone(vllm: BaseServing, tmp_path: Path) -> None:
    vllm.ask("poems")
    own = vllm.lora_requests["rules"] = LoRARequest("rules", 9, str(tmp_path))
    assert vllm.ask("rules") == [own]


def test_a_vllm_without_the_method_says_that_it_does_not_follow(
    resolver: IcmResolver, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, SERVING)
    assert ask(resolver, served.base, "poems") is not None
    assert "until it is restarted" in caplog.text


@pytest.mark.parametrize("name", ["unknown", "", "../poems", "poems\x00", "x" * 10_000, "Poems"])
def test_an_unknown_name_gives_none_and_one_line(
    resolver: IcmResolver, served: Served, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, "vllm.icm")
    assert ask(resolver, served.base, name) is None
    (line,) = (record.getMessage() for record in caplog.records if record.name == "vllm.icm")
    assert "\n" not in line
    assert len(line) < 300


def test_a_copy_of_the_base_model_is_the_base_model(resolver: IcmResolver, served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.base, tmp_path / "copy")
    assert ask(resolver, tmp_path / "copy", "poems") is not None


def test_the_name_of_the_base_model_is_enough(resolver: IcmResolver) -> None:
    assert ask(resolver, LABEL, "poems") is not None


def test_a_task_of_another_base_model_is_not_served(
    resolver: IcmResolver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_base(tmp_path / "other", seed=7)
    assert ask(resolver, tmp_path / "other", "poems") is None
    assert "the engine runs" in caplog.text


def test_the_user_may_say_which_base_model_the_engine_runs(
    resolver: IcmResolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICM_BASE_MODEL", LABEL)
    assert ask(resolver, tmp_path / "not-on-this-machine", "poems") is not None


def test_a_model_with_other_weights_than_the_user_says_is_warned_about(
    resolver: IcmResolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ICM_BASE_MODEL", LABEL)
    write_tiny_base(tmp_path / "other", seed=7)
    assert ask(resolver, tmp_path / "other", "poems") is not None
    (told,) = (record for record in caplog.records if f"whose weights differ from {LABEL!r}" in record.message)
    assert told.name.startswith("vllm.")  # it shows no others


def test_an_adapter_whose_modules_the_model_lacks_is_not_served(
    resolver: IcmResolver, served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_lora(tmp_path / "stray", seed=9)
    weights = folder / "adapter_model.safetensors"
    renamed = {name.replace(".layers.1.", ".layers.9."): value for name, value in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    icm_quietly(served.store, "ingest", folder, "--no-vectors")
    assert ask(resolver, served.base, "stray") is None
    assert "no module 'model.layers.9.self_attn.q_proj'" in caplog.text


def test_an_adapter_of_another_width_is_not_served(
    resolver: IcmResolver, served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = write_lora(tmp_path / "wide", seed=9)
    weights = folder / "adapter_model.safetensors"
    wide = {
        name: torch.cat([value, value], dim=1) if "lora_A" in name else value
        for name, value in load_file(weights).items()
    }
    save_file(wide, weights, metadata={"format": "pt"})
    icm_quietly(served.store, "ingest", folder, "--no-vectors")
    assert ask(resolver, served.base, "wide") is None
    assert f"not [{HIDDEN}, {2 * HIDDEN}]" in caplog.text


def test_a_damaged_code_gives_none_and_the_others_are_served(
    resolver: IcmResolver, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    code = Fleet(served.store).show("poems").task.code
    assert code is not None
    (blob,) = (served.store / "blobs").rglob(f"*{code.blob}")
    blob.chmod(0o600)
    blob.write_bytes(b"damaged")
    assert ask(resolver, served.base, "poems") is None
    assert "damaged" in caplog.text
    assert ask(resolver, served.base, "rules") is not None


def test_a_store_that_is_not_there_gives_none(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ICM_STORE", str(tmp_path / "missing"))
    monkeypatch.setenv("ICM_ADAPTERS", str(tmp_path / "adapters"))
    assert ask(IcmResolver(), "base", "poems") is None
    assert "no store" in caplog.text


@pytest.mark.parametrize("name", ["ICM_STORE", "ICM_BUNDLE"])
def test_a_wrong_place_is_said_when_vllm_starts(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.delenv("ICM_STORE", raising=False)
    monkeypatch.setenv(name, str(tmp_path / "missing"))
    register()
    assert f"{name}={tmp_path / 'missing'}" in caplog.text


def test_a_bundle_is_enough(
    registry: Registry, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICM_BUNDLE", str(served.bundle))
    monkeypatch.setenv("ICM_STORE", str(tmp_path / "missing"))
    monkeypatch.setenv("ICM_ADAPTERS", str(tmp_path / "adapters"))
    monkeypatch.setenv("ICM_BASE_MODEL", LABEL)
    assert ask(IcmResolver(), served.base, "poems") is not None


def test_many_requests_for_one_task_are_answered_at_once(resolver: IcmResolver, served: Served) -> None:
    async def many() -> list[Any]:
        return await asyncio.gather(*(resolver.resolve_lora(str(served.base), "poems") for _ in range(32)))

    found = asyncio.run(many())
    assert len({request.lora_path for request in found}) == 1


def test_nothing_is_registered_without_a_store(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICM_STORE", raising=False)
    register()
    assert registry.resolvers == {}


def test_registering_twice_is_registering_once(registry: Registry, served: Served) -> None:
    register()
    register()
    assert list(registry.resolvers) == ["icm"]


def test_registering_imports_neither_torch_nor_the_database() -> None:
    script = "import sys; import icmlora.serving.vllm; assert not {'torch', 'sqlalchemy', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_while_the_database_is_away_vllm_serves_what_is_known_and_says_503_of_the_rest(
    registry: Registry, team: Team, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_COST", 0.0)
    monkeypatch.setenv("ICM_STORE", team.url)
    monkeypatch.setenv("ICM_ADAPTERS", str(tmp_path / "adapters"))
    register()
    (resolver,) = registry.resolvers.values()
    assert isinstance(resolver, IcmResolver)
    vllm: BaseServing = vars(sys.modules[SERVING])["BaseServing"](str(served.base), resolver)
    refusal = "503 ServiceUnavailableError: The store is unavailable: postgresql://"
    team.database.leave()
    assert str(asyncio.run(vllm._check_model(SimpleNamespace(model="rules")))).startswith(refusal)
    team.database.come_back()
    (first,) = vllm.ask("rules")
    assert first is not None
    team.database.leave()
    assert vllm.ask("rules") == [first]
    assert str(asyncio.run(vllm._check_model(SimpleNamespace(model="poems")))).startswith(refusal)
    team.database.come_back()
    assert vllm.ask("poems") != [None]
