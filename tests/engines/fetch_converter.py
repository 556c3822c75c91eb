"""Fetch llama.cpp's converter out of the source package of llama-cpp-python into a folder: fetch_converter.py FOLDER."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "llama-cpp-python"
folder = Path(sys.argv[1])
with tempfile.TemporaryDirectory() as temporary:
    url = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        VERSION,
        "-d",
        temporary,
    ]
    subprocess.run(url, check=False)  # pip may fail to build metadata; the archive is there then
    with tarfile.open(next(Path(temporary).glob("llama_cpp_python-*.tar.gz"))) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if "llama.cpp" in parts:
                rest = Path(*parts[parts.index("llama.cpp") + 1 :])
                if member.isfile() and (rest.parts[0] in ("conversion", "gguf-py") or rest.name == "convert_hf_to_gguf.py"):
                    target = folder / rest
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(member).read())
