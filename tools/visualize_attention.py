"""See :mod:`nl_detectron_cli.attention`, or ``--help``."""

from nl_detectron_cli.attention import main

if __name__ == "__main__":
    main()
