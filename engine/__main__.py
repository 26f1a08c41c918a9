"""`engine`: one engine process of a cluster.

    core begun ═ imports what it needs ════════════════════════╗ told what to load ═ loads the model ═╗
     └─▶ imports ─▶ settings read ─▶ port held, model checked ─╨─▶ tokenizer and server loaded ═══════╩═▶ listens

Nothing is imported here before the core has been begun: the two processes load side by side, all the way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.child import CoreChild


def main(argv: Sequence[str] | None = None) -> None:
    with CoreChild() as core:
        from engine.command import run

        sys.exit(run(sys.argv[1:] if argv is None else argv, core))


if __name__ == "__main__":
    main()
