"""The methods of `Fleet` that list the store and maintain it. Only duplicates and outputs in a report need tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.context import Context, Event, default_cache, ignore

if TYPE_CHECKING:
    from icmlora.fleet.bases.base_models import KnownBase
    from icmlora.fleet.map.map import MapReport
    from icmlora.fleet.records import GeneratorRecord, Joined, LoadIn, Separated, TaskRecord, TaskSummary, View
    from icmlora.fleet.report.report import ReportSummary
    from icmlora.fleet.stats.bill import Bill
    from icmlora.fleet.tasks.duplicates import DuplicatesReport
    from icmlora.fleet.tasks.generators import Forgotten, GeneratorVersion, RolledBack
    from icmlora.fleet.tasks.maintenance import Check, Finding, PruneReport, RowRepair
    from icmlora.fleet.tasks.tasks import Removal, TaskDetails


class StoredFleet(Context):
    """Open a store, list and maintain it. `icmlora.Fleet` explains the arguments."""

    def __init__(
        self,
        path: str | Path,
        *,
        cache: str | Path | Callable[[], Path] = default_cache,
        lock_timeout: float = 30.0,
        command: str = "icm",
        on_event: Callable[[Event], None] = ignore,
    ) -> None:
        cache = Path(cache) if isinstance(cache, str) else cache
        super().__init__(Path(path), cache, lock_timeout, command, on_event)

    @property
    def _context(self) -> Context:
        """What one use case works with: all its waits for other processes end at the timeout, together."""
        return self.with_patience()

    # tasks: list, show, remove

    def tasks(
        self,
        base_model: str | None = None,
        *,
        filters: Sequence[str] = (),
        sort: str | None = None,
        limit: int | None = None,
    ) -> list[TaskSummary]:
        """List the tasks, by name unless `sort` says otherwise.

        Args:
            base_model: Only the tasks of this base model.
            filters: Conditions such as `rank>=8`, `tag=prod` or `base~llama`; a task is listed if all of them hold.
            sort: A field and a direction, such as `size:desc`; tasks without a value come last.
            limit: List at most so many.

        Raises:
            DataError: No task belongs to the base model.
            InvalidFilter: A filter or the order cannot be understood; the hint lists the fields.
        """
        from icmlora.fleet.tasks.tasks import ListRequest, list_tasks

        return list_tasks(self._context, ListRequest(base_model, filters, sort, limit))

    def task_names(
        self,
        base_model: str | None = None,
        *,
        filters: Sequence[str] = (),
        sort: str | None = None,
        limit: int | None = None,
    ) -> list[str]:
        """Return the names of the tasks that `tasks` lists for `base_model`, `filters`, `sort` and `limit`."""
        from icmlora.fleet.tasks.tasks import ListRequest, list_names

        return list_names(self._context, ListRequest(base_model, filters, sort, limit))

    def show(self, task: str) -> TaskDetails:
        """Return everything the store knows about one `task`."""
        from icmlora.fleet.tasks.tasks import show_task

        return show_task(self._context, task)

    def plan_removal(self, tasks: Sequence[str]) -> list[Removal]:
        """Return what `remove` would delete with these `tasks`; nothing changes."""
        from icmlora.fleet.tasks.tasks import plan_removal

        return plan_removal(self._context, tasks)

    def remove(self, tasks: Sequence[str], *, last_copies: Collection[str] = ()) -> list[str]:
        """Remove tasks with their adapters, vectors, codes and measurements; `prune` then frees the bytes.

        Args:
            tasks: The tasks to remove: all of them, or none if one is refused.
            last_copies: Evicted tasks to remove although their code is the only copy.

        Returns:
            The names of the removed tasks.

        Raises:
            LastCopy: A task is evicted and not in `last_copies`.
        """
        from icmlora.fleet.tasks.tasks import remove_tasks

        return remove_tasks(self._context, tasks, last_copies=last_copies)

    # tasks: names, tags, notes

    def rename(self, old: str, new: str) -> TaskRecord:
        """Give a task another name; its adapters, vectors, codes and measurements stay with it.

        Ingesting the same adapter again under its old name finds it under the new one.

        Args:
            old: The present name, in any case.
            new: The name to give it.

        Raises:
            TaskConflict: Another task has the name.
            InvalidName: The name breaks the rule for names.
        """
        from icmlora.fleet.tasks.tasks import rename_task

        return rename_task(self._context, old, new)

    def tag(self, tasks: Sequence[str], *, add: Sequence[str] = (), remove: Sequence[str] = ()) -> list[TaskRecord]:
        """Add tags to tasks and remove others; a tag that is there already, or not there, changes nothing.

        Args:
            tasks: Names of tasks; if one is unknown, nothing changes.
            add: Tags to add. Upper and lower case are the same tag.
            remove: Tags to remove.

        Returns:
            The tasks as they are now.
        """
        from icmlora.fleet.tasks.tasks import tag_tasks

        return tag_tasks(self._context, tasks, add, remove)

    def tags(self) -> Mapping[str, int]:
        """Return how many tasks have each tag, sorted by tag."""
        from icmlora.fleet.tasks.tasks import list_tags

        return list_tags(self._context)

    def set_note(self, task: str, text: str | None) -> TaskRecord:
        """Replace the note of a `task` by `text`, or remove it if that is None; return the task as it is now."""
        from icmlora.fleet.tasks.tasks import set_note

        return set_note(self._context, task, text)

    # base models

    def base_models(self) -> list[KnownBase]:
        """List the base models that adapters name or that were added, and where each one is on this machine."""
        from icmlora.fleet.bases.base_models import list_base_models

        return list_base_models(self._context)

    def add_base_model(
        self, name: str, path: str | Path, *, loader: str | None = None, load_in: LoadIn | None = None
    ) -> Path:
        """Record where a base model is; this comes before the Hugging Face cache. Creates the store if there is none.

        A base model with equal files is joined to it, which `on_event` is told.

        Args:
            name: The name that adapters give the base model.
            path: A Hugging Face model folder or a `.gguf` file; anything if there is a loader.
            loader: `MODULE:FUNCTION` of a function marked with `icmlora.base_model_loader`, for a base model that
                transformers does not load.
            load_in: "nf4" or "int8": load the linear layers in 4 or 8 bits, with bitsandbytes. Everything is then
                measured on that, and says so. None, also for a known base model, means what the device suits.

        Returns:
            The absolute path.

        Raises:
            BaseModelNotFound: The path does not hold a base model that can be loaded, there is no such loader, or
                bitsandbytes is not installed.
            BaseModelUnsuited: It is of a kind that cannot be loaded in few bits.
        """
        from icmlora.fleet.bases.base_models import add_base_model

        return add_base_model(self._context, name, Path(path), loader, load_in)

    def forget_base_model(self, name: str) -> None:
        """Forget where the base model `name` is; `BaseModelNotFound` if it is unknown. Adapters and files stay."""
        from icmlora.fleet.bases.base_models import forget_base_model

        forget_base_model(self._context, name)

    def alias_base_model(self, name: str, labels: Sequence[str], *, keep: str | None = None) -> Joined:
        """Say that labels mean the same base model: their tasks share one generator from then on.

        Codes stay valid. Where only one of them has a generator, it becomes that of all; `update` makes codes for the
        other tasks. Creates the store if there is none.

        Args:
            name: A label of the base model; it is shown under the name that it has, or under this one if it is new.
            labels: Hub names, `NAME@REVISION`, or local paths.
            keep: Where several have a generator, the label of the one whose generator stays in use. The others
                become earlier versions of it, and their tasks have no code until `update`.

        Raises:
            BaseModelConflict: Two have a generator and `keep` is not given, or a label belongs to another base model.
            LastCopy: A task was evicted and its code belongs to a generator that would not stay in use.
        """
        from icmlora.fleet.bases.base_models import alias_base_model

        return alias_base_model(self._context, name, labels, keep)

    def separate_base_model(self, name: str, labels: Sequence[str]) -> list[Separated]:
        """Make labels of a base model base models of their own again, with the tasks whose adapters name them.

        If no task stays, the generator goes with them. Otherwise these tasks lose codes, vectors and measurements.

        Args:
            name: The base model.
            labels: Labels that were joined to it.

        Raises:
            BaseModelConflict: A label is not one of this base model.
            LastCopy: A task was evicted and its code belongs to the generator that stays.
        """
        from icmlora.fleet.bases.base_models import separate_labels

        return separate_labels(self._context, name, labels)

    # stats, map, duplicates, report

    def stats(self, *, plot: str | Path | None = None, force: bool = False) -> Bill:
        """Count the bytes on disk, what the codes save, and what they cost in quality.

        Args:
            plot: Also draw bytes against the number of tasks to this .svg, .png or .pdf file (needs matplotlib).
            force: Replace the file if it exists.

        Raises:
            DataError: The plot has another ending, matplotlib is missing, or no task has a code to draw.
            OutputExists: The file exists and `force` is not given.
        """
        from icmlora.fleet.stats.stats import stats

        return stats(self._context, None if plot is None else Path(plot), force=force)

    def task_map(
        self,
        *,
        view: View = "adapted",
        base_model: str | None = None,
        clusters: int | None = None,
        plot: str | Path | None = None,
        force: bool = False,
    ) -> MapReport:
        """Compare the tasks of a base model by their vectors, and cluster them.

        Args:
            view: Which vectors: `adapted` (the base model with the adapter) or `context` (the base model alone).
            base_model: Which base model; needed only if tasks of several have vectors.
            clusters: How many clusters; by default the number with the best mean silhouette.
            plot: Also draw the map to this .svg file.
            force: Replace the file if it exists.

        Raises:
            DataError: Too few tasks have comparable vectors, there are fewer tasks than clusters, or the plot is not
                an .svg file.
            OutputExists: The file exists and `force` is not given.
        """
        from icmlora.fleet.map.map import MapRequest, map_fleet

        request = MapRequest(view, base_model, clusters, None if plot is None else Path(plot), force)
        return map_fleet(self._context, request)

    def duplicates(
        self, tasks: Sequence[str] = (), *, max_distance: float = 0.1, base_model: str | None = None
    ) -> DuplicatesReport:
        """Find tasks whose adapters are the same, or nearly; nothing is changed or removed.

        Args:
            tasks: Return only groups with one of these tasks; they are compared with all tasks of their base model.
            max_distance: Largest ||dW - dW'|| / max(||dW||, ||dW'||) of near copies, up to 0.5; 0 finds only exact
                ones. Unrelated adapters are at about 1.
            base_model: Only the tasks of this base model.

        Raises:
            DataError: The distance is not between 0 and 0.5, or no task belongs to the base model.
        """
        from icmlora.fleet.tasks.duplicates import DuplicatesRequest, find_duplicates

        return find_duplicates(self._context, DuplicatesRequest(tasks, max_distance, base_model))

    def report(
        self,
        file: str | Path,
        *,
        outputs: Sequence[str] = (),
        prompts: str | Path | None = None,
        max_new_tokens: int = 40,
        steps: int = 20,
        seeds: int = 2,
        image_size: int | None = None,
        device: str = "auto",
        force: bool = False,
    ) -> ReportSummary:
        """Write the store as one HTML page that needs no network. It appears complete or not at all.

        Args:
            file: The page to write.
            outputs: Tasks of which to show what base model, original and code write, or draw with a diffusers
                pipeline. Needs the base model.
            prompts: File of prompts for them, one a line or as JSON lines; by default the beginnings of each task's own
                held-out text, or the trigger words and tags in the header of an image adapter.
            max_new_tokens: Most tokens that are written for a prompt.
            steps: Steps of denoising for a picture.
            seeds: Pictures of each prompt.
            image_size: Width and height of a picture in pixels; by default what the pipeline draws.
            device: Where to compute outputs.
            force: Replace a file that exists.

        Returns:
            What is on the page; its `pictures` have the distances of image tasks, and its `failed` and `left_out` name
            chosen tasks without outputs, and why.

        Raises:
            OutputExists: The file exists and `force` is not given.
            DataError: The prompts cannot be used, or the only chosen task has no outputs.
            BaseModelNotFound: None of the base models of the chosen tasks is on this machine.
        """
        from icmlora.fleet.report.report import ReportRequest, write_report

        given = None if prompts is None else Path(prompts)
        drawing = steps, seeds, image_size
        request = ReportRequest(Path(file), outputs, given, max_new_tokens, *drawing, device, force)
        return write_report(self._context, request)

    # verify, prune, doctor

    def verify(self, tasks: Sequence[str] = (), *, read_data: bool = False, decode: bool = False) -> Iterator[Finding]:
        """Check the database and the blobs, and yield what is wrong as it is found.

        Args:
            tasks: Check only what these tasks need; everything if empty.
            read_data: Also read and hash every blob. By default only its presence and length are checked.
            decode: Also decode every code whose original is there, and compare its error with the recorded one.
        """
        from icmlora.fleet.tasks.maintenance import verify

        return verify(self._context, tasks, read_data=read_data, decode=decode)

    def repair(self) -> list[tuple[Finding, str]]:
        """Move every damaged blob to quarantine, and return its finding and new place. Ingesting restores originals."""
        from icmlora.fleet.tasks.maintenance import repair

        return repair(self._context)

    def repair_rows(self) -> list[RowRepair]:
        """Correct rows of the database of which a single bit flipped; a copy of it goes to quarantine before.

        Returns:
            What became of each wrong row: the value that was corrected, or the `problem` for which it was left alone.
        """
        from icmlora.fleet.tasks.maintenance import repair_rows

        return repair_rows(self._context)

    def restore_database(self) -> str:
        """Put the copy of the database that icm kept before the last deletion in its place.

        What was there goes to the folder `quarantine` of the store. What was recorded after the copy is not in it.

        Returns:
            When the copy was made, as RFC 3339.

        Raises:
            DamagedStore: There is no copy, or it is damaged too; nothing was changed.
        """
        from icmlora.fleet.tasks.maintenance import restore_database

        return restore_database(self._context)

    def prune(self, *, grace: float = 3600.0, empty_quarantine: bool = False, dry_run: bool = False) -> PruneReport:
        """Delete blobs that no task needs and files that interrupted commands left behind.

        Codes, generators, residuals and weights are moved to the folder `quarantine` of the store instead.

        Args:
            grace: Seconds; younger files stay, so that a running ingest is safe.
            empty_quarantine: Delete these too, and what is in quarantine.
            dry_run: Only report what would be deleted.
        """
        from icmlora.fleet.tasks.maintenance import prune

        return prune(self._context, grace=grace, empty_quarantine=empty_quarantine, dry_run=dry_run)

    def doctor(self) -> list[Check]:
        """Check versions, devices, free space and the store, for a problem report."""
        from icmlora.fleet.tasks.maintenance import examine

        return examine(self._context)

    # generators

    def generators(self) -> list[GeneratorVersion]:
        """List all generators by base model, oldest first, with what depends on each."""
        from icmlora.fleet.tasks.generators import list_generators

        return list_generators(self._context)

    def rollback(self, digest: str) -> RolledBack:
        """Make another generator of the same base model the current one; nothing is deleted.

        Args:
            digest: The first digits of the generator's digest, four or more.

        Raises:
            DataError: No generator, or more than one, begins with these digits.
            LastCopy: An evicted task could not be restored as it was checked; nothing changed.
        """
        from icmlora.fleet.tasks.generators import rollback

        return rollback(self._context, digest)

    def forget_generator(self, generator: str | GeneratorRecord, *, dry_run: bool = False) -> Forgotten:
        """Forget a generator that is not in use, with its codes and their measurements; `prune` deletes its files.

        Args:
            generator: The first digits of its digest, four or more, or its record from `generators`.
            dry_run: Only return what would be forgotten.

        Raises:
            DataError: No generator, or more than one, begins with these digits.
            GeneratorConflict: It is in use; nothing changed.
            LastCopy: It holds the only code of an evicted task; nothing changed.
        """
        from icmlora.fleet.tasks.generators import forget_generator

        return forget_generator(self._context, generator, dry_run=dry_run)
