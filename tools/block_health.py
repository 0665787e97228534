"""See :mod:`nl_detectron_cli.block_health`, or ``--help``."""

from nl_detectron_cli.block_health import main

if __name__ == "__main__":
    main()
