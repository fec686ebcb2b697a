"""Install a host into this environment with its own requirements but without some of them, and without what those would bring.

    python tests/guest/install.py 'executorch==1.5.1' --without torch torchao

A host that declares torchao would bring the real one, one that declares torch may bring gigabytes of CUDA; both are left as they
are here. Requirements of extras are left out.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys


def bracketed(extras) -> str:
    return f"[{','.join(sorted(extras))}]" if extras else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", help="a requirement, such as executorch==1.5.1")
    parser.add_argument("--without", nargs="*", default=[], help="packages to leave out")
    given = parser.parse_args()
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "packaging"], check=True)
    subprocess.run([*pip, "--no-deps", given.host], check=True)
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in importlib.metadata.requires(re.split("[<=>~!]", given.host)[0]) or []]
    kept = [
        f"{one.name}{bracketed(one.extras)}{one.specifier}"
        for one in wanted
        if one.name not in given.without and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]
    # what is here stays: a requirement of a requirement may not bring another torch
    held = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    subprocess.run([*pip, held, *kept], check=True)


if __name__ == "__main__":
    main()
