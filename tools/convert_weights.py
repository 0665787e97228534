"""See :mod:`nl_detectron_cli.convert`, or ``--help``."""

from nl_detectron_cli.convert import main

if __name__ == "__main__":
    main()
