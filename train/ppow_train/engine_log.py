"""Why an engine stopped, from its log: one sentence of it.

Left out: where logs are kept (serving_eval.py).
"""

from __future__ import annotations

MOST_CHARACTERS = 500


def reason(log: str) -> str:
    """The last error in a log, with what it says in the line below, as errors in vLLM's configuration do."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if "Error" in line or "error:" in line.lower()]
    at = errors[-1] if errors else len(lines) - 1
    if at < 0:
        return "no log"
    if " validation error" in lines[at] and lines[at + 1 :]:
        said = lines[at + 1].partition(" [type=")[0]  # then come all values that were given
        return said.strip().removeprefix("Value error, ")[:MOST_CHARACTERS]
    return lines[at].strip()[:MOST_CHARACTERS]
