"""Writes a wheel with one program in it: python3 wheel.py PROGRAM VERSION PLATFORM DIRECTORY REQUIREMENT...

A requirement that ends in `; extra == 'NAME'` comes with that extra alone. The page that the wheel has on an index is wheel.md. The format is that of packaging.python.org/specifications/binary-distribution-format. Nothing is built, so no tool is needed.
"""

import base64
import hashlib
import os
import re
import sys
import time
import zipfile
from pathlib import Path

NAME = "baton_serving"


def main(program: str, version: str, platform: str, directory: str, *requirements: str) -> None:
    info = f"{NAME}-{version}.dist-info"
    readme = Path(__file__).parent / "wheel.md"
    extras = sorted({found[1] for requirement in requirements if (found := re.search("extra == '(.+)'", requirement))})
    needs = "".join([*(f"Provides-Extra: {extra}\n" for extra in extras), *(f"Requires-Dist: {requirement}\n" for requirement in requirements)])
    metadata = (
        f"Metadata-Version: 2.3\nName: {NAME.replace('_', '-')}\nVersion: {version}\n"
        "Summary: Disaggregated serving of large language models\nLicense-Expression: Apache-2.0\n"
        "Requires-Python: >=3.8\n"
        f"{needs}Description-Content-Type: text/markdown\n\n{readme.read_text(encoding='utf-8')}"
    )
    wheel = f"Wheel-Version: 1.0\nGenerator: baton\nRoot-Is-Purelib: false\nTag: py3-none-{platform}\n"
    files = {
        f"{NAME}-{version}.data/scripts/baton": (Path(program).read_bytes(), 0o755),
        f"{info}/METADATA": (metadata.encode(), 0o644),
        f"{info}/WHEEL": (wheel.encode(), 0o644),
    }
    record = f"{info}/RECORD"
    lines = []
    for path, (data, _) in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(data)}\n")
    files[record] = ("".join([*lines, f"{record},,\n"]).encode(), 0o644)
    # The format of archives begins in 1980.
    made = time.gmtime(max(int(os.environ["SOURCE_DATE_EPOCH"]), 315532800))[:6]
    out = Path(directory) / f"{NAME}-{version}-py3-none-{platform}.whl"
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, (data, mode) in files.items():
            entry = zipfile.ZipInfo(path, made)
            entry.external_attr = (0o100000 | mode) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)


if __name__ == "__main__":
    main(*sys.argv[1:])
