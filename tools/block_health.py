"""See :mod:`nl_detectron_cli.health`, or ``--help``."""

from nl_detectron_cli.health import main

if __name__ == "__main__":
    main()
