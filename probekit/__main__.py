"""``python -m probekit`` is the ``probekit`` command."""

from probekit.cli import main

main()
