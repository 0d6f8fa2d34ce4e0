"""`python -m spatialscore`."""

from .launcher import main

main()
