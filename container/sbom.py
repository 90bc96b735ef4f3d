"""Prints what is in the binary, as a CycloneDX bill of materials: python3 sbom.py VERSION ARCHITECTURE

The crates are those that cargo's lock file pins and that `baton` is made of: what only builds or tests it is left out. The npm packages are
those that are bundled into the page, whose licences stand in page/dist; the page's lock file pins them.
"""

import base64
import json
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parent.parent


def crates(arch: str) -> tuple[dict, dict]:
    """Packages by id, and the ids that each is made of."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", f"{arch}-unknown-linux-gnu"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    metadata = json.loads(told)
    packages = {package["id"]: package for package in metadata["packages"]}

    def normal(node: dict) -> list[str]:
        return [dep["pkg"] for dep in node["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])]

    return packages, {node["id"]: normal(node) for node in metadata["resolve"]["nodes"]}


def checksums() -> dict:
    """By name and version, from the lock file."""
    text = (ROOT / "Cargo.lock").read_text(encoding="utf-8")
    found = re.findall(r'name = "(.+)"\nversion = "(.+)"\nsource = ".+"\nchecksum = "(.+)"', text)
    return {(name, version): checksum for name, version, checksum in found}


def npm_packages() -> tuple[list[dict], list[dict], list[str]]:
    """What the page brings: components, what each is made of, and which the page itself asks for."""
    locked = json.loads((ROOT / "page/package-lock.json").read_text(encoding="utf-8"))["packages"]
    # Each begins with a name and a version.
    licences = (ROOT / "page/dist/licences.txt").read_text(encoding="utf-8").split("\n---\n\n")
    bundled = sorted(text.split("\n", 1)[0].split(" ") for text in licences)

    def purl(name: str) -> str:
        return f"pkg:npm/{name.replace('@', '%40')}@{locked[f'node_modules/{name}']['version']}"

    def needs(package: dict) -> list[str]:
        return sorted(purl(name) for name, _ in bundled if name in package.get("dependencies", {}))

    components, dependencies = [], []
    for name, version in bundled:
        package = locked[f"node_modules/{name}"]
        assert package["version"] == version, f"page/dist has {name} {version}, page/package-lock.json {package['version']}: build the page anew"
        algorithm, digest = package["integrity"].split("-", 1)
        assert algorithm == "sha512", f"{name}: {algorithm}"
        part = {"type": "library", "bom-ref": purl(name), "name": name, "version": version, "purl": purl(name)}
        part["licenses"] = [{"expression": package["license"]}]
        part["hashes"] = [{"alg": "SHA-512", "content": base64.b64decode(digest).hex()}]
        components.append(part)
        dependencies.append({"ref": purl(name), "dependsOn": needs(package)})
    return components, dependencies, needs(locked[""])


def main(version: str, arch: str) -> None:
    packages, made_of = crates(arch)
    sums = checksums()
    root = next(id for id, package in packages.items() if package["name"] == "baton" and package["source"] is None)
    inside, waiting = set(), [root]
    while waiting:
        id = waiting.pop()
        if id not in inside:
            inside.add(id)
            waiting += made_of[id]

    def purl(id: str) -> str:
        return f"pkg:cargo/{packages[id]['name']}@{packages[id]['version']}"

    def component(id: str) -> dict:
        package = packages[id]
        part = {"type": "library", "bom-ref": purl(id), "name": package["name"], "version": package["version"], "purl": purl(id)}
        if package["license"]:
            # What crates write with a slash is an OR.
            part["licenses"] = [{"expression": re.sub(r"\s*/\s*", " OR ", package["license"])}]
        if checksum := sums.get((package["name"], package["version"])):
            part["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        return part

    order = sorted(inside, key=purl)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"])))
    program = {**component(root), "type": "application"}
    page, page_made_of, page_needs = npm_packages()

    def depends(id: str) -> list[str]:
        # The API server embeds the page.
        embedded = page_needs if packages[id]["name"] == "baton-api-server" else []
        return sorted({purl(dep) for dep in made_of[id]}.union(embedded))

    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"timestamp": when, "component": program},
        "components": [component(id) for id in order if id != root] + page,
        "dependencies": [{"ref": purl(id), "dependsOn": depends(id)} for id in order] + page_made_of,
    }
    assert program["version"] == version, f"the sources are of {program['version']}, the binary of {version}"
    bill["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bill, sort_keys=True)).urn
    json.dump(bill, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
