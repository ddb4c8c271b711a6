"""Unpacks a pinned wheel without pip, which Debian's Python comes without.

    python3 wheel.py REQUIREMENTS FOLDER

REQUIREMENTS is a file for `pip install --require-hashes` with one package; the file of the package
index whose SHA-256 is among its hashes and whose platform is this machine's is fetched, checked and
unpacked into FOLDER.
"""

import hashlib
import io
import platform
import re
import sys
import urllib.parse
import urllib.request
import zipfile


def main(requirements, folder):
    text = open(requirements, encoding="utf-8").read()
    name, version = re.search(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE).groups()
    hashes = set(re.findall(r"sha256:([0-9a-f]{64})", text))
    index = f"https://pypi.org/simple/{name}/"
    with urllib.request.urlopen(index, timeout=60) as answer:
        page = answer.read().decode()
    for link, digest in re.findall(r'href="([^"#]+)#sha256=([0-9a-f]{64})"', page):
        if digest not in hashes or platform.machine() not in link:
            continue
        with urllib.request.urlopen(urllib.parse.urljoin(index, link), timeout=600) as answer:
            wheel = answer.read()
        if hashlib.sha256(wheel).hexdigest() != digest:
            sys.exit(f"{link}: another SHA-256 than pinned")
        zipfile.ZipFile(io.BytesIO(wheel)).extractall(folder)
        return
    sys.exit(f"{name} {version} has no pinned wheel for {platform.machine()}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
