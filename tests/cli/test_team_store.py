"""Every command works on a store in PostgreSQL with its bytes in S3, and none of them prints a password."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from icm_cli.app import run
from icm_cli.reference import commands
from icmlora import Fleet
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import EPISODES, LABEL, STEPS, write_lora, write_subject
from tests.pg_server import new_database
from tests.s3_server import S3Server

Icm = Callable[..., Ran]
_SECRET = "pa55-w0rd"

# In this order, on one store. FOLDER is a folder beside it, LAPTOP a store in it, OTHER one more database,
# GENERATOR the first that is not the current one.
COMMANDS = [
    "init --blobs BUCKET",
    "doctor",
    "base add NAME FOLDER/base",
    "ingest FOLDER/loras --device cpu",
    "vectors poems --again --device cpu",
    f"train --no-eval --refine 1 --device cpu --steps {STEPS}",
    f"train --few-shot --episodes {EPISODES} --device cpu",
    "encode --max-error 0.5 --device cpu",
    "encode poems --max-error 0.1 --device cpu",
    "encode rules --size 20KiB --device cpu",
    "eval poems --device cpu",
    "ingest FOLDER/new --name dogs --no-vectors",
    "train --update --refine 0 --no-eval --device cpu",
    "ls --filter rank>1 --sort size --limit 2",
    "ls --json",
    "show poems",
    "show poems --json",
    "log poems",
    "stats",
    "stats --plot FOLDER/stats.svg",
    "map --view context",
    "duplicates",
    "report -o FOLDER/page.html",
    "edit dogs --name hounds --tag prod --note good --pin",
    "edit hounds --no-pin",
    "base ls",
    "base alias NAME other/name",
    "materialize poems -o FOLDER/original --source original",
    "materialize rules -o FOLDER/rules.gguf --format gguf",
    "merge poems hounds -o FOLDER/merged --as blend",
    "recognize --description poems",
    "recognize --samples FOLDER/loras/rules/samples.jsonl --device cpu",
    "generate more --samples FOLDER/loras/rules/samples.jsonl -o FOLDER/more --device cpu",
    "context poems --samples FOLDER/loras/rules/samples.jsonl --device cpu",
    "context poems --show",
    "eval poems --context --device cpu",
    "export FOLDER/fleet.icm",
    "convert FOLDER/loras/poems FOLDER/mlx --format mlx",
    "copy HERE LAPTOP",
    "--store LAPTOP verify --read-data --decode",
    "init OTHER --blobs BUCKET",
    "copy LAPTOP OTHER poems",
    "copy HERE OTHER",
    "--store OTHER verify --read-data --decode",
    "--store OTHER import FOLDER/fleet.icm --on-conflict skip",
    "generators",
    f"train --fresh --no-eval --refine 0 --device cpu --steps {STEPS}",
    "generators rollback GENERATOR",
    "evict rules --max-error 10 --placeholder --device cpu",
    "evict hounds --max-error 10 --json --device cpu",
    "materialize rules -o FOLDER/rules",
    "restore FOLDER/loras",
    "serve --print-config vllm",
    "serve --print-config sglang --json",
    "verify",
    "verify poems",
    "verify --read-data --decode",
    "verify --repair --yes",
    "prune --dry-run",
    "prune --grace 0s --yes",
    "prune --empty-quarantine --grace 0s --yes",
    "rm poems --yes",
    "doctor --json",
    "base rm NAME",
]


@pytest.fixture(scope="module")
def places(
    mixed_template: Path, tmp_path_factory: pytest.TempPathFactory, postgres: str, s3: S3Server
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("team")
    for name in ("base", "loras"):
        shutil.copytree(mixed_template / name, folder / name)
    for name in ("apples", "pears"):
        write_subject(folder / "loras" / name)
    write_lora(folder / "new", seed=5)
    with_password = [new_database(postgres).replace("postgres:@", f"postgres:{_SECRET}@") for _ in range(2)]
    return {
        "FOLDER": str(folder),
        "LAPTOP": str(folder / "laptop"),
        "HERE": with_password[0],
        "OTHER": with_password[1],
        "NAME": LABEL,
    }


@pytest.fixture(autouse=True)
def environment(places: dict[str, str], s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_STORE", places["HERE"])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(Path(places["FOLDER"]) / "config"))  # where `base add` writes


def arguments(words: str, places: dict[str, str]) -> list[str]:
    for name, place in {**places, "BUCKET": f"s3://icm/{uuid4().hex}"}.items():
        words = words.replace(name, place)
    if "GENERATOR" in words:
        known = Fleet(places["HERE"]).generators()
        words = words.replace("GENERATOR", next(found.generator.blob for found in known if not found.is_current))
    return words.split()


def written(places: dict[str, str]) -> Iterator[Path]:
    """Yield all files that a command may have left for people to read."""
    for folder in (os.environ["HOME"], os.environ["XDG_STATE_HOME"], places["FOLDER"]):
        yield from (path for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_works_and_keeps_the_password_to_itself(words: str, places: dict[str, str], icm: Icm) -> None:
    ran = icm(*arguments(words, places))
    assert ran.code == 0, ran.err
    assert _SECRET not in ran.out + ran.err
    assert not [path for path in written(places) if _SECRET.encode() in path.read_bytes()]


def test_every_command_is_tried() -> None:
    """`serve` itself is tried in tests/icmlora/serving."""
    tried = {words.removeprefix("--store LAPTOP ").removeprefix("--store OTHER ") for words in COMMANDS}
    for name, command in commands():
        if not hasattr(command, "commands"):
            assert any(words.startswith(name.removeprefix("icm ")) for words in tried), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("verify --repair --yes --json", None),
        ("doctor --path db", "is not a folder"),
        ("--store postgresql://postgres:pa55-w0rd@/none?host=/nowhere ls", "postgresql:///none"),
        ("--store postgresql://postgres:pa55-w0rd/@localhost:x/none ls", "postgresql://"),
        ("--store mysql://me:pa55-w0rd@host/db ls", "is not a valid store address"),
        ("--store postgresql://host/db?password=pa55-w0rd&port=no ls", "postgresql://"),
        ("init HERE --blobs s3://me:pa55-w0rd@bucket/x", "not the address of an object store"),
        ("copy HERE postgresql://me:pa55-w0rd@/none?host=/nowhere", "postgresql:///none"),
        ("ls --filter pa55", None),
    ],
)
@pytest.mark.parametrize("how", [[], ["--json"], ["-v"]], ids=["text", "json", "verbose"])
def test_no_error_tells_a_password(
    words: str, says: str | None, how: list[str], places: dict[str, str], icm: Icm
) -> None:
    ran = icm(*arguments(words, places), *how)
    assert _SECRET not in ran.out + ran.err
    if says is not None:
        assert ran.code != 0
        assert says in ran.err
    assert not [path for path in written(places) if _SECRET.encode() in path.read_bytes()]


def test_the_server_is_not_told_a_password_as_a_name(postgres: str, tmp_path: Path) -> None:
    import psycopg

    from registry.names import address_of
    from registry.store import Store

    url = new_database(postgres).replace("postgres:@", f"postgres:{_SECRET}@")
    assert run(["init", url, "--blobs", str(tmp_path / "blobs")]) == 0
    with Store.open(address_of(url), command="icm ls"), psycopg.connect(url) as other:
        names = other.execute("SELECT application_name FROM pg_stat_activity").fetchall()
    assert any("icm ls" in name for (name,) in names)
    assert _SECRET not in str(names)
