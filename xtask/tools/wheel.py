"""Unpacks a pinned wheel without pip, which Debian's Python comes without.

    python3 wheel.py REQUIREMENTS FOLDER [PART]

REQUIREMENTS is a file for `pip install --require-hashes` with one package; the file of the package
index whose SHA-256 is among its hashes, and which is for this machine's platform or is the source, is
fetched, checked and unpacked into FOLDER. With PART, only the files are whose paths contain it.
"""

import hashlib
import io
import platform
import re
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile


def main(requirements, folder, part=""):
    text = open(requirements, encoding="utf-8").read()
    name, version = re.search(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE).groups()
    hashes = set(re.findall(r"sha256:([0-9a-f]{64})", text))
    index = f"https://pypi.org/simple/{name}/"
    with urllib.request.urlopen(index, timeout=60) as answer:
        page = answer.read().decode()
    for link, digest in re.findall(r'href="([^"#]+)#sha256=([0-9a-f]{64})"', page):
        source = link.endswith(".tar.gz")
        if digest not in hashes or not (source or platform.machine() in link):
            continue
        with urllib.request.urlopen(urllib.parse.urljoin(index, link), timeout=600) as answer:
            content = answer.read()
        if hashlib.sha256(content).hexdigest() != digest:
            sys.exit(f"{link}: another SHA-256 than pinned")
        if source:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                members = [one for one in archive.getmembers() if one.isfile() and part in one.name]
                archive.extractall(folder, members)
        else:
            archive = zipfile.ZipFile(io.BytesIO(content))
            archive.extractall(folder, [name for name in archive.namelist() if part in name])
        return
    sys.exit(f"{name} {version} has no pinned wheel for {platform.machine()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
