"""Install hosts into this environment with their own requirements but without some of them, and without what those would bring.

    python tests/guest/install.py 'executorch==1.5.1' --without torch torchao
    python tests/guest/install.py 'axolotl==0.19.0' --only transformers accelerate

A host that declares torchao would bring the real one, one that declares torch may bring gigabytes of CUDA; both are left as they
are here. Requirements of extras are left out.
"""

import argparse
import importlib.metadata
import subprocess
import sys


def bracketed(extras) -> str:
    return f"[{','.join(sorted(extras))}]" if extras else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="+", help="requirements, such as executorch==1.5.1")
    parser.add_argument("--without", nargs="*", default=[], help="packages to leave out")
    parser.add_argument("--only", nargs="*", help="of their requirements take these alone")
    given = parser.parse_args()
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "packaging"], check=True)
    subprocess.run([*pip, "--no-deps", *given.hosts], check=True)
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    hosts = [Requirement(host).name for host in given.hosts]
    without = {canonicalize_name(name) for name in [*hosts, *given.without]}
    only = None if given.only is None else {canonicalize_name(name) for name in given.only}
    wanted = [Requirement(line) for host in hosts for line in importlib.metadata.requires(host) or []]
    kept = [
        f"{one.name}{bracketed(one.extras)}{one.specifier}"
        for one in wanted
        if canonicalize_name(one.name) not in without
        and (only is None or canonicalize_name(one.name) in only)
        and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]
    # what is here stays: a requirement of a requirement may not bring another torch
    held = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    subprocess.run([*pip, held, *kept], check=True)


if __name__ == "__main__":
    main()
