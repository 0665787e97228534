"""See :mod:`nl_detectron_cli.convert_weights`, or ``--help``."""

from nl_detectron_cli.convert_weights import main

if __name__ == "__main__":
    main()
