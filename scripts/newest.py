"""Run the families' tests against the newest transformers release that pip finds, and print the result. Failures are news, not an error.

transformers goes into a folder of its own, before the environment's on the path. `make test-newest` calls this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("tests/surgery/test_families.py", "tests/engine/test_composites.py", "tests/engine/test_uneven.py")
SHOWN = 20


def main() -> int:
    folder = ROOT / ".newest"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(folder), "transformers"]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        print(f"newest transformers: not tested, pip could not install it\n{installed.stderr.strip()[-500:]}")
        return 0
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    told = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    version = (
        subprocess.run(told, env=environment, capture_output=True, text=True, check=False).stdout.strip()
        or "that cannot be imported"
    )
    pytest = [sys.executable, "-m", "pytest", "-n", "auto", "--tb=line", "-rfE", "-p", "no:cacheprovider", *TESTS]
    run = subprocess.run(pytest, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(report(version, run.stdout))
    return 0


def report(version: str, output: str) -> str:
    """Counts, and the families of the tests that failed."""
    lines = output.strip().splitlines()
    failed = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    families = Counter(found[1] for line in failed if (found := re.search(r"\[(\w+?)(?:-[^\]]*)?\]", line)))
    verdict = lines[-1] if lines else "no output"
    text = [f"newest transformers: {version}: {verdict.strip('= ')}"]
    if families:
        text.append("failed, by family: " + ", ".join(f"{name} {number}" for name, number in sorted(families.items())))
    text += [f"  {line}" for line in failed[:SHOWN]]
    if len(failed) > SHOWN:
        text.append(f"  … and {len(failed) - SHOWN} more")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
