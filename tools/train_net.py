"""See :mod:`nl_detectron_cli.train`, or ``--help``."""

from nl_detectron_cli.train import main

if __name__ == "__main__":
    main()
