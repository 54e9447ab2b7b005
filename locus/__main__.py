"""`python -m locus` is the command `locus`."""

from locus.cli import main

main()
