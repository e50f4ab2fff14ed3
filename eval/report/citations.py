"""Whether documents cite what exists.

A document cites a row of committed results by a comment, <!-- row: RESULTS FILE#ROW ID -->.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

CITATION = re.compile(r"<!--\s*row:(.*?)-->", flags=re.DOTALL)
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", flags=re.DOTALL | re.MULTILINE)


def check_citations(document: Path, results: Sequence[Path]) -> list[str]:
    """The citations of a document that name no row of these files; what stands in code is none.

    The file is named by as much of its path's end as tells it from the others.
    """
    ids = {}
    for path in results:
        text = path.read_text(encoding="utf-8")
        found = (
            map(json.loads, text.splitlines())
            if path.suffix == ".jsonl"
            else json.loads(text)["rows"]
        )
        ids[path] = {row.get("id") for row in found}
    wrong = []
    # Code becomes as many empty lines, so that line numbers stay right.
    text = CODE.sub(lambda m: "\n" * m[0].count("\n"), document.read_text(encoding="utf-8"))
    for match in CITATION.finditer(text):
        cited, _, row = match[1].strip().partition("#")
        parts = Path(cited).parts
        files = [path for path in results if parts and path.parts[-len(parts) :] == parts]
        if len(files) != 1:
            problem = f"{len(files)} of {len(results)} results files have this name; it must be one"
        elif row not in ids[files[0]]:
            problem = f"none of its {len(ids[files[0]])} rows has this id"
        else:
            continue
        line = text.count("\n", 0, match.start()) + 1
        wrong.append(f"{document.name}:{line}: {cited}#{row}: {problem}")
    return wrong
