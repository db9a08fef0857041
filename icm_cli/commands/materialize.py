"""`icm materialize`: write a task's adapter in its own format or another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.command import Call, command
from icm_cli.session import Session
from icm_cli.text import as_fields, claim_json, claim_text
from icmlora.fleet.measure.metric_result import measured_in
from icmlora.fleet.params import BundleFile
from icmlora.fleet.write import materialize as use_cases

if TYPE_CHECKING:
    from icmlora.fleet.write.materialize import MaterializeReport

_EXACTLY = ", byte for byte"
_FROM = {
    "original": f"its original{_EXACTLY}",
    "code": "its code",
    "network": "the network's prediction from its task vectors",
}


@command(use_cases.materialize)
def materialize(session: Session, call: Call[MaterializeReport], bundle: BundleFile = None) -> None:
    out, task = session.out, call["task"]
    if bundle is None:
        done = call.now()
        if call["source"] == "auto" and done.source == "code":
            out.note(f"the original of {task} was evicted; used {_FROM[done.source]} instead")
    else:
        from icmlora.fleet.bundles.bundles import Bundle

        done = call.use_case(Bundle(bundle), **call.values)
    fields = as_fields(done, "directory", "adapter_format", "converted", "claim")
    given = {"output": str(done.directory), "format": done.adapter_format, "claimed": claim_json(done.claim)}
    out.document(fields | given)
    out.answer(str(done.directory))
    figures = ""
    if done.source != "original":  # an original loses nothing
        known = {"relative error": done.relative_error, "retained gain": done.retained_gain}
        figures = "".join(f", {name} {value:.4f}" for name, value in known.items() if value is not None)
        figures += measured_in([done.precision]) if done.retained_gain is not None else ""
    if done.claim is not None:
        figures += f", {claim_text(done.claim)} (claimed by the bundle)"
    origin = _FROM["network" if done.source == "recalled" else done.source]
    if done.recognized is not None:
        origin = f"the code of {done.recognized}, the task recognized from its vectors"
    if done.converted:
        origin = f"{origin.removesuffix(_EXACTLY)}, converted to {done.adapter_format}"
    out.note(f"wrote {task} from {origin}{figures}")
    if done.left_out:
        out.note(f"skipped extra files, which only --format peft writes: {', '.join(done.left_out)}")
    if done.source == "recalled" and done.recognized is None:
        out.note("recognized no stored task; used the network's prediction")
