"""`python -m ckptd`."""

from ckptd.cli.main import main

main()
