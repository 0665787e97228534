"""See :mod:`nl_detectron_cli.analyze`, or ``--help``."""

from nl_detectron_cli.analyze import main

if __name__ == "__main__":
    main()
