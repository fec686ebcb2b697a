#!/bin/sh
# The tests of the CPU's operators in Python, as ARM: Debian's Python for arm64 and torch's wheel under an emulator of the processor.
#
#     tests/arm.sh FOLDER [what pytest is given]          CPU=neoverse-n1 for a processor without the matrix instructions
#                                                         (torch's wheel wants ARMv8.1 or later: not for cortex-a72)
#
# Wants Debian 12, pip, cmake, g++-aarch64-linux-gnu and qemu-user-static; takes 160 MB of packages, kept in FOLDER, and installs
# nothing. torch 2.10: the last wheel for arm64 on PyPI that brings no CUDA; the library's interface is there since then.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
at=$(cd "$1" && pwd)
shift

debian() (  # Python and what it and torch load, unpacked, by an apt that knows of nothing else
  mkdir -p "$at/apt/state/lists/partial" "$at/apt/cache/archives/partial" "$at/root"
  : > "$at/apt/status"
  printf '%s "%s";\n' APT::Architecture arm64 APT::Architectures arm64 Dir::State "$at/apt/state" \
    Dir::State::status "$at/apt/status" Dir::Cache "$at/apt/cache" APT::Sandbox::User root > "$at/apt/apt.conf"
  export APT_CONFIG="$at/apt/apt.conf"
  apt-get -q update
  cd "$at/apt/cache" && apt-get -q download python3.11 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 \
    libstdc++6 libgomp1 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1
  for package in *.deb; do dpkg -x "$package" "$at/root"; done
)

wheels() {
  fetch="python3 -m pip -q install --target $at/site --python-version 3.11 --only-binary=:all: --platform manylinux_2_28_aarch64
    --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64"
  $fetch --no-deps torch==2.10.0
  $fetch numpy safetensors ml_dtypes pytest hypothesis sympy networkx jinja2 fsspec filelock typing_extensions
}

[ -e "$at/root/ready" ] || { debian && touch "$at/root/ready"; }
[ -e "$at/site/ready" ] || { wheels && touch "$at/site/ready"; }
cmake -S "$here/src/lowp/kernels/cpu/native" -B "$at/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ > "$at/cmake.log"
cmake --build "$at/build" -j2 > "$at/build.log"
rm -rf "$at/src"
cp -r "$here/src" "$at/src"
mkdir -p "$at/src/lowp/kernels/cpu/built"
rm -f "$at/src/lowp/kernels/cpu/built/lowp_cpu.so"
cp "$at/build/lowp_cpu.so" "$at/src/lowp/kernels/cpu/built/"
cd "$here"
[ $# -gt 0 ] || set -- tests/kernels/test_planes.py -k "neon or not any_shape"
PYTHONPATH="$at/site" PYTHONDONTWRITEBYTECODE=1 exec qemu-aarch64-static -cpu "${CPU:-max}" -L "$at/root" \
  "$at/root/usr/bin/python3.11" -m pytest -p no:cacheprovider -o pythonpath="$at/src" -o addopts=--import-mode=importlib -W ignore "$@"
