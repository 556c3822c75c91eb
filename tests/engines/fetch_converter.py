"""Fetch llama.cpp's converter out of the source package of llama-cpp-python (77 MB) into a folder: fetch_converter.py FOLDER."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"


def unpack(archive: Path, folder: Path) -> None:
    """The converter script, its modules and its own gguf package."""
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            parts = Path(member.name).parts
            if not member.isfile() or "llama.cpp" not in parts:
                continue
            rest = Path(*parts[parts.index("llama.cpp") + 1 :])
            if rest.parts[0] in ("conversion", "gguf-py") or str(rest) == "convert_hf_to_gguf.py":
                target = folder / rest
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.extractfile(member).read())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        command = ["download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", PACKAGE, "-d", temporary]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        unpack(next(Path(temporary).glob("llama_cpp_python-*.tar.gz")), Path(sys.argv[1]))
