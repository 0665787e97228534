"""See :mod:`nl_detectron_cli.export`, or ``--help``."""

from nl_detectron_cli.export import main

if __name__ == "__main__":
    main()
