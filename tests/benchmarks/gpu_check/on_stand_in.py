"""One stage, as `stage` runs it, on the stand-in for a card; it comes before anything imports torch.

    python -m tests.benchmarks.gpu_check.on_stand_in [STAGE DEVICE STORE OPTIONS]

Without a stage it only tries whether there is a stand-in on this machine; if not, it prints why and exits with code 3.
"""

from __future__ import annotations

import sys

from tests.device.card import install
from tests.device.hooks import NoStandIn

NONE_HERE = 3


def main() -> None:
    """Install the stand-in, and run the stage if one is named."""
    try:
        install("cuda")
    except NoStandIn as error:
        print(error)
        sys.exit(NONE_HERE)
    if len(sys.argv) > 1:
        from tests.benchmarks.gpu_check.stage import main as run_stage

        run_stage()


if __name__ == "__main__":
    main()
