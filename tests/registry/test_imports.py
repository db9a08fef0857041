"""What the package may cost and may know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import registry
from registry import errors

SOURCES = sorted(Path(registry.__file__).parent.rglob("*.py"))


SCRIPT = """
import sys
from pathlib import Path
from registry.store import Store
with Store.open(Path({root!r}), create=True) as store:
    list(store.tasks())
print(sorted({{"torch", "numpy", "safetensors", "sqlalchemy.orm", "rich"}} & sys.modules.keys()))
"""


def test_a_store_imports_no_tensor_library_and_not_the_orm(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT.format(root=str(tmp_path / "store"))]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_error_is_one_that_icm_raises_on_purpose() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(error, errors.IcmError) for error in found)


def test_only_the_seam_writes_renames_and_removes() -> None:
    allowed = {"files.py", "flocks.py"}
    forbidden = ("os.write(", "os.fsync(", "os.replace(", "os.rename(", "os.unlink(", ".write_bytes(", ".unlink(")
    for path in SOURCES:
        if path.name not in allowed:
            text = path.read_text().replace("fs.unlink(", "")
            assert [call for call in forbidden if call in text] == [], path.name
