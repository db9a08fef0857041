"""The part of `Fleet` that trains generators, lists them, and generates adapters with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.api_store import StoredFleet

if TYPE_CHECKING:
    from icmlora.fleet.generate import Generated
    from icmlora.fleet.generators import Forgotten, GeneratorVersion, RolledBack
    from icmlora.fleet.records import GeneratorRecord
    from icmlora.fleet.train import TrainReport
    from icmlora.fleet.train_few_shot import FewShotReport
    from icmlora.fleet.update import UpdateReport


class GeneratorFleet(StoredFleet):
    """What can be done with the generators of a store."""

    # train

    def train(
        self,
        *,
        device: str = "auto",
        base_model: str | None = None,
        quality: int | None = None,
        tolerance: float | None = None,
        width: int | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        resume: bool = True,
        fresh: bool = False,
    ) -> TrainReport:
        """Train one generator per base model on all its tasks, and store a code for every task.

        Training starts from the current generator if there is one. All originals are needed; after evicting some, use
        `update` to add tasks. The same call resumes a training that was stopped, to the very same generator.

            fleet.train(device="cuda", quality=6)

        Args:
            device: Where to train: "auto", "cpu", "cuda", "cuda:N" or "mps".
            base_model: Train only the generator of this base model.
            quality: 1 (smallest codes) to 8 (most accurate); by default that of the current generator, at first 4.
            tolerance: The same as a number: the largest squared relative error of dW weighted by sensitivity.
            width: Hidden width of a new generator's decoder; by default it depends on the number of tasks.
            steps: Optimiser steps; by default they depend on the number of tasks and adapters.
            learning_rate: Peak learning rate.
            seed: Seed for all random numbers: the same seed on the same machine gives the same bytes.
            resume: Resume a training that was stopped.
            fresh: Start from scratch instead of from the current generator.

        Returns:
            One entry per base model; its `left_out` names tasks that have no code, and why.

        Raises:
            DeviceUnavailable: The device is not on this machine.
            DataError: There is nothing to train on, or a task is evicted.
            GeneratorError: The training diverged, or no task could be encoded.
            StoreLocked: Another process works on the generator or the codes of the same base model.
            Cancelled: The listener stopped it after a training checkpoint was saved; see its `report.stopped_at`.
        """
        from icmlora.fleet.train import train
        from icmlora.fleet.training_run import TrainRequest

        request = TrainRequest(
            device, base_model, quality, tolerance, width, steps, learning_rate, seed, resume=resume, fresh=fresh
        )
        return train(self._context, request)

    def update(
        self,
        *,
        device: str = "auto",
        base_model: str | None = None,
        quality: int | None = None,
        tolerance: float | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
    ) -> UpdateReport:
        """Store codes for the tasks that have none, and let the generator grow if that makes them smaller.

        Only the new tasks are read. Existing codes decode to the same adapters as before, and their originals may be
        evicted. It takes as long as the new tasks take.

        Args:
            device: Where to compute: "auto", "cpu", "cuda", "cuda:N" or "mps".
            base_model: Update only the generator of this base model.
            quality: Of the new codes: 1 (smallest) to 8 (most accurate); by default that of the first training.
            tolerance: The same as a number: the largest squared relative error of dW weighted by sensitivity.
            steps: Optimiser steps; by default they depend on the number of new tasks.
            learning_rate: Peak learning rate.
            seed: Seed for all random numbers.

        Returns:
            One entry per base model; `report.tasks` lists the tasks that got a code.

        Raises:
            DeviceUnavailable: The device is not on this machine.
            DataError: There is no task, or a base model has no generator yet.
            GeneratorError: The training diverged; nothing changed.
            GeneratorConflict: Another generator became current in the meantime; nothing changed.
            StoreLocked: Another process works on the generator or the codes of the same base model.
            Cancelled: The listener stopped it; base models that are not in its `report` did not change.
        """
        from icmlora.fleet.update import update
        from icmlora.fleet.update_candidates import UpdateRequest

        request = UpdateRequest(device, base_model, quality, tolerance, steps, learning_rate, seed)
        return update(self._context, request)

    def check_few_shot(self, *, base_model: str | None = None) -> None:
        """Check that `train_few_shot` has what it needs, apart from a generator.

        Args:
            base_model: Check only this base model.

        Raises:
            DataError: There is no task, or fewer than two tasks of a base model have samples.
            BaseModelNotFound: A base model is not on this machine.
        """
        from icmlora.fleet.train_few_shot import check_few_shot

        check_few_shot(self._context, base_model)

    def train_few_shot(
        self, *, device: str = "auto", base_model: str | None = None, episodes: int = 48, seed: int = 0
    ) -> FewShotReport:
        """Meta-train the few-shot start that `generate` needs; generators and codes do not change.

        It needs the base model on this machine, and two or more tasks with samples.

        Args:
            device: Where to compute: "auto", "cpu", "cuda", "cuda:N" or "mps".
            base_model: Only for the generator of this base model.
            episodes: Length of the training: in each episode one known task is treated as new.
            seed: Seed for all random numbers.

        Raises:
            DeviceUnavailable: The device is not on this machine.
            DataError: There is no generator, or fewer than two tasks have samples.
            BaseModelNotFound: A base model is not on this machine.
            GeneratorError: The training diverged; nothing changed.
            GeneratorConflict: Another generator became current in the meantime; nothing changed.
            StoreLocked: Another process works on the generator or the codes of the same base model.
            Cancelled: The listener stopped it; base models that are not in its `report` did not change.
        """
        from icmlora.fleet.train_few_shot import FewShotRequest, train_few_shot

        return train_few_shot(self._context, FewShotRequest(device, base_model, episodes, seed))

    # generators

    def generators(self) -> list[GeneratorVersion]:
        """List all generators by base model, oldest first, with what depends on each."""
        from icmlora.fleet.generators import list_generators

        return list_generators(self._context)

    def rollback(self, digest: str) -> RolledBack:
        """Make another generator of the same base model the current one; nothing is deleted.

        Args:
            digest: The first digits of the generator's digest, four or more.

        Returns:
            The generator, and the tasks that have no code under it.

        Raises:
            DataError: No generator, or more than one, begins with these digits.
            LastCopy: An evicted task could not be restored as it was checked; nothing changed.
            StoreLocked: Another process works on the generator or the codes of the same base model.
        """
        from icmlora.fleet.generators import rollback

        return rollback(self._context, digest)

    def forget_generator(self, generator: str | GeneratorRecord, *, dry_run: bool = False) -> Forgotten:
        """Forget a generator that is not in use, with its codes and their measurements.

        Its files are deleted at once, or by the next `prune` if another process uses the store.

        Args:
            generator: The first digits of its digest, four or more, or its record from `generators`.
            dry_run: Only return what would be forgotten.

        Raises:
            DataError: No generator, or more than one, begins with these digits.
            GeneratorConflict: It is in use; nothing changed.
            LastCopy: It holds the only code of an evicted task; nothing changed.
            GeneratorNotFound: It was forgotten in the meantime; nothing changed.
        """
        from icmlora.fleet.generators import forget_generator

        return forget_generator(self._context, generator, dry_run=dry_run)

    # generate

    def generate(
        self,
        name: str,
        samples: str | Path,
        directory: str | Path,
        *,
        count: int = 64,
        description: str | None = None,
        refine: int = 0,
        rank: int | None = None,
        base_model: str | None = None,
        device: str = "auto",
        dtype: str = "bfloat16",
        register: bool = False,
        force: bool = False,
    ) -> Generated:
        """Generate an adapter for a new task from a few samples of it, and write it as a PEFT folder.

        The quality of the adapter is not known: measure it on other text of the task. Needs the base model, and a
        generator with a few-shot start (`train_few_shot`).

            fleet.generate("cat-detection", "cats.jsonl", "adapter", register=True)

        Args:
            name: Name of the new task.
            samples: File of JSON lines with "text", or with "prompt" and "completion".
            directory: The folder to write.
            count: Number of samples to read, spread over the file.
            description: A sentence for the model card.
            refine: Gradient steps on the samples after generating.
            rank: Rank to write; by default the largest that a code can have.
            base_model: Which base model; needed only if several have a few-shot start.
            device: Where to compute: "auto", "cpu", "cuda", "cuda:N" or "mps".
            dtype: Of the written weights: "bfloat16", "float16" or "float32".
            register: Also keep the task in the store, by a code and its task vectors; weights are not stored.
            force: Replace the folder if it is not empty.

        Returns:
            What was written, its loss on the samples, and the nearest known tasks.

        Raises:
            InvalidName: The name is not allowed for a task.
            DataError: The samples cannot be used, or there is no generator with a few-shot start.
            OutputExists: The folder is not empty and `force` is not given.
            BaseModelNotFound: The base model is not on this machine.
            TaskConflict: The task is to be registered, and its name is taken.
            NotCovered: The task is to be registered, and no code can have the rank.
            Cancelled: The listener stopped it; nothing was written.
        """
        from icmlora.fleet.generate import GenerateRequest, generate

        files = Path(samples), Path(directory)
        request = GenerateRequest(
            name, *files, count, description, refine, rank, base_model, device, dtype, register, force
        )
        return generate(self._context, request)
