"""`python -m rmt.report RUN ...`."""

from rmt.report.report import main

main()
