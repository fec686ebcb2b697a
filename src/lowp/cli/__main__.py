"""`python -m lowp.cli`, where the script `lowp` is not on the path."""

from . import main

main()
