from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from tests.compat import image_files
from tests.compat.case import Case
from tests.compat.suite import CaseTests, World


class TestImageFiles(CaseTests):
    cases = image_files.CASES

    def test_the_original_comes_back_byte_for_byte(self, world: World, case: Case, tmp_path: Path) -> None:
        world.written(case, "original", tmp_path / image_files.FILE)
        assert (tmp_path / image_files.FILE).read_bytes() == (world.folder / case.name / image_files.FILE).read_bytes()

    def test_its_code_comes_back_in_the_mould_of_the_original(self, world: World, case: Case, tmp_path: Path) -> None:
        original, decoded = world.folder / case.name / image_files.FILE, tmp_path / image_files.FILE
        world.written(case, "code", decoded)
        with safe_open(original, "pt") as before, safe_open(decoded, "pt") as after:
            assert after.metadata() == before.metadata()
        if "tucker" not in case.name:  # convolutions in three factors come back in two
            assert forms_of(decoded) == forms_of(original)


def forms_of(path: Path) -> dict[str, tuple[object, ...]]:
    """Return the types and shapes of the tensors of a file."""
    return {name: (tensor.dtype, *tensor.shape) for name, tensor in load_file(path).items()}
